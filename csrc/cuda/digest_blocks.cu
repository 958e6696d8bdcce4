#include "../hash.h"
#include "../ops.h"
#include "launch.cuh"

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
__global__ void hash_blocks(BlockRun run, uint64_t* sum) {
  const BlockShape& shape = run.shape;
  const int64_t words_per_row = words_of(shape.row_bytes);
  const int64_t words = shape.rows() * words_per_row;
  uint64_t mine = 0;
  for (int64_t item = blockIdx.x; item < run.num_planes * run.num_blocks; item += gridDim.x) {
    const int64_t plane = item / run.num_blocks;
    const int64_t block = run.blocks[item - plane * run.num_blocks];
    for (int64_t i = threadIdx.x; i < words; i += kThreads) {
      const int64_t row = i / words_per_row;
      const char* const address = row_address(run.planes[plane], shape, block, row);
      const uint64_t word = load_word(address, shape.row_bytes, i - row * words_per_row);
      mine += hash_word(word, static_cast<uint64_t>(item * words + i));
    }
  }
  mine = sum_of_warp(mine);
  if (threadIdx.x % 32 == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(sum), mine);
  }
}

__global__ void finish(uint64_t* sum, uint64_t num_words) { *sum = finish_hash(*sum, num_words); }

}  // namespace

void digest_blocks_cuda(const BlockRun& run, uint64_t* sum, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t items = run.num_planes * run.num_blocks;
  if (items > 0) hash_blocks<<<grid_of(items), kThreads, 0, on>>>(run, sum);
  const int64_t words = items * run.shape.rows() * words_of(run.shape.row_bytes);
  finish<<<1, 1, 0, on>>>(sum, static_cast<uint64_t>(words));
}

}  // namespace pd
