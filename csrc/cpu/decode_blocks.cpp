#include "../codes.h"
#include "isa.h"
#include "tiles.h"

namespace pd {
namespace {

// Zero point and scale of each channel of a row.
struct Ranges {
  alignas(64) float zeros[kMaxWidth];
  alignas(64) float scales[kMaxWidth];
};

// The values of one token; see `put_codes`.
template <int64_t kBits>
PD_BOTH void put_values(
    const uint8_t* __restrict codes, const Stripe& stripe, const Ranges& ranges,
    float* __restrict values) {
  constexpr uint32_t kLevels = (1u << kBits) - 1;
  const int64_t count = stripe.width * kBits / 8;
  for (int64_t part = 0; part < 8 / kBits; ++part) {
    const int64_t first = part * count;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t code = static_cast<uint32_t>(codes[i]) >> (part * kBits) & kLevels;
      values[first + i] = narrow_value(code, ranges.zeros[first + i], ranges.scales[first + i]);
    }
  }
}

template <class Floats>
PD_BOTH void store_row(
    const float* __restrict values, int64_t width, typename Floats::Type* __restrict row) {
  for (int64_t i = 0; i < width; ++i) row[i] = store_within<Floats>(values[i]);
}

template <class Floats>
PD_BOTH void decode_tile(const char* tile, const Stripe& stripe, const Rows<Floats>& rows) {
  Ranges ranges;
  alignas(64) float values[kMaxWidth];
  const auto* zeros = reinterpret_cast<const uint16_t*>(tile);
  const auto* scales = zeros + stripe.ranges();
  const auto* codes = reinterpret_cast<const uint8_t*>(tile + stripe.tile_codes());
  const bool by_channel = stripe.encoding.by_channel;
  const int64_t group = by_channel ? 1 : stripe.encoding.group;
  const int64_t groups = stripe.width / group;
  for (int64_t t = 0; t < kTokenGroup; ++t, codes += stripe.row_codes()) {
    for (int64_t g = 0; g < groups && (t == 0 || !by_channel); ++g) {
      const float zero = BFloat16::load(*zeros++), scale = BFloat16::load(*scales++);
      for (int64_t i = g * group; i < (g + 1) * group; ++i) {
        ranges.zeros[i] = zero;
        ranges.scales[i] = scale;
      }
    }
    rows.prefetch_next(t);
    if (stripe.encoding.bits == 4) {
      put_values<4>(codes, stripe, ranges, values);
    } else {
      put_values<2>(codes, stripe, ranges, values);
    }
    store_row<Floats>(values, stripe.width, rows.of[t]);
  }
}

PD_BOTH void put_wide_values(
    const int8_t* __restrict codes, int64_t count, float scale, float* __restrict values) {
  for (int64_t i = 0; i < count; ++i) values[i] = wide_value(codes[i], scale);
}

// Rows `first` to `first + count` of `all`, into the first rows of a group.
template <class Floats>
PD_BOTH void decode_wide_rows(
    const char* place, const Stripe& stripe, int64_t first, int64_t count, int64_t all,
    const Rows<Floats>& rows) {
  const int64_t width = stripe.width, num_scales = stripe.wide_scales();
  const auto* const scales = reinterpret_cast<const uint16_t*>(place);
  const auto* const codes = reinterpret_cast<const int8_t*>(place + stripe.wide_codes(all));
  alignas(64) float values[kMaxWidth];
  for (int64_t t = 0; t < count; ++t) {
    rows.prefetch_next(t);
    const int8_t* const from = codes + (first + t) * width;
    for (int64_t s = 0; s < num_scales; ++s) {
      const int64_t begin = s * kWideChannels;
      const int64_t end = begin + kWideChannels < width ? begin + kWideChannels : width;
      const float scale = BFloat16::load(scales[(first + t) * num_scales + s]);
      put_wide_values(from + begin, end - begin, scale, values + begin);
    }
    store_row<Floats>(values, width, rows.of[t]);
  }
}

template <class Floats>
PD_BOTH void decode_rows(
    const char* place, const Stripe& stripe, int64_t group, int64_t count,
    const Rows<Floats>& rows) {
  if (group >= stripe.groups()) {
    const int64_t first = group * kTokenGroup - stripe.tail_start();
    decode_wide_rows<Floats>(
        place + stripe.tail_offset(), stripe, first, count, stripe.tail_tokens(), rows);
    return;
  }
  decode_tile<Floats>(place + stripe.tile_offset(group), stripe, rows);
  const int64_t sinks = group == 0 ? stripe.sink_tokens() : 0;
  decode_wide_rows<Floats>(place + stripe.sink_offset(), stripe, 0, sinks, sinks, rows);
}

template <class Floats>
PD_BOTH void decode_runs(
    const TokenRun& run, const Stripe& stripe, const char* slab, int64_t first, int64_t last) {
  const Layout layout(run.tiling, sizeof(typename Floats::Type));
  Tile<Floats> tile;
  for_groups(run, first, last, [&](int64_t item, int64_t g, const Group& group) PD_INLINED {
    const Rows<Floats> rows(group, layout, tile);
    for_known_widths(stripe, [&](const Stripe& known) PD_INLINED {
      decode_rows<Floats>(slab + item * known.bytes(), known, g, group.count(), rows);
    });
    move_tile<Floats, false>(group, layout, tile);
  });
}

PD_BOTH void decode(
    const TokenRun& run, const Encoding& encoding, const char* slab, int64_t first, int64_t last) {
  const Stripe stripe{run.tokens, run.tiling.width, encoding};
  switch (run.element) {
    case Element::kFloat32:
      return decode_runs<Float32>(run, stripe, slab, first, last);
    case Element::kBFloat16:
      return decode_runs<BFloat16>(run, stripe, slab, first, last);
    case Element::kFloat16:
      return decode_runs<Float16>(run, stripe, slab, first, last);
    case Element::kFloat8:  // refused by the bindings
      return;
  }
}

}  // namespace

PD_FOR_EACH_ISA(
    decode_blocks_cpu, decode,
    (const TokenRun& run, const Encoding& encoding, const char* slab, int64_t first, int64_t last),
    (run, encoding, slab, first, last))

}  // namespace pd
