// What encoding and decoding on the CPU share: a group of tokens as rows of the cache's own type,
// whatever the layout of the blocks, and loops of known length.
#pragma once

#include "../ops.h"

namespace pd {

// Where the up to 32 tokens of a group begin in the blocks of a part, in its first head.
struct TokenPlaces {
  char* of[kTokenGroup];  // behind the last token: as that one
  int64_t count;

  PD_BOTH TokenPlaces(const TokenRun& run, const PartPlane& part, int64_t first) {
    const Tiling& tiling = run.tiling;
    const int64_t left = run.tokens - first;
    count = left < kTokenGroup ? left : kTokenGroup;
    // Counted, since divisions take as long as a token's values.
    int64_t block = first / tiling.tokens, token = first - block * tiling.tokens;
    int64_t tile = token / tiling.token_tile, in_tile = token - tile * tiling.token_tile;
    for (int64_t t = 0; t < kTokenGroup; ++t) {
      if (t >= count) {
        of[t] = of[t - 1];
        continue;
      }
      of[t] = part.base + run.blocks[block] * part.block_stride + tile * tiling.token_tile_stride +
              in_tile * tiling.token_stride;
      if (++in_tile == tiling.token_tile) in_tile = 0, ++tile;
      if (++token == tiling.tokens) token = tile = in_tile = 0, ++block;
    }
  }
};

// Where the tokens of a group begin in one head, and those that are next.
class Group {
 public:
  PD_BOTH Group(
      const TokenPlaces& places, int64_t offset, const TokenPlaces& next, int64_t next_offset)
      : places_(places), offset_(offset), next_(next), next_offset_(next_offset) {}

  PD_BOTH int64_t count() const { return places_.count; }
  PD_BOTH char* token(int64_t t) const { return places_.of[t] + offset_; }

  // The processor cannot guess where the next tokens are, and is told in time.
  PD_BOTH void prefetch_next(int64_t t, int64_t offset) const {
    __builtin_prefetch(next_.of[t] + next_offset_ + offset);
  }

 private:
  const TokenPlaces& places_;
  int64_t offset_;
  const TokenPlaces& next_;
  int64_t next_offset_;
};

// Calls work(item, index of the group, group) for all groups of tokens of items [first, last). The
// heads of a group follow each other: they have their blocks in common, and the way to those.
template <class Work>
PD_BOTH void for_groups(const TokenRun& run, int64_t first, int64_t last, Work work) {
  const int64_t groups = (run.tokens + kTokenGroup - 1) / kTokenGroup;
  while (first < last) {
    const PartPlane& part = run.parts[first / run.heads];
    const int64_t head = first % run.heads;
    const int64_t heads = last - first < run.heads - head ? last - first : run.heads - head;
    const int64_t offset = head * part.head_stride;
    TokenPlaces places(run, part, 0);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t next_first = g + 1 < groups ? (g + 1) * kTokenGroup : 0;
      const TokenPlaces next(run, part, next_first);
      for (int64_t i = 0; i < heads; ++i) {
        const int64_t here = offset + i * part.head_stride;
        const bool is_last = i + 1 == heads;
        work(
            first + i, g,
            is_last ? Group(places, here, next, offset)
                    : Group(places, here, places, here + part.head_stride));
      }
      places = next;
    }
    first += heads;
  }
}

// Up to 32 tokens of one head, [tokens, width], where a block does not have them in rows.
template <class Floats>
struct Tile {
  using Type = typename Floats::Type;
  alignas(64) Type values[kTokenGroup * kMaxWidth];
};

// The tokens of a group as rows: in their block, or in a tile.
template <class Floats>
struct Rows {
  using Type = typename Floats::Type;
  Type* of[kTokenGroup];
  bool in_block;

  PD_BOTH Rows(const Group& group, const Tiling& tiling, Tile<Floats>& tile)
      : in_block(tiling.has_rows(sizeof(Type))),
        group_(group),
        bytes_(tiling.width * static_cast<int64_t>(sizeof(Type))) {
    for (int64_t t = 0; t < kTokenGroup; ++t) {
      of[t] = in_block ? reinterpret_cast<Type*>(group.token(t)) : tile.values + t * tiling.width;
    }
  }

  PD_BOTH void prefetch_next(int64_t t) const {
    if (!in_block) return;
    for (int64_t byte = 0; byte < bytes_; byte += 64) group_.prefetch_next(t, byte);
  }

 private:
  const Group& group_;
  int64_t bytes_;
};

// Sixteen units are what one copy moves; a unit is an element, or a pair of those.
constexpr int64_t kUnits = 16;

using Pair __attribute__((may_alias)) = uint32_t;  // two halves

template <class Unit>
struct Square {
  alignas(64) Unit units[kUnits][kUnits];
};

template <class Unit>
PD_BOTH void transpose(
    const Unit* __restrict from, int64_t from_step, Unit* __restrict to, int64_t to_step) {
  for (int64_t i = 0; i < kUnits; ++i) {
    for (int64_t k = 0; k < kUnits; ++k) to[i * to_step + k] = from[k * from_step + i];
  }
}

