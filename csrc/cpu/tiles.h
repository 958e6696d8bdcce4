// What encoding and decoding on the CPU share: a group of tokens as rows of the cache's own type,
// whatever the layout of the blocks, and loops of known length.
#pragma once

#include "../ops.h"

namespace pd {

// No order moves more tokens at once; the tiles of each have a multiple of what it moves.
constexpr int64_t kVectorTokens = 8;

// Where the up to 32 tokens of a group begin in the blocks of a part, in its first head.
struct TokenPlaces {
  char* of[kTokenGroup];  // behind the last token: as that one
  int64_t count;
  int64_t lead;  // tokens before the first from which on vectors of them are within a tile

  PD_BOTH TokenPlaces(const TokenRun& run, const PartPlane& part, int64_t first) {
    const Tiling& tiling = run.tiling;
    const int64_t left = run.tokens - first;
    count = left < kTokenGroup ? left : kTokenGroup;
    // Counted, since divisions take as long as a token's values.
    const int64_t begin = run.skipped + first, unaligned = begin % kVectorTokens;
    lead = unaligned == 0 ? 0 : kVectorTokens - unaligned;
    if (lead > count) lead = count;
    int64_t block = begin / tiling.tokens, token = begin - block * tiling.tokens;
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
  PD_BOTH int64_t lead() const { return places_.lead; }
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
  if (groups <= 0) return;
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
        // The way to the next group's blocks is long where each is in a page of its own.
        for (int64_t t = i * kTokenGroup / heads; t < (i + 1) * kTokenGroup / heads; ++t) {
          __builtin_prefetch(next.of[t] + offset);
        }
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

// In which order the channels of a group lie, as far as that can be made use of.
enum class Order {
  kRows,          // a token's channels
  kColumns,       // a channel's tokens
  kChannelPairs,  // the tokens of two channels: keys as matrix units multiply them
  kTokenPairs,    // the channels of two tokens: values as matrix units multiply them
  kOther
};

PD_BOTH Order order_of(const Tiling& tiling, int64_t element_bytes) {
  const int64_t tokens = tiling.token_tile, channels = tiling.channel_tile;
  if (tiling.has_rows(element_bytes)) return Order::kRows;
  if (element_bytes == 1) return Order::kOther;
  if (tiling.token_stride == element_bytes && tokens % 8 == 0) return Order::kColumns;
  if (element_bytes != 2) return Order::kOther;
  if (channels == 2 && tiling.channel_stride == 2 && tiling.token_stride == 4 && tokens % 4 == 0) {
    return Order::kChannelPairs;
  }
  if (tokens == 2 && tiling.token_stride == 2 && tiling.channel_stride == 4 && channels % 8 == 0) {
    return Order::kTokenPairs;
  }
  return Order::kOther;
}

// The layout of a part, with what takes long to find out.
struct Layout {
  Order order;
  int64_t width;
  int64_t line_tokens, line_channels;  // what of either is in 64 bytes: powers of two
  int64_t channels[kMaxWidth];         // where each is

  PD_BOTH Layout(const Tiling& tiling, int64_t element_bytes)
      : order(order_of(tiling, element_bytes)), width(tiling.width) {
    const int64_t elements = 64 / element_bytes;
    switch (order) {
      case Order::kRows:
        line_tokens = 1, line_channels = elements;
        break;
      case Order::kColumns:
        line_tokens = elements, line_channels = 1;
        break;
      case Order::kChannelPairs:
        line_tokens = elements / 2, line_channels = 2;
        break;
      case Order::kTokenPairs:
        line_tokens = 2, line_channels = elements / 2;
        break;
      case Order::kOther:  // as if a few lines had all tokens of a channel
        line_tokens = 16, line_channels = 1;
        break;
    }
    for (int64_t c = 0; c < width; ++c) channels[c] = tiling.channel_offset(c);
  }
};

// Up to 32 tokens of one head, [tokens, width], where a block does not have them in rows.
template <class Floats>
struct Tile {
  alignas(64) typename Floats::Type values[kTokenGroup * kMaxWidth];
};

// The tokens of a group as rows: in their block, or in a tile.
template <class Floats>
struct Rows {
  using Type = typename Floats::Type;
  Type* of[kTokenGroup];

  PD_BOTH Rows(const Group& group, const Layout& layout, Tile<Floats>& tile)
      : group_(group), layout_(layout) {
    const bool in_block = layout.order == Order::kRows;
    for (int64_t t = 0; t < kTokenGroup; ++t) {
      of[t] = in_block ? reinterpret_cast<Type*>(group.token(t)) : tile.values + t * layout.width;
    }
  }

  // A part of what comes next, with every row: more at once would have to wait.
  PD_BOTH void prefetch_next(int64_t t) const {
    const int64_t width = layout_.width;
    if (layout_.order == Order::kRows || layout_.order == Order::kTokenPairs) {
      if ((t & (layout_.line_tokens - 1)) != 0) return;
      for (int64_t c = 0; c < width; c += layout_.line_channels) {
        group_.prefetch_next(t, layout_.channels[c]);
      }
      return;
    }
    for (int64_t c = t * width / kTokenGroup; c < (t + 1) * width / kTokenGroup;
         c += layout_.line_channels) {
      for (int64_t token = 0; token < kTokenGroup; token += layout_.line_tokens) {
        group_.prefetch_next(token, layout_.channels[c]);
      }
    }
  }

 private:
  const Group& group_;
  const Layout& layout_;
};

// What is moved at once: 16 bytes, the vector of every instruction set. A unit is an element, or
// two halves side by side.
using Halves = uint16_t __attribute__((vector_size(16)));
using Words = uint32_t __attribute__((vector_size(16)));
constexpr int64_t kVectorBytes = 16;

PD_BOTH Halves interleave_low(Halves a, Halves b) {
  return Halves{a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3]};
}
PD_BOTH Halves interleave_high(Halves a, Halves b) {
  return Halves{a[4], b[4], a[5], b[5], a[6], b[6], a[7], b[7]};
}
PD_BOTH Words interleave_low(Words a, Words b) { return Words{a[0], b[0], a[1], b[1]}; }
PD_BOTH Words interleave_high(Words a, Words b) { return Words{a[2], b[2], a[3], b[3]}; }

// As many rows as a row has units. Interleaving the first half of the rows with the second makes
// the highest bit of a unit's row the lowest of its column; all bits of either have changed places
// then.
template <int64_t kRows, class Vector>
PD_BOTH void transpose(Vector (&rows)[kRows]) {
  for (int64_t half = 1; half < kRows; half *= 2) {
    Vector next[kRows];
    for (int64_t i = 0; i < kRows / 2; ++i) {
      next[2 * i] = interleave_low(rows[i], rows[i + kRows / 2]);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + kRows / 2]);
    }
    for (int64_t i = 0; i < kRows; ++i) rows[i] = next[i];
  }
}

