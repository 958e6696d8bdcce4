#include "tiles.cuh"

namespace pd {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

template <class Order>
__device__ Order smallest_of_warp(Order value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const int other = __shfl_xor_sync(kAllLanes, static_cast<int>(value), distance);
    if (other < value) value = static_cast<Order>(other);
  }
  return value;
}

template <class Order>
__device__ Order largest_of_warp(Order value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const int other = __shfl_xor_sync(kAllLanes, static_cast<int>(value), distance);
    if (other > value) value = static_cast<Order>(other);
  }
  return value;
}

struct Tile {
  uint16_t* zeros;
  uint16_t* scales;
  uint8_t* codes;

  __device__ Tile(const Stripe& stripe, char* place)
      : zeros(reinterpret_cast<uint16_t*>(place)),
        scales(zeros + stripe.ranges()),
        codes(reinterpret_cast<uint8_t*>(place + stripe.tile_codes())) {}

  __device__ void put(int range, const Range& value) const {
    zeros[range] = value.zero;
    scales[range] = value.scale;
  }
};

// The codes of a tile's token t, whose ranges are there already; byte i has code i of each half or
// quarter of the row.
template <class Floats>
__device__ void put_codes(const Row<Floats>& row, const Stripe& stripe, int t, const Tile& tile) {
  const int bits = static_cast<int>(stripe.encoding.bits);
  const int count = static_cast<int>(stripe.row_codes());
  for (int i = lane(); i < count; i += kWarp) {
    uint32_t byte = 0;
    for (int shift = 0, channel = i; shift < 8; shift += bits, channel += count) {
      const int range = range_of(stripe, t, channel);
      const float zero = BFloat16::load(tile.zeros[range]);
      const float inverse_scale = inverse(BFloat16::load(tile.scales[range]));
      const float value = Floats::load(row[channel]);
      byte |= narrow_code(value, zero, inverse_scale, stripe.levels()) << shift;
    }
    tile.codes[t * count + i] = static_cast<uint8_t>(byte);
  }
}

template <class Floats>
__device__ void encode_token(const Row<Floats>& row, const Stripe& stripe, int t, char* place) {
  using Order = typename Floats::Order;
  const Tile tile(stripe, place);
  const int width = static_cast<int>(stripe.width);
  const int group = static_cast<int>(stripe.encoding.group);
  for (int first = 0; first < width; first += group) {
    Order low = Floats::order(row[first]), high = low;
    for (int i = first + lane(); i < first + group; i += kWarp) {
      const Order order = Floats::order(row[i]);
      low = order < low ? order : low;
      high = order > high ? order : high;
    }
    const float smallest = Floats::at(smallest_of_warp(low));
    const float largest = Floats::at(largest_of_warp(high));
    if (lane() == 0) {
      const Range range = narrow_range(smallest, largest, stripe.levels());
      tile.put(range_of(stripe, t, first), range);
    }
  }
  __syncwarp();  // every lane reads the ranges
  put_codes(row, stripe, t, tile);
}

// Row `index` of the `all` of 8 bits a channel that are at `place`.
template <class Floats>
__device__ void encode_wide_row(
    const Row<Floats>& row, const Stripe& stripe, int64_t index, int64_t all, char* place) {
  using Order = typename Floats::Order;
  const int width = static_cast<int>(stripe.width), step = static_cast<int>(kWideChannels);
  auto* scales = reinterpret_cast<uint16_t*>(place) + index * stripe.wide_scales();
  auto* const codes =
      reinterpret_cast<uint8_t*>(place + stripe.wide_codes(all)) + index * stripe.width;
  for (int begin = 0; begin < width; begin += step, ++scales) {
    const int end = begin + step < width ? begin + step : width;
    Order largest = 0;
    for (int i = begin + lane(); i < end; i += kWarp) {
      const Order magnitude = Floats::magnitude(row[i]);
      largest = magnitude > largest ? magnitude : largest;
    }
    const uint16_t scale = wide_scale(Floats::at(largest_of_warp(largest)));
    if (lane() == 0) *scales = scale;
    const float inverse_scale = inverse(BFloat16::load(scale));
    for (int i = begin + lane(); i < end; i += kWarp) {
      codes[i] = wide_code(Floats::load(row[i]), inverse_scale);
    }
  }
}

