#include "../hash.h"
#include "../ops.h"

namespace pd {
namespace {

constexpr int kThreads = 256;

__device__ uint64_t sum_of_warp(uint64_t value) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, distance);
  }
  return value;
}

// One block of threads hashes one block of KV in one plane.
__global__ void hash_blocks(
    const Plane* planes, BlockShape shape, const int64_t* blocks, int64_t num_blocks,
    uint64_t* sum) {
  const int64_t plane = blockIdx.y;
  const int64_t words_per_row = words_of(shape.row_bytes);
  const int64_t words = shape.rows() * words_per_row;
  uint64_t mine = 0;
  for (int64_t b = blockIdx.x; b < num_blocks; b += gridDim.x) {
    const uint64_t first = static_cast<uint64_t>((plane * num_blocks + b) * words);
    for (int64_t i = threadIdx.x; i < words; i += kThreads) {
      const int64_t row = i / words_per_row;
      const char* const address = row_address(planes[plane], shape, blocks[b], row);
      const uint64_t word = load_word(address, shape.row_bytes, i - row * words_per_row);
      mine += hash_word(word, first + i);
    }
  }
  mine = sum_of_warp(mine);
  if (threadIdx.x % 32 == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(sum), mine);
  }
}

__global__ void finish(uint64_t* sum, uint64_t num_words) { *sum = finish_hash(*sum, num_words); }

}  // namespace

void digest_blocks_cuda(
    const Plane* planes, int64_t num_planes, const BlockShape& shape, const int64_t* blocks,
    int64_t num_blocks, uint64_t* sum, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (num_planes > 0 && num_blocks > 0) {
    const dim3 grid(
        static_cast<unsigned>(num_blocks < 1024 ? num_blocks : 1024),
        static_cast<unsigned>(num_planes));
    hash_blocks<<<grid, kThreads, 0, on>>>(planes, shape, blocks, num_blocks, sum);
  }
  const int64_t words = num_planes * num_blocks * shape.rows() * words_of(shape.row_bytes);
  finish<<<1, 1, 0, on>>>(sum, static_cast<uint64_t>(words));
}

}  // namespace pd
