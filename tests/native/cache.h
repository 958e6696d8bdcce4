// KV caches for the tests of encode_blocks and decode_blocks, and what they are filled with.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/codes.h"
#include "../../csrc/ops.h"
#include "tests.h"

// How the elements of a block lie: [heads, tokens, channels], [tokens, heads, channels], [heads,
// channels, tokens], or in tiles: [heads, tiles of tokens, tiles of channels, tokens, channels], as
// a matrix unit wants keys, and values, of which a tile is [channels, tokens].
enum class Layout { kHeads, kTokens, kChannels, kTiles, kKeyTiles, kValueTiles };

struct Case {
  pd::Element element;
  pd::Encoding encoding;
  int64_t width, tokens, block_tokens;
  Layout layout;
  int64_t gap, start;  // elements after each row, and before the first

  std::string name() const {
    char text[200];
    std::snprintf(
        text, sizeof(text),
        "element %d, %d bits, by channel %d, group %d, %d sinks, %d wide, %d tokens in blocks of "
        "%d, layout %d, gap %d",
        int(element), int(encoding.bits), int(encoding.by_channel), int(encoding.group),
        int(encoding.sinks), int(width), int(tokens), int(block_tokens), int(layout), int(gap));
    return text;
  }
  pd::Stripe stripe() const { return {tokens, width, encoding}; }
};

// Two parts of a KV cache with two heads. A run has all blocks but block 0, the last one first.
struct Cache {
  static constexpr int64_t kParts = 2, kHeads = 2;

  explicit Cache(const Case& of) : of(of) {
    const int64_t size = pd::bytes_of(of.element), tokens = of.block_tokens, width = of.width;
    const int64_t num_blocks = (of.tokens + tokens - 1) / tokens;
    for (int64_t i = num_blocks; i > 0; --i) blocks.push_back(i);
    tiling = {tokens, width, tokens, width, 0, 0, 0, size};
    pd::PartPlane part{nullptr, 0, 0};
    switch (of.layout) {
      case Layout::kHeads:
        tiling.token_stride = (width + of.gap) * size;
        part.head_stride = tokens * tiling.token_stride;
        part.block_stride = kHeads * part.head_stride;
        break;
      case Layout::kTokens:
        part.head_stride = (width + of.gap) * size;
        tiling.token_stride = kHeads * part.head_stride;
        part.block_stride = tokens * tiling.token_stride;
        break;
      case Layout::kChannels:
        tiling.token_stride = size;
        tiling.channel_stride = (tokens + of.gap) * size;
        part.head_stride = width * tiling.channel_stride;
        part.block_stride = kHeads * part.head_stride;
        break;
      case Layout::kTiles:
      case Layout::kKeyTiles:
        tiling.token_tile = of.layout == Layout::kKeyTiles ? 16 : tokens % 4 == 0 ? 4 : 1;
        tiling.channel_tile = 2;
        tiling.token_stride = 2 * size;
        tiling.channel_tile_stride = tiling.token_tile * tiling.token_stride + of.gap * size;
        tiling.token_tile_stride = width / 2 * tiling.channel_tile_stride;
        part.head_stride = tokens / tiling.token_tile * tiling.token_tile_stride;
        part.block_stride = kHeads * part.head_stride;
        break;
      case Layout::kValueTiles:
        tiling.token_tile = 2;
        tiling.channel_tile = 16;
        tiling.token_stride = size;
        tiling.channel_stride = 2 * size;
        tiling.token_tile_stride = 32 * size;
        tiling.channel_tile_stride = tokens / 2 * tiling.token_tile_stride + of.gap * size;
        part.head_stride = width / 16 * tiling.channel_tile_stride;
        part.block_stride = kHeads * part.head_stride;
        break;
    }
    const int64_t bytes = of.start * size + num_blocks * part.block_stride +
                          (kHeads - 1) * part.head_stride + tiling.token_offset(tokens - 1) +
                          tiling.channel_offset(width - 1) + size;
    memory.resize(kParts, std::vector<char>(static_cast<size_t>(bytes), kSentinel));
    for (std::vector<char>& each : memory) {
      parts.push_back(part);
      parts.back().base = each.data() + of.start * size;
    }
  }
  Cache(const Cache&) = delete;  // `parts` point into `memory`

  pd::TokenRun run() const {
    const auto num_blocks = static_cast<int64_t>(blocks.size());
    return {parts.data(), kParts, kHeads, of.element, tiling, blocks.data(), num_blocks, of.tokens};
  }

  char* at(int64_t stripe, int64_t token, int64_t channel) const {
    const pd::PartPlane& part = parts[static_cast<size_t>(stripe / kHeads)];
    const int64_t block = blocks[static_cast<size_t>(token / of.block_tokens)];
    const int64_t in_block = token % of.block_tokens;
    return part.base + block * part.block_stride + stripe % kHeads * part.head_stride +
           in_block / tiling.token_tile * tiling.token_tile_stride +
           in_block % tiling.token_tile * tiling.token_stride +
           channel / tiling.channel_tile * tiling.channel_tile_stride +
           channel % tiling.channel_tile * tiling.channel_stride;
  }