// Copies a group from its block into the rows of a tile, or back.
template <class Floats, bool kIsLoad>
class Mover {
 public:
  using Type = typename Floats::Type;
  static constexpr int64_t kSize = sizeof(Type);

  PD_BOTH Mover(const Group& group, const Layout& layout, Tile<Floats>& tile)
      : group_(group), layout_(layout), width_(layout.width), tile_(tile) {}

  PD_BOTH void move() const {
    switch (layout_.order) {
      case Order::kRows:
        return;
      case Order::kColumns:
        if (kSize == 4) return move_columns<Words, 4>(1);
        return move_columns<Halves, 8>(1);
      case Order::kChannelPairs:
        return move_columns<Words, 4>(2);
      case Order::kTokenPairs:
        return move_token_pairs();
      case Order::kOther:
        return move_elements(0, group_.count(), 0, width_);
    }
  }

 private:
  // Keys as attention multiplies them: a unit of one or two channels after the other.
  template <class Vector, int64_t kUnits>
  PD_BOTH void move_columns(int64_t unit_channels) const {
    const int64_t step = kUnits * unit_channels;
    const int64_t first = group_.lead(), channels = width_ / step * step;
    const int64_t tokens = first + (group_.count() - first) / kUnits * kUnits;
    for (int64_t c = 0; c < channels; c += step) {
      for (int64_t t = first; t < tokens; t += kUnits) {
        Vector square[kUnits];
        for (int64_t i = 0; i < kUnits; ++i) {
          const int64_t channel = c + i * unit_channels;
          square[i] = load<Vector>(kIsLoad ? in_block(t, channel) : in_tile(t + i, c));
        }
        transpose(square);
        for (int64_t i = 0; i < kUnits; ++i) {
          store(kIsLoad ? in_tile(t + i, c) : in_block(t, c + i * unit_channels), square[i]);
        }
      }
    }
    move_elements(0, first, 0, width_);
    move_elements(first, tokens, channels, width_);
    move_elements(tokens, group_.count(), 0, width_);
  }

