#include "../ops.h"
#include "head_rows.cuh"

namespace pd {
namespace {

template <class Converts>
__global__ void scatter(TokenRun run, HeadSlab place, const char* slab) {
  using From = typename Converts::From::Type;
  using To = typename Converts::To;
  const int width = static_cast<int>(run.tiling.width);
  for_each_row(run, place, [&](char* in_block, int64_t in_slab, float scale) {
    if (Converts::kIsCopy && run.tiling.has_rows(sizeof(From))) {
      copy_row(in_block, slab + in_slab, width * static_cast<int>(sizeof(From)));
      return;
    }
    const Row<To> row(in_block, run.tiling);
    const auto* const source = reinterpret_cast<const From*>(slab + in_slab);
    for (int i = lane(); i < width; i += kWarp) row[i] = Converts::of(source[i], scale);
  });
}

}  // namespace

void scatter_heads_cuda(
    const TokenRun& run, const HeadSlab& place, const char* slab, void* stream) {
  const int64_t rows = run.num_parts * run.heads * run.tokens;
  if (rows == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  with_conversion(place.element, run.element, [&](auto conversion) {
    using Converts = decltype(conversion);
    scatter<Converts><<<grid_of_rows(rows), kThreads, 0, on>>>(run, place, slab);
  });
}

}  // namespace pd