  template <class Floats>
  float get_as(int64_t stripe, int64_t token, int64_t channel) const {
    typename Floats::Type element;
    std::memcpy(&element, at(stripe, token, channel), sizeof(element));
    return Floats::load(element);
  }

  float get(int64_t stripe, int64_t token, int64_t channel) const {
    switch (of.element) {
      case pd::Element::kFloat32:
        return get_as<pd::Float32>(stripe, token, channel);
      case pd::Element::kBFloat16:
        return get_as<pd::BFloat16>(stripe, token, channel);
      default:
        return get_as<pd::Float16>(stripe, token, channel);
    }
  }

  template <class Floats>
  void put_as(int64_t stripe, int64_t token, int64_t channel, float value) {
    const typename Floats::Type element = Floats::store(value);
    std::memcpy(at(stripe, token, channel), &element, sizeof(element));
  }

  void put(int64_t stripe, int64_t token, int64_t channel, float value) {
    switch (of.element) {
      case pd::Element::kFloat32:
        return put_as<pd::Float32>(stripe, token, channel, value);
      case pd::Element::kBFloat16:
        return put_as<pd::BFloat16>(stripe, token, channel, value);
      default:
        return put_as<pd::Float16>(stripe, token, channel, value);
    }
  }

  // Calls visit(stripe, token, channel) for every value of the run.
  template <class Visit>
  void for_each(Visit visit) const {
    for (int64_t stripe = 0; stripe < kParts * kHeads; ++stripe) {
      for (int64_t token = 0; token < of.tokens; ++token) {
        for (int64_t channel = 0; channel < of.width; ++channel) visit(stripe, token, channel);
      }
    }
  }

  Case of;
  std::vector<int64_t> blocks;
  pd::Tiling tiling;
  std::vector<pd::PartPlane> parts;
  std::vector<std::vector<char>> memory;
};

// Channels differ in magnitude and in sign, some have always the same value or zeros of both signs,
// and sinks are far off.
inline void fill_with_values(Cache& cache) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  cache.for_each([&](int64_t stripe, int64_t token, int64_t channel) {
    const float magnitude = std::exp2(static_cast<float>(channel % 7 - 3));
    const float middle = static_cast<float>(channel % 3 - 1) * 2 * magnitude;
    float value = middle + magnitude * normal(random);
    if (channel % 16 == 5) value = 0.3f;
    if (channel % 16 == 6) value = -0.0f;
    if (channel % 16 == 7) value = token % 2 == 0 ? 0.0f : -0.0f;
    if (token < cache.of.encoding.sinks) value *= 100;
    cache.put(stripe, token, channel, value);
  });
}

// Up to the largest of the type: half a scale more would be an infinity.
inline void fill_with_largest(Cache& cache) {
  std::mt19937 random(1);
  std::uniform_real_distribution<float> below(0.98f, 1.0f);
  float largest = pd::Float32::kLargest;
  if (cache.of.element == pd::Element::kBFloat16) largest = pd::BFloat16::kLargest;
  if (cache.of.element == pd::Element::kFloat16) largest = pd::Float16::kLargest;
  cache.for_each([&](int64_t stripe, int64_t token, int64_t channel) {
    cache.put(stripe, token, channel, random() % 4 == 0 ? largest : below(random) * largest);
  });
}

// Multiples of half the scale, which is 3: fusing a multiplication with an addition rounds them
// another way.
inline void fill_with_ties(Cache& cache) {
  std::mt19937 random(1);
  const uint32_t halves = cache.of.encoding.bits == 8 ? 254 : 2 * cache.of.stripe().levels();
  cache.for_each([&](int64_t stripe, int64_t token, int64_t channel) {
    const bool is_highest = channel % 16 == 0 || random() % 16 == 0;
    const auto count = is_highest ? halves : static_cast<uint32_t>(random() % (halves + 1));
    cache.put(stripe, token, channel, 1.5f * static_cast<float>(count));
  });
}

// Infinities, NaNs, numbers of every magnitude: any bits.
inline void fill_with_any_bits(Cache& cache) {
  std::mt19937 random(1);
  const auto size = static_cast<size_t>(pd::bytes_of(cache.of.element));
  cache.for_each([&](int64_t stripe, int64_t token, int64_t channel) {
    auto bits = static_cast<uint32_t>(random());
    if (random() % 16 == 0) bits |= 0x7f807f80u;  // exponents of infinities and NaNs
    std::memcpy(cache.at(stripe, token, channel), &bits, size);
  });
}
