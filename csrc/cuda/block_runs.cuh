// What packing and unpacking on CUDA share. One block of threads copies what one head has of one
// block of KV: threadIdx.x goes along a row, threadIdx.y from row to row.
#pragma once

#include "../ops.h"
#include "launch.cuh"

namespace pd {

PD_BOTH int64_t copying_items(const BlockRun& run) {
  return run.num_planes * run.num_blocks * run.shape.heads;
}

// Threads for each 16 bytes of a row; what is left of 256 takes other rows.
inline dim3 copying_threads(const BlockShape& shape) {
  unsigned along = 1;
  while (along < 32 && 16 * along < shape.row_bytes) along *= 2;
  const int64_t rows = 256 / along;
  return dim3(along, static_cast<unsigned>(shape.tokens < rows ? shape.tokens : rows));
}

template <class Word>
__device__ void copy_words(
    char* to, int64_t to_stride, const char* from, int64_t from_stride, const BlockShape& shape) {
  const int64_t words = shape.row_bytes / static_cast<int64_t>(sizeof(Word));
  for (int64_t row = threadIdx.y; row < shape.tokens; row += blockDim.y) {
    auto* const target = reinterpret_cast<Word*>(to + row * to_stride);
    const auto* const source = reinterpret_cast<const Word*>(from + row * from_stride);
    for (int64_t i = threadIdx.x; i < words; i += blockDim.x) target[i] = source[i];
  }
}

// Copies one head's rows, in the widest words that every row is aligned for on both sides.
__device__ inline void copy_rows(
    char* to, int64_t to_stride, const char* from, int64_t from_stride, const BlockShape& shape) {
  const int64_t all = reinterpret_cast<int64_t>(to) | to_stride | reinterpret_cast<int64_t>(from) |
                      from_stride | shape.row_bytes;
  if (all % 16 == 0) {
    copy_words<uint4>(to, to_stride, from, from_stride, shape);
  } else if (all % 4 == 0) {
    copy_words<uint32_t>(to, to_stride, from, from_stride, shape);
  } else if (all % 2 == 0) {
    copy_words<uint16_t>(to, to_stride, from, from_stride, shape);
  } else {
    copy_words<uint8_t>(to, to_stride, from, from_stride, shape);
  }
}

// Calls copy(first row's address, bytes from row to row, place in the slab) for each head of each
// block that this block of threads is to copy.
template <class Copy>
__device__ void for_each_head(const BlockRun& run, Copy copy) {
  const BlockShape& shape = run.shape;
  for (int64_t item = blockIdx.x; item < copying_items(run); item += gridDim.x) {
    const int64_t block = item / shape.heads;  // counted through all planes
    const int64_t plane_index = block / run.num_blocks;
    const Plane& plane = run.planes[plane_index];
    const int64_t number = run.blocks[block - plane_index * run.num_blocks];
    const int64_t place = item * shape.tokens * shape.row_bytes;
    copy(row_address(plane, number, item - block * shape.heads, 0), plane.token_stride, place);
  }
}

}  // namespace pd
