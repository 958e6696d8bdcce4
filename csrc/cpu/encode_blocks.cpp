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
PD_BOTH void put_codes(
    const float* __restrict row, const Stripe& stripe, const Ranges& ranges,
    uint8_t* __restrict codes) {
  const uint32_t levels = stripe.levels();
  const auto code = [&](int64_t i) PD_INLINED {
    return narrow_code(row[i], ranges.zeros[i], ranges.inverses[i], levels);
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

PD_BOTH void encode_tile_by_channel(
    const Tile& rows, const Stripe& stripe, int64_t first_that_counts, char* tile) {
  Ranges ranges;
  alignas(64) int32_t low[kMaxWidth];
  alignas(64) int32_t high[kMaxWidth];
  const int64_t width = stripe.width;
  for (int64_t i = 0; i < width; ++i) {
    low[i] = high[i] = Float32::order(rows.row(first_that_counts, width)[i]);
  }
  for (int64_t t = first_that_counts + 1; t < kTokenGroup; ++t) {
    const float* const row = rows.row(t, width);
    for (int64_t i = 0; i < width; ++i) {
      const int32_t order = Float32::order(row[i]);
      low[i] = order < low[i] ? order : low[i];
      high[i] = order > high[i] ? order : high[i];
    }
  }
  auto* const zeros = reinterpret_cast<uint16_t*>(tile);
  auto* const scales = zeros + width;
  for (int64_t i = 0; i < width; ++i) {
    const Range range = narrow_range(Float32::at(low[i]), Float32::at(high[i]), stripe.levels());
    zeros[i] = range.zero;
    scales[i] = range.scale;
    ranges.zeros[i] = BFloat16::load(range.zero);
    ranges.inverses[i] = inverse(BFloat16::load(range.scale));
  }
  auto* codes = reinterpret_cast<uint8_t*>(tile + stripe.tile_codes());
  for (int64_t t = 0; t < kTokenGroup; ++t, codes += stripe.row_codes()) {
    put_codes(rows.row(t, width), stripe, ranges, codes);
  }
}

PD_BOTH void encode_tile_by_token(const Tile& rows, const Stripe& stripe, char* tile) {
  Ranges ranges;
  const int64_t group = stripe.encoding.group;
  const int64_t groups = stripe.width / group;
  auto* const zeros = reinterpret_cast<uint16_t*>(tile);
  auto* const scales = zeros + stripe.ranges();
  auto* codes = reinterpret_cast<uint8_t*>(tile + stripe.tile_codes());
  for (int64_t t = 0; t < kTokenGroup; ++t, codes += stripe.row_codes()) {
    const float* const row = rows.row(t, stripe.width);
    for (int64_t g = 0; g < groups; ++g) {
      const float* const part = row + g * group;
      int32_t low = Float32::order(part[0]), high = low;
      for (int64_t i = 0; i < group; ++i) {
        const int32_t order = Float32::order(part[i]);
        low = order < low ? order : low;
        high = order > high ? order : high;
      }
      const Range range = narrow_range(Float32::at(low), Float32::at(high), stripe.levels());
      zeros[t * groups + g] = range.zero;
      scales[t * groups + g] = range.scale;
      const float zero = BFloat16::load(range.zero);
      const float inverse_scale = inverse(BFloat16::load(range.scale));
      for (int64_t i = g * group; i < (g + 1) * group; ++i) {
        ranges.zeros[i] = zero;
        ranges.inverses[i] = inverse_scale;
      }
    }
    put_codes(row, stripe, ranges, codes);
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

// The tokens of a group as rows of 8 bits a channel: rows `first` on of the `all` at `place`.
PD_BOTH void encode_wide_rows(
    const TokenRun& run, const TokenPlaces& places, const Stripe& stripe, int64_t first,
    int64_t count, int64_t all, Tile& copy, char* place) {
  auto* scales = reinterpret_cast<uint16_t*>(place) + first * stripe.wide_scales();
  auto* codes = reinterpret_cast<uint8_t*>(place + stripe.wide_codes(all)) + first * stripe.width;
  for_rows(run, places, stripe.width, count, copy, [&](auto floats, auto* row) PD_INLINED {
    encode_wide_row<decltype(floats)>(row, stripe, scales, codes);
    scales += stripe.wide_scales();
    codes += stripe.width;
  });
}

PD_BOTH void encode_stripe(
    const TokenRun& run, const Stripe& stripe, const PartPlane& part, int64_t head, Tile& rows,
    char* place) {
  const int64_t sinks = stripe.sink_tokens(), tail = stripe.tail_tokens();
  for (int64_t g = 0; g < stripe.groups(); ++g) {
    const TokenPlaces places(run, part, head, g * kTokenGroup);
    load_tile(run, places, stripe.width, rows);
    char* const tile = place + stripe.tile_offset(g);
    if (stripe.encoding.by_channel) {
      // Were all of them sinks, no range would be left.
      const bool counts_all = g > 0 || sinks == kTokenGroup;
      encode_tile_by_channel(rows, stripe, counts_all ? 0 : sinks, tile);
    } else {
      encode_tile_by_token(rows, stripe, tile);
    }
    if (g == 0) {
      encode_wide_rows(run, places, stripe, 0, sinks, sinks, rows, place + stripe.sink_offset());
    }
  }
  for (int64_t t = 0; t < tail; t += kTokenGroup) {
    const TokenPlaces places(run, part, head, stripe.tail_start() + t);
    encode_wide_rows(
        run, places, stripe, t, places.count, tail, rows, place + stripe.tail_offset());
  }
}

PD_BOTH void encode(
    const TokenRun& run, const Encoding& encoding, char* slab, int64_t first, int64_t last) {
  const Stripe whole{run.tokens, run.tiling.width, encoding};
  Tile rows;  // one for all shapes: it is large
  for_known_shapes(whole, [&](const Stripe& stripe) PD_INLINED {
    for (int64_t item = first; item < last; ++item) {
      const int64_t index = item / run.heads;
      const int64_t head = item - index * run.heads;
      encode_stripe(run, stripe, run.parts[index], head, rows, slab + item * stripe.bytes());
    }
  });
}

}  // namespace

PD_FOR_EACH_ISA(
    encode_blocks_cpu, encode,
    (const TokenRun& run, const Encoding& encoding, char* slab, int64_t first, int64_t last),
    (run, encoding, slab, first, last))

}  // namespace pd
