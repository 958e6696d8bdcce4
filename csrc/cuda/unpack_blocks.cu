#include "block_runs.cuh"

namespace pd {
namespace {

__global__ void unpack(BlockRun run, const char* slab) {
  for_each_head(run, [&](char* rows, int64_t stride, int64_t place) {
    copy_rows(rows, stride, slab + place, run.shape.row_bytes, run.shape);
  });
}

}  // namespace

void unpack_blocks_cuda(const BlockRun& run, const char* slab, void* stream) {
  if (run.num_planes * run.num_blocks * run.block_bytes() == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  unpack<<<grid_of(copying_items(run)), copying_threads(run.shape), 0, on>>>(run, slab);
}

}  // namespace pd