// One block of threads encodes one tile: first its threads take a channel each, then its warps a
// token each.
template <class Floats>
__global__ void encode_tiles_by_channel(TokenRun run, Stripe stripe, char* slab) {
  using Order = typename Floats::Order;
  constexpr int kTokens = static_cast<int>(kTokenGroup);
  __shared__ char* places[kTokens];
  const int64_t groups = stripe.groups(), sinks = stripe.sink_tokens();
  const int64_t tiles = run.num_parts * run.heads * groups;
  for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    const int64_t item = i / groups, group = i - item * groups;
    const Tile tile(stripe, slab + item * stripe.bytes() + stripe.tile_offset(group));
    __syncthreads();  // until here the places of the tile before are in use
    if (warp() == 0) places[lane()] = place_of(run, item, group * kTokenGroup + lane());
    __syncthreads();
    // Were all of them sinks, no range would be left.
    const int uncounted = group == 0 && sinks < kTokens ? static_cast<int>(sinks) : 0;
    for (int channel = threadIdx.x; channel < stripe.width; channel += kThreads) {
      Order low = Floats::order(Row<Floats>(places[uncounted], run.tiling)[channel]), high = low;
      for (int t = uncounted + 1; t < kTokens; ++t) {
        const Order order = Floats::order(Row<Floats>(places[t], run.tiling)[channel]);
        low = order < low ? order : low;
        high = order > high ? order : high;
      }
      tile.put(channel, narrow_range(Floats::at(low), Floats::at(high), stripe.levels()));
    }
    __syncthreads();  // every warp reads the ranges
    for (int t = warp(); t < kTokens; t += kWarps) {
      put_codes(Row<Floats>(places[t], run.tiling), stripe, t, tile);
    }
  }
}

// The tokens of a stripe that a warp encodes: all, or the sinks and the tail.
PD_BOTH int64_t rows_of(const Stripe& stripe) {
  return stripe.encoding.by_channel ? stripe.sink_tokens() + stripe.tail_tokens() : stripe.tokens;
}

template <class Floats>
__global__ void encode_rows(TokenRun run, Stripe stripe, char* slab) {
  const int64_t rows = rows_of(stripe), sinks = stripe.sink_tokens();
  const int64_t all = run.num_parts * run.heads * rows;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + warp(); i < all; i += step) {
    const int64_t item = i / rows, index = i - item * rows;
    const int64_t token = index < sinks ? index : index + stripe.tokens - rows;
    char* const place = slab + item * stripe.bytes();
    const Row<Floats> row(place_of(run, item, token), run.tiling);
    if (token < sinks) {
      encode_wide_row(row, stripe, token, sinks, place + stripe.sink_offset());
    }
    if (token >= stripe.tail_start()) {
      const int64_t in_tail = token - stripe.tail_start();
      encode_wide_row(row, stripe, in_tail, stripe.tail_tokens(), place + stripe.tail_offset());
    } else if (!stripe.encoding.by_channel) {
      const int64_t group = token / kTokenGroup;
      const int t = static_cast<int>(token - group * kTokenGroup);
      encode_token(row, stripe, t, place + stripe.tile_offset(group));
    }
  }
}

template <class Floats>
void encode(const TokenRun& run, const Stripe& stripe, char* slab, cudaStream_t on) {
  const int64_t stripes = run.num_parts * run.heads;
  const int64_t tiles = stripe.encoding.by_channel ? stripes * stripe.groups() : 0;
  const int64_t rows = stripes * rows_of(stripe);
  if (tiles > 0) {
    encode_tiles_by_channel<Floats><<<grid_of(tiles), kThreads, 0, on>>>(run, stripe, slab);
  }
  if (rows > 0) encode_rows<Floats><<<grid_of_rows(rows), kThreads, 0, on>>>(run, stripe, slab);
}

}  // namespace

void encode_blocks_cuda(const TokenRun& run, const Encoding& encoding, char* slab, void* stream) {
  const Stripe stripe{run.tokens, run.tiling.width, encoding};
  const auto on = static_cast<cudaStream_t>(stream);
  switch (run.element) {
    case Element::kFloat32:
      return encode<Float32>(run, stripe, slab, on);
    case Element::kBFloat16:
      return encode<BFloat16>(run, stripe, slab, on);
    case Element::kFloat16:
      return encode<Float16>(run, stripe, slab, on);
    case Element::kFloat8:  // refused by the bindings
      return;
  }
}

}  // namespace pd
