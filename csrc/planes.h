// Where the rows of a block lie, for the CPU and for CUDA.
//
// A *plane* is one layer's KV cache seen as [num_blocks, heads, tokens, width], with any strides
// but in the last dimension, whose elements touch. A *row* is that last dimension: what one head
// has of one token. Rows of a block are numbered head * tokens + token.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PD_BOTH __host__ __device__ __forceinline__
#else
#define PD_BOTH inline __attribute__((always_inline))
#endif
#define PD_INLINED __attribute__((always_inline))  // of a lambda

namespace pd {

// Strides are in bytes.
struct Plane {
  char* base;
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

PD_BOTH char* row_address(const Plane& plane, int64_t block, int64_t head, int64_t token) {
  return plane.base + block * plane.block_stride + head * plane.head_stride +
         token * plane.token_stride;
}

PD_BOTH char* row_address(const Plane& plane, const BlockShape& shape, int64_t block, int64_t row) {
  const int64_t head = row / shape.tokens;
  return row_address(plane, block, head, row - head * shape.tokens);
}

}  // namespace pd