// Whether the tokens of a unit of channels are side by side, sixteen at least.
template <class Floats, class Unit>
PD_BOTH bool has_columns(const Tiling& tiling) {
  constexpr int64_t kSize = sizeof(typename Floats::Type);
  const bool is_unit = sizeof(Unit) == kSize || (tiling.channel_stride == kSize &&
                                                 tiling.channel_tile * kSize % sizeof(Unit) == 0);
  return is_unit && tiling.token_stride == sizeof(Unit) && tiling.token_tile % kUnits == 0;
}

// Whether two tokens lie channel by channel, sixteen channels at least.
PD_BOTH bool has_row_pairs(const Tiling& tiling, int64_t element_bytes) {
  return tiling.token_tile == 2 && tiling.token_stride == element_bytes &&
         tiling.channel_stride == 2 * element_bytes && tiling.channel_tile % kUnits == 0;
}

// Copies a group from its block into the rows of a tile, or back.
template <class Floats, bool kIsLoad>
class Mover {
 public:
  using Type = typename Floats::Type;

  PD_BOTH Mover(const Group& group, const Tiling& tiling, Tile<Floats>& tile)
      : group_(group), tiling_(tiling), width_(tiling.width), tile_(tile) {}

  PD_BOTH void move() const {
    const int64_t count = group_.count();
    if (has_columns<Floats, Type>(tiling_)) {
      move_columns<Type>();
    } else if (sizeof(Type) == 2 && has_columns<Floats, Pair>(tiling_)) {
      move_columns<Pair>();
    } else if (has_row_pairs(tiling_, sizeof(Type))) {
      move_row_pairs();
    } else {
      move_elements(0, count, 0, width_);
    }
  }

 private:
  template <class Unit>
  PD_BOTH void move_columns() const {
    constexpr int64_t kChannels = sizeof(Unit) / sizeof(Type);
    const int64_t tokens = group_.count() / kUnits * kUnits;
    const int64_t channels = width_ / (kChannels * kUnits) * (kChannels * kUnits);
    for (int64_t c = 0; c < channels; c += kChannels * kUnits) {
      for (int64_t t = 0; t < tokens; t += kUnits) {
        Unit* const rows = reinterpret_cast<Unit*>(row(t) + c);
        const int64_t step = width_ / kChannels;
        Square<Unit> square;
        if (!kIsLoad) transpose(rows, step, square.units[0], kUnits);
        for (int64_t i = 0; i < kUnits; ++i) {
          const int64_t offset = tiling_.channel_offset(c + i * kChannels);
          group_.prefetch_next(t, offset);
          move_bytes(group_.token(t) + offset, square.units[i], sizeof(square.units[i]));
        }
        if (kIsLoad) transpose(square.units[0], kUnits, rows, step);
      }
    }
    move_elements(0, tokens, channels, width_);
    move_elements(tokens, group_.count(), 0, width_);
  }

  PD_BOTH void move_row_pairs() const {
    const int64_t tokens = group_.count() / 2 * 2;
    const int64_t channels = width_ / kUnits * kUnits;
    for (int64_t t = 0; t < tokens; t += 2) {
      Type* const first = row(t);
      Type* const second = row(t + 1);
      for (int64_t c = 0; c < channels; c += kUnits) {
        const int64_t offset = tiling_.channel_offset(c);
        group_.prefetch_next(t, offset);
        Type* const pairs = reinterpret_cast<Type*>(group_.token(t) + offset);
        for (int64_t i = 0; i < kUnits; ++i) {
          if (kIsLoad) {
            first[c + i] = pairs[2 * i];
            second[c + i] = pairs[2 * i + 1];
          } else {
            pairs[2 * i] = first[c + i];
            pairs[2 * i + 1] = second[c + i];
          }
        }
      }
    }
    move_elements(0, tokens, channels, width_);
    move_elements(tokens, group_.count(), 0, width_);
  }

  PD_BOTH Type* row(int64_t t) const { return tile_.values + t * width_; }

  // One by one, wherever they are.
  PD_BOTH void move_elements(
      int64_t first_token, int64_t last_token, int64_t first_channel, int64_t last_channel) const {
    for (int64_t c = first_channel; c < last_channel; ++c) {
      const int64_t offset = tiling_.channel_offset(c);
      for (int64_t t = first_token; t < last_token; ++t) {
        move_bytes(group_.token(t) + offset, row(t) + c, sizeof(Type));
      }
    }
  }

  PD_BOTH void move_bytes(char* in_block, void* in_tile, size_t bytes) const {
    kIsLoad ? memcpy(in_tile, in_block, bytes) : memcpy(in_block, in_tile, bytes);
  }

  const Group& group_;
  const Tiling& tiling_;
  int64_t width_;
  Tile<Floats>& tile_;
};

template <class Floats, bool kIsLoad>
PD_BOTH void move_tile(const Group& group, const Tiling& tiling, Tile<Floats>& tile) {
  Mover<Floats, kIsLoad>(group, tiling, tile).move();
}

// Calls work(stripe) for a stripe whose width, where it is a usual one, the compiler knows when it
// compiles `work`: loops of a known length are several times as fast.
template <class Work>
PD_BOTH void for_known_widths(Stripe stripe, Work work) {
  switch (stripe.width) {
    case 64:
      stripe.width = 64;
      return work(stripe);
    case 128:
      stripe.width = 128;
      return work(stripe);
    default:
      return work(stripe);
  }
}

}  // namespace pd
