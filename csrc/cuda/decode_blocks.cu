#include "tiles.cuh"

namespace pd {
namespace {

// Token t of a tile; see `put_codes`.
template <class Floats>
__device__ void decode_token(
    const Row<Floats>& row, const Stripe& stripe, int t, const char* tile) {
  const auto* const zeros = reinterpret_cast<const uint16_t*>(tile);
  const auto* const scales = zeros + stripe.ranges();
  const int bits = static_cast<int>(stripe.encoding.bits);
  const int count = static_cast<int>(stripe.row_codes());
  const auto* const codes =
      reinterpret_cast<const uint8_t*>(tile + stripe.tile_codes()) + t * count;
  for (int i = lane(); i < count; i += kWarp) {
    const uint32_t byte = codes[i];
    for (int shift = 0, channel = i; shift < 8; shift += bits, channel += count) {
      const int range = range_of(stripe, t, channel);
      const float zero = BFloat16::load(zeros[range]), scale = BFloat16::load(scales[range]);
      row[channel] =
          store_within<Floats>(narrow_value(byte >> shift & stripe.levels(), zero, scale));
    }
  }
}

// Row `index` of the `all` of 8 bits a channel that are at `place`.
template <class Floats>
__device__ void decode_wide_row(
    const Row<Floats>& row, const Stripe& stripe, int64_t index, int64_t all, const char* place) {
  const auto* const scales =
      reinterpret_cast<const uint16_t*>(place) + index * stripe.wide_scales();
  const auto* const codes =
      reinterpret_cast<const int8_t*>(place + stripe.wide_codes(all)) + index * stripe.width;
  for (int i = lane(); i < stripe.width; i += kWarp) {
    const float scale = BFloat16::load(scales[i / static_cast<int>(kWideChannels)]);
    row[i] = store_within<Floats>(wide_value(codes[i], scale));
  }
}

// A warp decodes a token: where it is a sink, from the row that it has as such.
template <class Floats>
__global__ void decode_rows(TokenRun run, Stripe stripe, const char* slab) {
  const int64_t sinks = stripe.sink_tokens(), tail = stripe.tail_tokens();
  const int64_t all = run.num_parts * run.heads * stripe.tokens;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + warp(); i < all; i += step) {
    const int64_t item = i / stripe.tokens, token = i - item * stripe.tokens;
    const char* const place = slab + item * stripe.bytes();
    const Row<Floats> row(place_of(run, item, token), run.tiling);
    if (token < sinks) {
      decode_wide_row(row, stripe, token, sinks, place + stripe.sink_offset());
    } else if (token >= stripe.tail_start()) {
      const int64_t in_tail = token - stripe.tail_start();
      decode_wide_row(row, stripe, in_tail, tail, place + stripe.tail_offset());
    } else {
      const int64_t group = token / kTokenGroup;
      const int t = static_cast<int>(token - group * kTokenGroup);
      decode_token(row, stripe, t, place + stripe.tile_offset(group));
    }
  }
}

template <class Floats>
void decode(const TokenRun& run, const Stripe& stripe, const char* slab, cudaStream_t on) {
  const int64_t rows = run.num_parts * run.heads * stripe.tokens;
  if (rows > 0) decode_rows<Floats><<<grid_of_rows(rows), kThreads, 0, on>>>(run, stripe, slab);
}

}  // namespace

void decode_blocks_cuda(
    const TokenRun& run, const Encoding& encoding, const char* slab, void* stream) {
  const Stripe stripe{run.tokens, run.tiling.width, encoding};
  const auto on = static_cast<cudaStream_t>(stream);
  switch (run.element) {
    case Element::kFloat32:
      return decode<Float32>(run, stripe, slab, on);
    case Element::kBFloat16:
      return decode<BFloat16>(run, stripe, slab, on);
    case Element::kFloat16:
      return decode<Float16>(run, stripe, slab, on);
    case Element::kFloat8:  // refused by the bindings
      return;
  }
}

}  // namespace pd
