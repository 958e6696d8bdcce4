// What encoding and decoding on the CPU share: a group of tokens as rows of float32, whatever the
// layout of the blocks, and loops of known length.
#pragma once

#include "../ops.h"

namespace pd {

// Up to 32 tokens of one head, [tokens, width].
struct Tile {
  alignas(64) float values[kTokenGroup * kMaxWidth];

  PD_BOTH float* row(int64_t token, int64_t width) { return values + token * width; }
  PD_BOTH const float* row(int64_t token, int64_t width) const { return values + token * width; }
};

// Where the tokens of a group, and those of the next, begin in their blocks.
struct TokenPlaces {
  char* of[2 * kTokenGroup];
  int64_t count;  // at most 32

  PD_BOTH TokenPlaces(const TokenRun& run, const PartPlane& part, int64_t head, int64_t first) {
    const int64_t left = run.tokens - first;
    const int64_t known = left < 2 * kTokenGroup ? left : 2 * kTokenGroup;
    count = left < kTokenGroup ? left : kTokenGroup;
    for (int64_t i = 0; i < known; ++i) of[i] = run.token_address(part, head, first + i);
    for (int64_t i = known; i < 2 * kTokenGroup; ++i) of[i] = of[i - 1];
  }

  // The processor cannot guess where one head's next rows are, and is told in time.
  PD_BOTH void prefetch_next(int64_t token, int64_t offset) const {
    __builtin_prefetch(of[kTokenGroup + token] + offset);
  }
};

template <class Floats>
PD_BOTH typename Floats::Type* element_at(char* place) {
  return reinterpret_cast<typename Floats::Type*>(place);
}

template <class Floats>
PD_BOTH void load_tile(const TokenPlaces& places, const Tiling& tiling, int64_t width, Tile& tile) {
  constexpr int64_t kSize = sizeof(typename Floats::Type);
  if (tiling.has_rows(kSize)) {
    for (int64_t t = 0; t < places.count; ++t) {
      for (int64_t byte = 0; byte < width * kSize; byte += 64) places.prefetch_next(t, byte);
      const auto* const from = element_at<Floats>(places.of[t]);
      float* const row = tile.row(t, width);
      for (int64_t c = 0; c < width; ++c) row[c] = Floats::load(from[c]);
    }
    return;
  }
  for (int64_t c = 0; c < width; ++c) {
    const int64_t offset = tiling.channel_offset(c);
    places.prefetch_next(0, offset);
    places.prefetch_next(kTokenGroup / 2, offset);
    for (int64_t t = 0; t < places.count; ++t) {
      tile.row(t, width)[c] = Floats::load(*element_at<Floats>(places.of[t] + offset));
    }
  }
}

template <class Floats>
PD_BOTH void store_tile(
    const TokenPlaces& places, const Tiling& tiling, int64_t width, const Tile& tile) {
  constexpr int64_t kSize = sizeof(typename Floats::Type);
  if (tiling.has_rows(kSize)) {
    for (int64_t t = 0; t < places.count; ++t) {
      auto* const to = element_at<Floats>(places.of[t]);
      const float* const row = tile.row(t, width);
      for (int64_t c = 0; c < width; ++c) to[c] = store_within<Floats>(row[c]);
    }
    return;
  }
  for (int64_t c = 0; c < width; ++c) {
    const int64_t offset = tiling.channel_offset(c);
    for (int64_t t = 0; t < places.count; ++t) {
      *element_at<Floats>(places.of[t] + offset) = store_within<Floats>(tile.row(t, width)[c]);
    }
  }
}

PD_BOTH void load_tile(const TokenRun& run, const TokenPlaces& places, int64_t width, Tile& tile) {
  switch (run.element) {
    case Element::kFloat32:
      return load_tile<Float32>(places, run.tiling, width, tile);
    case Element::kBFloat16:
      return load_tile<BFloat16>(places, run.tiling, width, tile);
    case Element::kFloat16:
      return load_tile<Float16>(places, run.tiling, width, tile);
  }
}

PD_BOTH void store_tile(
    const TokenRun& run, const TokenPlaces& places, int64_t width, const Tile& tile) {
  switch (run.element) {
    case Element::kFloat32:
      return store_tile<Float32>(places, run.tiling, width, tile);
    case Element::kBFloat16:
      return store_tile<BFloat16>(places, run.tiling, width, tile);
    case Element::kFloat16:
      return store_tile<Float16>(places, run.tiling, width, tile);
  }
}

// Calls work(floats, row) for each of the first tokens of a group: with the row where it lies, or,
// where it does not lie in a row, with a copy.
template <class Floats, class Work>
PD_BOTH void for_rows(
    const TokenPlaces& places, const Tiling& tiling, int64_t width, int64_t count, Tile& tile,
    Work work) {
  constexpr int64_t kSize = sizeof(typename Floats::Type);
  if (tiling.has_rows(kSize)) {
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t byte = 0; byte < width * kSize; byte += 64) places.prefetch_next(t, byte);
      work(Floats(), static_cast<const typename Floats::Type*>(element_at<Floats>(places.of[t])));
    }
    return;
  }
  load_tile<Floats>(places, tiling, width, tile);
  for (int64_t t = 0; t < count; ++t) {
    work(Float32(), static_cast<const float*>(tile.row(t, width)));
  }
}

template <class Work>
PD_BOTH void for_rows(
    const TokenRun& run, const TokenPlaces& places, int64_t width, int64_t count, Tile& tile,
    Work work) {
  switch (run.element) {
    case Element::kFloat32:
      return for_rows<Float32>(places, run.tiling, width, count, tile, work);
    case Element::kBFloat16:
      return for_rows<BFloat16>(places, run.tiling, width, count, tile, work);
    case Element::kFloat16:
      return for_rows<Float16>(places, run.tiling, width, count, tile, work);
  }
}

// Calls work(stripe) for a stripe whose width, where it is a usual one, the compiler knows when it
// compiles `work`: loops of a known length are several times as fast.
template <class Work>
PD_BOTH void for_known_shapes(Stripe stripe, Work work) {
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