  // Values as attention multiplies them: two tokens' channels in turns.
  PD_BOTH void move_token_pairs() const {
    constexpr int64_t kChannels = 8;
    const int64_t first = group_.lead(), channels = width_ / kChannels * kChannels;
    const int64_t tokens = first + (group_.count() - first) / 2 * 2;
    for (int64_t t = first; t < tokens; t += 2) {
      for (int64_t c = 0; c < channels; c += kChannels) {
        char* const pairs = in_block(t, c);
        if (kIsLoad) {
          Halves a = load<Halves>(pairs), b = load<Halves>(pairs + kVectorBytes);
          for (int64_t i = 0; i < 3; ++i) {  // round, until each is among its own again
            const Halves low = interleave_low(a, b);
            b = interleave_high(a, b);
            a = low;
          }
          store(in_tile(t, c), a);
          store(in_tile(t + 1, c), b);
        } else {
          const Halves a = load<Halves>(in_tile(t, c)), b = load<Halves>(in_tile(t + 1, c));
          store(pairs, interleave_low(a, b));
          store(pairs + kVectorBytes, interleave_high(a, b));
        }
      }
    }
    move_elements(0, first, 0, width_);
    move_elements(first, tokens, channels, width_);
    move_elements(tokens, group_.count(), 0, width_);
  }

  // One by one, wherever they are.
  PD_BOTH void move_elements(
      int64_t first_token, int64_t last_token, int64_t first_channel, int64_t last_channel) const {
    for (int64_t c = first_channel; c < last_channel; ++c) {
      for (int64_t t = first_token; t < last_token; ++t) {
        if (kIsLoad) {
          memcpy(in_tile(t, c), in_block(t, c), kSize);
        } else {
          memcpy(in_block(t, c), in_tile(t, c), kSize);
        }
      }
    }
  }

  PD_BOTH char* in_block(int64_t t, int64_t c) const {
    return group_.token(t) + layout_.channels[c];
  }
  PD_BOTH char* in_tile(int64_t t, int64_t c) const {
    return reinterpret_cast<char*>(tile_.values + t * width_ + c);
  }
  template <class Vector>
  PD_BOTH Vector load(const char* place) const {
    Vector vector;
    memcpy(&vector, place, kVectorBytes);
    return vector;
  }
  template <class Vector>
  PD_BOTH void store(char* place, Vector vector) const {
    memcpy(place, &vector, kVectorBytes);
  }

  const Group& group_;
  const Layout& layout_;
  int64_t width_;
  Tile<Floats>& tile_;
};

template <class Floats, bool kIsLoad>
PD_BOTH void move_tile(const Group& group, const Layout& layout, Tile<Floats>& tile) {
  Mover<Floats, kIsLoad>(group, layout, tile).move();
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
