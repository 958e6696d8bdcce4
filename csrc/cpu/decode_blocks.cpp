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
    float* __restrict row) {
  constexpr uint32_t kLevels = (1u << kBits) - 1;
  const int64_t count = stripe.width * kBits / 8;
  for (int64_t part = 0; part < 8 / kBits; ++part) {
    const int64_t first = part * count;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t code = static_cast<uint32_t>(codes[i]) >> (part * kBits) & kLevels;
      row[first + i] = narrow_value(code, ranges.zeros[first + i], ranges.scales[first + i]);
    }
  }
}

PD_BOTH void decode_tile(const char* tile, const Stripe& stripe, Tile& rows) {
  Ranges ranges;
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
    float* const row = rows.row(t, stripe.width);
    if (stripe.encoding.bits == 4) {
      put_values<4>(codes, stripe, ranges, row);
    } else {
      put_values<2>(codes, stripe, ranges, row);
    }
  }
}

// Rows `first` to `first + count` of `all`, into the first rows of a tile.
PD_BOTH void decode_wide_rows(
    const char* place, const Stripe& stripe, int64_t first, int64_t count, int64_t all,
    Tile& rows) {
  const int64_t width = stripe.width, num_scales = stripe.wide_scales();
  const auto* const scales = reinterpret_cast<const uint16_t*>(place);
  const auto* const codes = reinterpret_cast<const int8_t*>(place + stripe.wide_codes(all));
  for (int64_t t = 0; t < count; ++t) {
    float* const row = rows.row(t, width);
    const int8_t* const from = codes + (first + t) * width;
    for (int64_t s = 0; s < num_scales; ++s) {
      const int64_t begin = s * kWideChannels;
      const int64_t end = begin + kWideChannels < width ? begin + kWideChannels : width;
      const float scale = BFloat16::load(scales[(first + t) * num_scales + s]);
      for (int64_t i = begin; i < end; ++i) row[i] = wide_value(from[i], scale);
    }
  }
}

PD_BOTH void decode_stripe(
    const TokenRun& run, const Stripe& stripe, const PartPlane& part, int64_t head, Tile& rows,
    const char* place) {
  const int64_t sinks = stripe.sink_tokens(), tail = stripe.tail_tokens();
  for (int64_t g = 0; g < stripe.groups(); ++g) {
    decode_tile(place + stripe.tile_offset(g), stripe, rows);
    if (g == 0) decode_wide_rows(place + stripe.sink_offset(), stripe, 0, sinks, sinks, rows);
    const TokenPlaces places(run, part, head, g * kTokenGroup);
    store_tile(run, places, stripe.width, rows);
  }
  for (int64_t t = 0; t < tail; t += kTokenGroup) {
    const TokenPlaces places(run, part, head, stripe.tail_start() + t);
    decode_wide_rows(place + stripe.tail_offset(), stripe, t, places.count, tail, rows);
    store_tile(run, places, stripe.width, rows);
  }
}

PD_BOTH void decode(
    const TokenRun& run, const Encoding& encoding, const char* slab, int64_t first, int64_t last) {
  const Stripe whole{run.tokens, run.tiling.width, encoding};
  Tile rows;  // one for all shapes: it is large
  for_known_shapes(whole, [&](const Stripe& stripe) PD_INLINED {
    for (int64_t item = first; item < last; ++item) {
      const int64_t index = item / run.heads;
      const int64_t head = item - index * run.heads;
      decode_stripe(run, stripe, run.parts[index], head, rows, slab + item * stripe.bytes());
    }
  });
}

}  // namespace

PD_FOR_EACH_ISA(
    decode_blocks_cpu, decode,
    (const TokenRun& run, const Encoding& encoding, const char* slab, int64_t first, int64_t last),
    (run, encoding, slab, first, last))

}  // namespace pd
