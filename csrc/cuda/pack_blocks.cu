#include "block_runs.cuh"

namespace pd {
namespace {

__global__ void pack(BlockRun run, char* slab) {
  for_each_head(run, [&](const char* rows, int64_t stride, int64_t place) {
    copy_rows(slab + place, run.shape.row_bytes, rows, stride, run.shape);
  });
}

}  // namespace

void pack_blocks_cuda(const BlockRun& run, char* slab, void* stream) {
  if (run.num_planes * run.num_blocks * run.block_bytes() == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  pack<<<grid_of(copying_items(run)), copying_threads(run.shape), 0, on>>>(run, slab);
}

}  // namespace pd
