// How many blocks of threads a kernel gets.
#pragma once

#include <cstdint>

namespace pd {

// Enough to fill any GPU. Kernels go through their items in steps of the grid's size, so that the
// number of items has no limit.
constexpr int64_t kMaxGrid = 4096;

inline unsigned grid_of(int64_t items) {
  return static_cast<unsigned>(items < kMaxGrid ? items : kMaxGrid);
}

}  // namespace pd
