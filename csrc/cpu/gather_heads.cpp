#include "../ops.h"
#include "convert_rows.h"
#include "tiles.h"

namespace pd {
namespace {

template <class Elements>
void gather(const TokenRun& run, const HeadSlab& place, char* slab, int64_t first, int64_t last) {
  const Layout layout(run.tiling, sizeof(typename Elements::Type));
  Tile<Elements> tile;
  for_groups(run, first, last, [&](int64_t item, int64_t g, const Group& group) PD_INLINED {
    const Rows<Elements> rows(group, layout, tile);
    move_tile<Elements, true>(group, layout, tile);
    const float scale = place.scale(run, item);
    for (int64_t t = 0; t < group.count(); ++t) {
      rows.prefetch_next(t);
      char* const row = slab + place.place(run, item, g * kTokenGroup + t);
      convert_row(
          run.element, place.element, reinterpret_cast<const char*>(rows.of[t]), row, layout.width,
          scale);
    }
  });
}

}  // namespace

void gather_heads_cpu(
    const TokenRun& run, const HeadSlab& place, char* slab, int64_t first, int64_t last) {
  with_element_size(
      run, [&](auto elements) { gather<decltype(elements)>(run, place, slab, first, last); });
}

}  // namespace pd
