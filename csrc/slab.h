// Where things lie in a slab, for the CPU and for CUDA.
//
// Packed, a slab is the blocks one after the other, plane by plane, each [heads, tokens, width].
//
// Encoded, it is a stripe for each head of each layer. Tokens are taken in groups of 32, wherever
// the blocks' borders are:
//
//   stripe  tile of group 0 | tile of group 1 | ... | rows of the tail | rows of the sinks
//   tile    zero points | scales | codes, 32 tokens of 2 or 4 bits a channel
//   rows    scales, one for each token and 128 channels | codes, 8 bits a channel
//
// A tile has a zero point and a scale for each channel (by_channel), or for each token and `group`
// channels. The tail is what fills no group; with 8 bits that is everything. Sinks are the first
// tokens of a sequence: they are sent as rows too, and do not count in the ranges of their group.
// Tiles and rows begin at multiples of 16 bytes.
#pragma once

#include "floats.h"

namespace pd {

constexpr int64_t kTokenGroup = 32;
constexpr int64_t kWideChannels = 128;
constexpr int64_t kAlignment = 16;
constexpr int64_t kMaxWidth = 1024;  // of a row that is encoded, in channels

PD_BOTH int64_t aligned(int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

struct Encoding {
  int64_t bits;  // 2, 4 or 8
  bool by_channel;
  int64_t group;  // channels that share a range, unless by_channel
  int64_t sinks;  // tokens
};

struct Stripe {
  int64_t tokens;
  int64_t width;  // channels
  Encoding encoding;

  PD_BOTH int64_t groups() const { return encoding.bits == 8 ? 0 : tokens / kTokenGroup; }
  PD_BOTH int64_t tail_start() const { return groups() * kTokenGroup; }
  PD_BOTH int64_t tail_tokens() const { return tokens - tail_start(); }
  PD_BOTH int64_t sink_tokens() const {
    if (groups() == 0) return 0;
    return encoding.sinks < kTokenGroup ? encoding.sinks : kTokenGroup;
  }

  PD_BOTH uint32_t levels() const { return (1u << encoding.bits) - 1; }  // the largest code
  PD_BOTH int64_t codes_per_byte() const { return 8 / encoding.bits; }
  PD_BOTH int64_t row_codes() const { return width / codes_per_byte(); }  // bytes of a tile's row
  PD_BOTH int64_t ranges() const {                                        // of a tile
    return encoding.by_channel ? width : kTokenGroup * (width / encoding.group);
  }
  PD_BOTH int64_t tile_codes() const { return 4 * ranges(); }  // where a tile's codes begin
  PD_BOTH int64_t tile_bytes() const { return aligned(tile_codes() + kTokenGroup * row_codes()); }

  PD_BOTH int64_t wide_scales() const { return (width + kWideChannels - 1) / kWideChannels; }
  PD_BOTH int64_t wide_codes(int64_t rows) const { return 2 * rows * wide_scales(); }
  PD_BOTH int64_t wide_bytes(int64_t rows) const {
    return aligned(wide_codes(rows) + rows * width);
  }

  PD_BOTH int64_t tile_offset(int64_t index) const { return index * tile_bytes(); }
  PD_BOTH int64_t tail_offset() const { return groups() * tile_bytes(); }
  PD_BOTH int64_t sink_offset() const { return tail_offset() + wide_bytes(tail_tokens()); }
  PD_BOTH int64_t bytes() const { return sink_offset() + wide_bytes(sink_tokens()); }
};

}  // namespace pd
