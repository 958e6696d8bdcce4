#include "../ops.h"
#include "head_rows.cuh"

namespace pd {
namespace {

template <class Converts>
__global__ void gather(TokenRun run, HeadSlab place, char* slab) {
  using From = typename Converts::From;
  using To = typename Converts::To::Type;
  const int width = static_cast<int>(run.tiling.width);
  for_each_row(run, place, [&](char* in_block, int64_t in_slab, float scale) {
    if (Converts::kIsCopy && run.tiling.has_rows(sizeof(To))) {
      copy_row(slab + in_slab, in_block, width * static_cast<int>(sizeof(To)));
      return;
    }
    const Row<From> row(in_block, run.tiling);
    auto* const target = reinterpret_cast<To*>(slab + in_slab);
    for (int i = lane(); i < width; i += kWarp) target[i] = Converts::of(row[i], scale);
  });
}

}  // namespace

void gather_heads_cuda(const TokenRun& run, const HeadSlab& place, char* slab, void* stream) {
  const int64_t rows = run.num_parts * run.heads * run.tokens;
  if (rows == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  with_conversion(run.element, place.element, [&](auto conversion) {
    using Converts = decltype(conversion);
    gather<Converts><<<grid_of_rows(rows), kThreads, 0, on>>>(run, place, slab);
  });
}

}  // namespace pd
