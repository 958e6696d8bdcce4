// What gathering and scattering on CUDA share: a warp works on one token of one head.
#pragma once

#include <cstdint>

#include "../heads.h"
#include "tiles.cuh"

namespace pd {

template <class Word>
__device__ void copy_row_of(char* to, const char* from, int bytes) {
  auto* const target = reinterpret_cast<Word*>(to);
  const auto* const source = reinterpret_cast<const Word*>(from);
  for (int i = lane(); i < bytes / static_cast<int>(sizeof(Word)); i += kWarp) {
    target[i] = source[i];
  }
}

// Copies bytes that lie side by side on both sides, in the widest words that they are aligned for.
__device__ inline void copy_row(char* to, const char* from, int bytes) {
  const int64_t all = reinterpret_cast<int64_t>(to) | reinterpret_cast<int64_t>(from) | bytes;
  if (all % 16 == 0) {
    copy_row_of<uint4>(to, from, bytes);
  } else if (all % 4 == 0) {
    copy_row_of<uint32_t>(to, from, bytes);
  } else if (all % 2 == 0) {
    copy_row_of<uint16_t>(to, from, bytes);
  } else {
    copy_row_of<uint8_t>(to, from, bytes);
  }
}

// Calls move(row's place in the blocks, its place in the slab, scale) for each row that this warp
// is to move.
template <class Move>
__device__ void for_each_row(const TokenRun& run, const HeadSlab& place, Move move) {
  const int64_t all = run.num_parts * run.heads * run.tokens;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + warp(); i < all; i += step) {
    const int64_t item = i / run.tokens, token = i - item * run.tokens;
    move(place_of(run, item, token), place.place(run, item, token), place.scale(run, item));
  }
}

}  // namespace pd
