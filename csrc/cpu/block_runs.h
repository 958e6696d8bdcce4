// What packing and unpacking on the CPU share: which bytes of a block are contiguous.
#pragma once

#include <algorithm>

#include "../ops.h"

namespace pd {

// What is asked for of a block before its turn: the processor finds the rest by itself, but cannot
// guess where a block begins.
constexpr int64_t kPrefetchBytes = 1024;

inline void prefetch(const char* place, int64_t bytes) {
  for (int64_t byte = 0; byte < std::min(bytes, kPrefetchBytes); byte += 64) {
    __builtin_prefetch(place + byte);
  }
}

// Calls copy(rows' address, place in the slab, bytes) for each run of bytes of one block in one
// plane that is contiguous on both sides.
template <class Copy>
void for_each_run(const BlockRun& run, int64_t item, Copy copy) {
  const BlockShape& shape = run.shape;
  const int64_t plane_index = item / run.num_blocks;
  const Plane& plane = run.planes[plane_index];
  const int64_t index = item - plane_index * run.num_blocks;
  const int64_t block = run.blocks[index];
  const int64_t head_bytes = shape.tokens * shape.row_bytes;
  const bool tokens_touch = plane.token_stride == shape.row_bytes || shape.tokens == 1;
  const bool heads_touch = plane.head_stride == head_bytes || shape.heads == 1;
  const int64_t rows = !tokens_touch ? 1 : !heads_touch ? shape.tokens : shape.rows();
  if (index + 1 < run.num_blocks) {
    prefetch(row_address(plane, shape, run.blocks[index + 1], 0), rows * shape.row_bytes);
  }
  int64_t place = item * run.block_bytes();
  for (int64_t row = 0; row < shape.rows(); row += rows) {
    copy(row_address(plane, shape, block, row), place, rows * shape.row_bytes);
    place += rows * shape.row_bytes;
  }
}

}  // namespace pd
