#include "../ops.h"
#include "convert_rows.h"
#include "tiles.h"

namespace pd {
namespace {

template <class Elements>
void scatter(
    const TokenRun& run, const HeadSlab& place, const char* slab, int64_t first, int64_t last) {
  const Layout layout(run.tiling, sizeof(typename Elements::Type));
  Tile<Elements> tile;
  for_groups(run, first, last, [&](int64_t item, int64_t g, const Group& group) PD_INLINED {
    const Rows<Elements> rows(group, layout, tile);
    const float scale = place.scale(run, item);
    for (int64_t t = 0; t < group.count(); ++t) {
      rows.prefetch_next(t);
      const char* const row = slab + place.place(run, item, g * kTokenGroup + t);
      convert_row(
          place.element, run.element, row, reinterpret_cast<char*>(rows.of[t]), layout.width,
          scale);
    }
    move_tile<Elements, false>(group, layout, tile);
  });
}

}  // namespace

void scatter_heads_cpu(
    const TokenRun& run, const HeadSlab& place, const char* slab, int64_t first, int64_t last) {
  with_element_size(
      run, [&](auto elements) { scatter<decltype(elements)>(run, place, slab, first, last); });
}

}  // namespace pd
