// Planes for the tests of digest_blocks, pack_blocks and unpack_blocks.
#pragma once

#include <vector>

#include "../../csrc/ops.h"
#include "tests.h"

// Bytes between rows and between heads, and before the first row.
struct Gaps {
  int64_t rows, heads, start;
};

// Two planes of 5 blocks, 2 heads and 3 tokens; a run has blocks 4, 0 and 3.
struct Planes {
  static constexpr int64_t kPlanes = 2, kBlocks = 5, kHeads = 2, kTokens = 3;

  Planes(int64_t row_bytes, const Gaps& gaps) : shape{kHeads, kTokens, row_bytes} {
    const int64_t token_stride = row_bytes + gaps.rows;
    const int64_t head_stride = kTokens * token_stride + gaps.heads;
    const pd::Plane plane{nullptr, kHeads * head_stride, head_stride, token_stride};
    const int64_t bytes = gaps.start + kBlocks * plane.block_stride - gaps.heads - gaps.rows;
    memory.resize(kPlanes, std::vector<char>(static_cast<size_t>(bytes), kSentinel));
    for (std::vector<char>& each : memory) {
      planes.push_back(plane);
      planes.back().base = each.data() + gaps.start;
    }
  }
  Planes(const Planes&) = delete;  // `planes` point into `memory`

  pd::BlockRun run() const {
    const auto num_blocks = static_cast<int64_t>(blocks.size());
    return {planes.data(), kPlanes, shape, blocks.data(), num_blocks};
  }

  // Every byte of every row gets a value of its own, as far as a byte has values.
  void number() {
    unsigned value = 1;
    for (int64_t plane = 0; plane < kPlanes; ++plane) {
      for (int64_t block = 0; block < kBlocks; ++block) {
        for (int64_t row = 0; row < shape.rows(); ++row) {
          char* const bytes = pd::row_address(planes[plane], shape, block, row);
          for (int64_t i = 0; i < shape.row_bytes; ++i) bytes[i] = static_cast<char>(value++ % 251);
        }
      }
    }
  }

  // Calls visit(row) in the order of a slab.
  template <class Visit>
  void for_each_row(Visit visit) const {
    for (const pd::Plane& plane : planes) {
      for (const int64_t block : blocks) {
        for (int64_t row = 0; row < shape.rows(); ++row) {
          visit(pd::row_address(plane, shape, block, row));
        }
      }
    }
  }

  pd::BlockShape shape;
  std::vector<int64_t> blocks = {4, 0, 3};
  std::vector<pd::Plane> planes;
  std::vector<std::vector<char>> memory;
};

// Calls test(row_bytes, gaps) for odd sizes and usual ones; returns how often.
template <class Test>
int for_planes(Test test) {
  int cases = 0;
  for (const int64_t row_bytes : {1, 4, 7, 8, 16, 20, 32, 40, 64, 72, 256, 1152}) {
    for (const int64_t rows : {0, 1, 8, 32}) {
      for (const int64_t heads : {0, 3, 16}) {
        for (const int64_t start : {0, 1, 8}) {
          test(row_bytes, Gaps{rows, heads, start});
          ++cases;
        }
      }
    }
  }
  return cases;
}
