// Where the rows of a block lie, for the CPU and for CUDA.
//
// A *plane* is one layer's KV cache seen as [num_blocks, heads, tokens, width], with any strides
// but in the last dimension, whose elements touch. A *row* is that last dimension: what one head
// has of one token. Rows of a block are numbered head * tokens + token.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PD_BOTH __host__ __device__ inline
#else
#define PD_BOTH inline
#endif

namespace pd {

// Strides are in bytes.
struct Plane {
  const char* base;
  int64_t block_stride;
  int64_t head_stride;
  int64_t token_stride;
};

// What all planes of a call have in common.
struct BlockShape {
  int64_t heads;
  int64_t tokens;
  int64_t row_bytes;

  PD_BOTH int64_t rows() const { return heads * tokens; }
};

PD_BOTH const char* row_address(
    const Plane& plane, const BlockShape& shape, int64_t block, int64_t row) {
  const int64_t head = row / shape.tokens;
  const int64_t token = row - head * shape.tokens;
  return plane.base + block * plane.block_stride + head * plane.head_stride +
         token * plane.token_stride;
}

}  // namespace pd
