// Where the channels of a token lie, for the CPU and for CUDA.
//
// Attention kernels keep a head's keys and values in a block as they need them: token by token,
// channel by channel, or in tiles of some tokens by some channels (for matrix units). All of that
// is [token tiles, tokens of a tile, channel tiles, channels of a tile], with any strides.
#pragma once

#include "floats.h"

namespace pd {

// Strides are in bytes.
struct Tiling {
  int64_t tokens;  // of a block
  int64_t width;   // channels
  int64_t token_tile;
  int64_t channel_tile;
  int64_t token_tile_stride;
  int64_t token_stride;
  int64_t channel_tile_stride;
  int64_t channel_stride;

  PD_BOTH int64_t token_offset(int64_t token) const {
    const int64_t tile = token / token_tile;
    return tile * token_tile_stride + (token - tile * token_tile) * token_stride;
  }

  PD_BOTH int64_t channel_offset(int64_t channel) const {
    const int64_t tile = channel / channel_tile;
    return tile * channel_tile_stride + (channel - tile * channel_tile) * channel_stride;
  }

  // Whether a token's channels are side by side.
  PD_BOTH bool has_rows(int64_t element_bytes) const {
    const bool tile_touches = channel_stride == element_bytes || channel_tile == 1;
    const bool tiles_touch =
        channel_tile_stride == channel_tile * element_bytes || channel_tile == width;
    return tile_touches && tiles_touch;
  }
};

// One layer's keys, or its values, or another part of its KV cache. Strides are in bytes.
struct PartPlane {
  char* base;
  int64_t block_stride;
  int64_t head_stride;
};

// A run of tokens in one part of several layers, which begins `skipped` tokens behind the start of
// blocks[0]: token i of it lies in blocks[(skipped + i) / tiling.tokens], and the first `tokens`
// count.
struct TokenRun {
  const PartPlane* parts;
  int64_t num_parts;
  int64_t heads;
  Element element;
  Tiling tiling;
  const int64_t* blocks;
  int64_t num_blocks;
  int64_t tokens;
  int64_t skipped = 0;

  // The place of a token of the run in one head of a part; channel_offset leads on from there.
  PD_BOTH char* token_address(const PartPlane& part, int64_t head, int64_t token) const {
    const int64_t index = (skipped + token) / tiling.tokens;
    return part.base + blocks[index] * part.block_stride + head * part.head_stride +
           tiling.token_offset(skipped + token - index * tiling.tokens);
  }
};

}  // namespace pd
