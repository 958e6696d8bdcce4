#include <type_traits>

#include "../codes.h"
#include "isa.h"
#include "tiles.h"

namespace pd {
namespace {

// Zero point and inverse scale of each channel of a row, for the loop that makes its codes.
struct Ranges {
  alignas(64) float zeros[kMaxWidth];
  alignas(64) float inverses[kMaxWidth];
};

// The codes of one token; byte i of a row has code i of each half or quarter of it.
template <class Floats>
PD_BOTH void put_codes(
    const typename Floats::Type* __restrict row, const Stripe& stripe, const Ranges& ranges,
    uint8_t* __restrict codes) {
  const uint32_t levels = stripe.levels();
  const auto code = [&](int64_t i) PD_INLINED {
    return narrow_code(Floats::load(row[i]), ranges.zeros[i], ranges.inverses[i], levels);
  };
  if (stripe.encoding.bits == 4) {
    const int64_t count = stripe.width / 2;
    for (int64_t i = 0; i < count; ++i) {
      codes[i] = static_cast<uint8_t>(code(i) | code(i + count) << 4);
    }
  } else {
    const int64_t count = stripe.width / 4;
    for (int64_t i = 0; i < count; ++i) {
      codes[i] = static_cast<uint8_t>(
          code(i) | code(i + count) << 2 | code(i + 2 * count) << 4 | code(i + 3 * count) << 6);
    }
  }
}

// `values` has room for a row.
template <class Floats>
PD_BOTH void put_row(
    const typename Floats::Type* __restrict row, const Stripe& stripe, const Ranges& ranges,
    float* __restrict values, uint8_t* codes) {
  if (!std::is_same<Floats, Float16>::value) {
    put_codes<Floats>(row, stripe, ranges, codes);
    return;
  }
  // It takes so many operations to load that several at once find no registers.
  for (int64_t i = 0; i < stripe.width; ++i) values[i] = Floats::load(row[i]);
  put_codes<Float32>(values, stripe, ranges, codes);
}

template <class Floats>
PD_BOTH void extend(
    const typename Floats::Type* __restrict row, int64_t width,
    typename Floats::Order* __restrict low, typename Floats::Order* __restrict high) {
  for (int64_t i = 0; i < width; ++i) {
    const typename Floats::Order order = Floats::order(row[i]);
    low[i] = order < low[i] ? order : low[i];
    high[i] = order > high[i] ? order : high[i];
  }
}

template <class Floats>
PD_BOTH void encode_tile_by_channel(
    const Rows<Floats>& rows, const Stripe& stripe, int64_t first_that_counts, char* tile) {
  using Order = typename Floats::Order;
  Ranges ranges;
  alignas(64) float loaded[kMaxWidth];
  alignas(64) Order low[kMaxWidth];
  alignas(64) Order high[kMaxWidth];
  const int64_t width = stripe.width;
  const auto* const first_row = rows.of[first_that_counts];
  for (int64_t i = 0; i < width; ++i) low[i] = high[i] = Floats::order(first_row[i]);
  for (int64_t t = first_that_counts; t < kTokenGroup; ++t) {
    rows.prefetch_next(t);
    extend<Floats>(rows.of[t], width, low, high);
  }
  auto* const zeros = reinterpret_cast<uint16_t*>(tile);
  auto* const scales = zeros + width;
  for (int64_t i = 0; i < width; ++i) {
    const Range range = narrow_range(Floats::at(low[i]), Floats::at(high[i]), stripe.levels());
    zeros[i] = range.zero;
    scales[i] = range.scale;
    ranges.zeros[i] = BFloat16::load(range.zero);
    ranges.inverses[i] = inverse(BFloat16::load(range.scale));
  }
  auto* codes = reinterpret_cast<uint8_t*>(tile + stripe.tile_codes());
  for (int64_t t = 0; t < kTokenGroup; ++t, codes += stripe.row_codes()) {
    put_row<Floats>(rows.of[t], stripe, ranges, loaded, codes);
  }
}

template <class Floats>
PD_BOTH void encode_tile_by_token(const Rows<Floats>& rows, const Stripe& stripe, char* tile) {
  using Order = typename Floats::Order;
  Ranges ranges;
  alignas(64) float loaded[kMaxWidth];
  const int64_t group = stripe.encoding.group;
  const int64_t groups = stripe.width / group;
  auto* const zeros = reinterpret_cast<uint16_t*>(tile);
  auto* const scales = zeros + stripe.ranges();
  auto* codes = reinterpret_cast<uint8_t*>(tile + stripe.tile_codes());
  for (int64_t t = 0; t < kTokenGroup; ++t, codes += stripe.row_codes()) {
    rows.prefetch_next(t);
    const auto* const values = rows.of[t];
    for (int64_t g = 0; g < groups; ++g) {
      const auto* const part = values + g * group;
      Order low = Floats::order(part[0]), high = low;
      for (int64_t i = 0; i < group; ++i) {
        const Order order = Floats::order(part[i]);
        low = order < low ? order : low;
        high = order > high ? order : high;
      }
      const Range range = narrow_range(Floats::at(low), Floats::at(high), stripe.levels());
      zeros[t * groups + g] = range.zero;
      scales[t * groups + g] = range.scale;
      const float zero = BFloat16::load(range.zero);
      const float inverse_scale = inverse(BFloat16::load(range.scale));
      for (int64_t i = g * group; i < (g + 1) * group; ++i) {
        ranges.zeros[i] = zero;
        ranges.inverses[i] = inverse_scale;
      }
    }
    put_row<Floats>(values, stripe, ranges, loaded, codes);
  }
}

// One row of 8 bits a channel.
template <class Floats>
PD_BOTH void encode_wide_row(
    const typename Floats::Type* __restrict row, const Stripe& stripe, uint16_t* scales,
    uint8_t* __restrict codes) {
  for (int64_t s = 0; s < stripe.wide_scales(); ++s) {
    const int64_t begin = s * kWideChannels;
    const int64_t end = begin + kWideChannels < stripe.width ? begin + kWideChannels : stripe.width;
    typename Floats::Order largest = 0;
    for (int64_t i = begin; i < end; ++i) {
      const typename Floats::Order magnitude = Floats::magnitude(row[i]);
      largest = magnitude > largest ? magnitude : largest;
    }
    scales[s] = wide_scale(Floats::at(largest));
    const float inverse_scale = inverse(BFloat16::load(scales[s]));
    for (int64_t i = begin; i < end; ++i) {
      codes[i] = wide_code(Floats::load(row[i]), inverse_scale);
    }
  }
}

// The first rows of a group as rows of 8 bits a channel: rows `first` on of the `all` at `place`.
template <class Floats>
PD_BOTH void encode_wide_rows(
    const Rows<Floats>& rows, const Stripe& stripe, int64_t first, int64_t count, int64_t all,
    char* place) {
  auto* scales = reinterpret_cast<uint16_t*>(place) + first * stripe.wide_scales();
  auto* codes = reinterpret_cast<uint8_t*>(place + stripe.wide_codes(all)) + first * stripe.width;
  for (int64_t t = 0; t < count; ++t) {
    rows.prefetch_next(t);
    encode_wide_row<Floats>(rows.of[t], stripe, scales, codes);
    scales += stripe.wide_scales();
    codes += stripe.width;
  }
}

template <class Floats>
PD_BOTH void encode_rows(
    const Rows<Floats>& rows, const Stripe& stripe, int64_t group, int64_t count, char* place) {
  if (group >= stripe.groups()) {
    const int64_t first = group * kTokenGroup - stripe.tail_start();
    encode_wide_rows<Floats>(
        rows, stripe, first, count, stripe.tail_tokens(), place + stripe.tail_offset());
    return;
  }
  const int64_t sinks = group == 0 ? stripe.sink_tokens() : 0;
  char* const tile = place + stripe.tile_offset(group);
  if (stripe.encoding.by_channel) {
    // Were all of them sinks, no range would be left.
    encode_tile_by_channel<Floats>(rows, stripe, sinks == kTokenGroup ? 0 : sinks, tile);
  } else {
    encode_tile_by_token<Floats>(rows, stripe, tile);
  }
  encode_wide_rows<Floats>(rows, stripe, 0, sinks, sinks, place + stripe.sink_offset());
}

template <class Floats>
PD_BOTH void encode_runs(
    const TokenRun& run, const Stripe& stripe, char* slab, int64_t first, int64_t last) {
  const Layout layout(run.tiling, sizeof(typename Floats::Type));
  Tile<Floats> tile;
  for_groups(run, first, last, [&](int64_t item, int64_t g, const Group& group) PD_INLINED {
    const Rows<Floats> rows(group, layout, tile);
    move_tile<Floats, true>(group, layout, tile);
    for_known_widths(stripe, [&](const Stripe& known) PD_INLINED {
      encode_rows<Floats>(rows, known, g, group.count(), slab + item * known.bytes());
    });
  });
}

PD_BOTH void encode(
    const TokenRun& run, const Encoding& encoding, char* slab, int64_t first, int64_t last) {
  const Stripe stripe{run.tokens, run.tiling.width, encoding};
  switch (run.element) {
    case Element::kFloat32:
      return encode_runs<Float32>(run, stripe, slab, first, last);
    case Element::kBFloat16:
      return encode_runs<BFloat16>(run, stripe, slab, first, last);
    case Element::kFloat16:
      return encode_runs<Float16>(run, stripe, slab, first, last);
    case Element::kFloat8:  // refused by the bindings
      return;
  }
}

}  // namespace

PD_FOR_EACH_ISA(
    encode_blocks_cpu, encode,
    (const TokenRun& run, const Encoding& encoding, char* slab, int64_t first, int64_t last),
    (run, encoding, slab, first, last))

}  // namespace pd
