// Enough of CUDA to run csrc/cuda on a CPU. The threads of a block take turns: each runs until it
// has to wait for others, in an order that is another one every time. So a missing barrier shows,
// and a barrier that not all come to ends the program. Blocks run one after the other.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __shared__ static  // one block runs at a time

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned along, unsigned across = 1, unsigned up = 1) : x(along), y(across), z(up) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }

namespace emulated {

// Of the thread that runs.
struct Place {
  dim3 thread{0}, block{0}, threads{1}, grid{1};
};
Place& here();

void launch(dim3 grid, dim3 threads, const std::function<void()>& kernel);

void wait_for_block();
void wait_for_warp();

// The value that another lane of the warp gives; all 32 must be here.
uint64_t exchange(uint64_t mine, unsigned lane);
unsigned lane();

template <class T>
T from_lane(T value, unsigned source) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(value));
  bits = exchange(bits, source);
  memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace emulated

#define threadIdx (emulated::here().thread)
#define blockIdx (emulated::here().block)
#define blockDim (emulated::here().threads)
#define gridDim (emulated::here().grid)

inline void __syncthreads() { emulated::wait_for_block(); }
inline void __syncwarp() { emulated::wait_for_warp(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned distance) {
  return emulated::from_lane(value, emulated::lane() ^ distance);
}

template <class T>
T __shfl_down_sync(unsigned, T value, unsigned distance) {
  const unsigned source = emulated::lane() + distance;
  return emulated::from_lane(value, source < 32 ? source : emulated::lane());
}

inline void atomicAdd(unsigned long long* sum, unsigned long long value) { *sum += value; }
