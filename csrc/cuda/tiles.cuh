// What encoding and decoding on CUDA share: a warp works on one token, its lanes on the channels.
// Channels and ranges are counted in 32 bits, which divide faster than 64.
#pragma once

#include "../codes.h"
#include "../ops.h"
#include "launch.cuh"

namespace pd {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp() { return static_cast<int>(threadIdx.x) / kWarp; }

// Blocks of threads for so many rows.
inline unsigned grid_of_rows(int64_t rows) { return grid_of((rows + kWarps - 1) / kWarps); }

// The channels of one token in one head, wherever they are.
template <class Floats>
class Row {
 public:
  using Type = typename Floats::Type;

  __device__ Row(char* place, const Tiling& tiling)
      : place_(place), tiling_(tiling), side_by_side_(tiling.has_rows(sizeof(Type))) {}

  __device__ Type& operator[](int channel) const {
    if (side_by_side_) return reinterpret_cast<Type*>(place_)[channel];
    return *reinterpret_cast<Type*>(place_ + tiling_.channel_offset(channel));
  }

 private:
  char* place_;
  const Tiling& tiling_;
  bool side_by_side_;
};

// Where a token of stripe `item` begins.
__device__ inline char* place_of(const TokenRun& run, int64_t item, int64_t token) {
  const int64_t part = item / run.heads;
  return run.token_address(run.parts[part], item - part * run.heads, token);
}

// Which of a tile's ranges is that of a channel of its token t.
__device__ inline int range_of(const Stripe& stripe, int t, int channel) {
  if (stripe.encoding.by_channel) return channel;
  const int group = static_cast<int>(stripe.encoding.group);
  return t * (static_cast<int>(stripe.width) / group) + channel / group;
}

}  // namespace pd
