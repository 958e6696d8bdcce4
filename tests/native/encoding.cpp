#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/codes.h"
#include "../../csrc/cpu/isa.h"
#include "../../csrc/ops.h"
#include "cache.h"
#include "tests.h"

namespace {

std::vector<char> encoded(const Cache& cache) {
  const pd::TokenRun run = cache.run();
  const int64_t items = pd::encoding_items(run), bytes = items * cache.of.stripe().bytes();
  std::vector<char> slab(static_cast<size_t>(bytes), kSentinel);
  // In two shares, as two threads would.
  pd::encode_blocks_cpu(run, cache.of.encoding, slab.data(), 1, items);
  pd::encode_blocks_cpu(run, cache.of.encoding, slab.data(), 0, 1);
  return slab;
}

void decode(const std::vector<char>& slab, const Cache& cache) {
  const pd::TokenRun run = cache.run();
  const int64_t items = pd::encoding_items(run);
  pd::decode_blocks_cpu(run, cache.of.encoding, slab.data(), 1, items);
  pd::decode_blocks_cpu(run, cache.of.encoding, slab.data(), 0, 1);
}

// What lies between the values and in block 0 is as it was.
void require_no_stray_writes(Cache& cache) {
  std::vector<char> sentinel(static_cast<size_t>(pd::bytes_of(cache.of.element)), kSentinel);
  cache.for_each([&](int64_t stripe, int64_t token, int64_t channel) {
    std::copy(sentinel.begin(), sentinel.end(), cache.at(stripe, token, channel));
  });
  for (const std::vector<char>& each : cache.memory) {
    for (const char byte : each) REQUIRE(byte == kSentinel, "%s", cache.of.name().c_str());
  }
}

// What has one scale: some channels of some tokens of a stripe.
struct Area {
  int64_t stripe, first_token, last_token, first_channel, last_channel;

  template <class Visit>
  void for_each(Visit visit) const {
    for (int64_t token = first_token; token < last_token; ++token) {
      for (int64_t channel = first_channel; channel < last_channel; ++channel)
        visit(token, channel);
    }
  }
};

// How far apart a value and the element that it is rounded to may be.
double rounding_error(pd::Element element, double magnitude) {
  switch (element) {
    case pd::Element::kFloat32:
      return std::ldexp(magnitude, -24);
    case pd::Element::kBFloat16:
      return std::ldexp(magnitude, -8);
    default:
      return std::max(std::ldexp(magnitude, -11), std::ldexp(1.0, -25));
  }
}

// Values came back as half a scale and rounding allow. Zero point and scale are what codes.h says
// of the values that count, and are in the slab where slab.h says.
class Checker {
 public:
  Checker(const Cache& cache, const std::vector<char>& slab, const Cache& decoded)
      : cache_(cache), slab_(slab), decoded_(decoded), stripe_(cache.of.stripe()) {}

  void check() const {
    const int64_t sinks = stripe_.sink_tokens(), tail = stripe_.tail_tokens();
    for (int64_t stripe = 0; stripe < Cache::kParts * Cache::kHeads; ++stripe) {
      const int64_t place = stripe * stripe_.bytes();
      for (int64_t group = 0; group < stripe_.groups(); ++group) {
        check_tile(stripe, group, place + stripe_.tile_offset(group));
      }
      check_wide_rows(stripe, 0, sinks, place + stripe_.sink_offset());
      check_wide_rows(stripe, stripe_.tail_start(), tail, place + stripe_.tail_offset());
    }
  }

 private:
  void check_tile(int64_t stripe, int64_t group, int64_t place) const {
    const int64_t first = group * 32, last = first + 32;
    int64_t range = 0;
    if (stripe_.encoding.by_channel) {
      const int64_t sinks = group == 0 && stripe_.sink_tokens() < 32 ? stripe_.sink_tokens() : 0;
      for (int64_t channel = 0; channel < stripe_.width; ++channel) {
        check_range({stripe, first + sinks, last, channel, channel + 1}, place, range++);
      }
      return;
    }
    const int64_t step = stripe_.encoding.group;
    for (int64_t token = first; token < last; ++token) {
      for (int64_t channel = 0; channel < stripe_.width; channel += step) {
        check_range({stripe, token, token + 1, channel, channel + step}, place, range++);
      }
    }
  }

  void check_range(const Area& area, int64_t tile, int64_t index) const {
    float low = cache_.get(area.stripe, area.first_token, area.first_channel), high = low;
    area.for_each([&](int64_t token, int64_t channel) {
      low = std::min(low, cache_.get(area.stripe, token, channel));
      high = std::max(high, cache_.get(area.stripe, token, channel));
    });
    const pd::Range range = pd::narrow_range(low, high, stripe_.levels());
    const uint16_t zero = number(tile + 2 * index);
    const uint16_t scale = number(tile + 2 * (stripe_.ranges() + index));
    REQUIRE(zero == range.zero && scale == range.scale, "%s", cache_.of.name().c_str());
    const float lowest = pd::BFloat16::load(zero);
    REQUIRE(lowest <= low, "%a is above %a", lowest, low);
    check_span(scale, stripe_.levels(), high - lowest);
    area.for_each([&](int64_t token, int64_t channel) {
      if (token >= stripe_.sink_tokens()) check_value(area.stripe, token, channel, scale, zero);
    });
  }

  void check_wide_rows(int64_t stripe, int64_t first, int64_t count, int64_t place) const {
    for (int64_t token = first; token < first + count; ++token) {
      for (int64_t channel = 0; channel < stripe_.width; channel += 128, place += 2) {
        const int64_t end = std::min<int64_t>(channel + 128, stripe_.width);
        const Area area{stripe, token, token + 1, channel, end};
        float largest = 0;
        area.for_each([&](int64_t, int64_t each) {
          largest = std::max(largest, std::fabs(cache_.get(stripe, token, each)));
        });
        const uint16_t scale = number(place);
        REQUIRE(scale == pd::wide_scale(largest), "%s", cache_.of.name().c_str());
        check_span(scale, 127, largest);
        area.for_each([&](int64_t, int64_t each) { check_value(stripe, token, each, scale, 0); });
      }
    }
  }

  // The codes reach as far as the values, and no bfloat16 further.
  void check_span(uint16_t scale, uint32_t levels, double span) const {
    const double reach = static_cast<double>(pd::BFloat16::load(scale)) * levels;
    REQUIRE(
        reach >= span * 0.999999 && reach <= span * 1.008, "%a, not %a: %s", reach, span,
        cache_.of.name().c_str());
  }

  void check_value(
      int64_t stripe, int64_t token, int64_t channel, uint16_t scale, uint16_t zero) const {
    const double value = cache_.get(stripe, token, channel);
    const double back = decoded_.get(stripe, token, channel);
    const double half = pd::BFloat16::load(scale) / 2.0;
    const double magnitude = std::fabs(value) + half;
    const double arithmetic =  // a few operations in float32
        std::ldexp(magnitude + std::fabs(pd::BFloat16::load(zero)), -21);
    const double allowed = half + arithmetic + rounding_error(cache_.of.element, magnitude);
    REQUIRE(
        std::fabs(value - back) <= allowed, "%a became %a, token %d, channel %d: %s", value, back,
        int(token), int(channel), cache_.of.name().c_str());
  }

  uint16_t number(int64_t place) const {
    uint16_t bits;
    std::memcpy(&bits, slab_.data() + place, 2);
    return bits;
  }

  const Cache& cache_;
  const std::vector<char>& slab_;
  const Cache& decoded_;
  pd::Stripe stripe_;
};

using Fill = void (*)(Cache&);

void test_values(const Case& of, Fill fill) {
  Cache cache(of), decoded(of);
  fill(cache);
  const std::vector<char> slab = encoded(cache);
  decode(slab, decoded);
  Checker(cache, slab, decoded).check();
  require_no_stray_writes(decoded);
}

// Also a slab that no encoder has written.
void test_any_bits(const Case& of) {
  Cache cache(of), decoded(of);
  fill_with_any_bits(cache);
  std::vector<char> slab = encoded(cache);
  decode(slab, decoded);
  std::mt19937 random(1);
  for (char& byte : slab) byte = static_cast<char>(random());
  decode(slab, decoded);
  require_no_stray_writes(decoded);
}

void test_instruction_sets(const Case& of, Fill fill) {
  Cache cache(of), decoded(of);
  fill(cache);
  const pd::Isa best = pd::chosen_isa();
  pd::chosen_isa() = pd::Isa::kPlain;
  const std::vector<char> slab = encoded(cache);
  decode(slab, decoded);
  for (const pd::Isa isa : {pd::Isa::kAvx2, pd::Isa::kAvx512}) {
    if (!pd::has_isa(isa)) continue;
    pd::chosen_isa() = isa;
    Cache other(of);
    REQUIRE(encoded(cache) == slab, "set %d, %s", int(isa), of.name().c_str());
    decode(slab, other);
    REQUIRE(other.memory == decoded.memory, "set %d, %s", int(isa), of.name().c_str());
  }
  pd::chosen_isa() = best;
}

std::vector<Case> cases() {
  const std::vector<pd::Encoding> encodings = {
      {2, true, 0, 0}, {4, true, 0, 0}, {2, false, 32, 0}, {4, false, 16, 0}, {8, true, 0, 0}};
  struct Shape {
    int64_t width, tokens, block_tokens, sinks;
    Layout layout;
    int64_t gap, start;
  };
  const std::vector<Shape> shapes = {
      {32, 5, 16, 4, Layout::kHeads, 0, 0},        {64, 96, 16, 4, Layout::kHeads, 3, 1},
      {64, 33, 128, 0, Layout::kTiles, 0, 0},      {96, 70, 5, 40, Layout::kTokens, 0, 3},
      {128, 65, 16, 1, Layout::kTokens, 8, 0},     {128, 129, 128, 0, Layout::kChannels, 0, 0},
      {160, 63, 16, 31, Layout::kTiles, 1, 5},     {192, 32, 16, 32, Layout::kChannels, 2, 1},
      {64, 97, 128, 4, Layout::kKeyTiles, 0, 0},   {80, 63, 16, 7, Layout::kKeyTiles, 2, 1},
      {64, 97, 128, 4, Layout::kValueTiles, 0, 0}, {80, 63, 16, 7, Layout::kValueTiles, 2, 1},
      {80, 63, 32, 7, Layout::kChannels, 1, 0},    {576, 37, 5, 2, Layout::kHeads, 0, 0},
      {64, 0, 16, 4, Layout::kHeads, 0, 0},        {1024, 32, 16, 0, Layout::kTokens, 0, 0}};
  std::vector<Case> all;
  for (const auto element :
       {pd::Element::kFloat32, pd::Element::kBFloat16, pd::Element::kFloat16}) {
    for (const pd::Encoding& each : encodings) {
      for (const Shape& shape : shapes) {
        pd::Encoding encoding = each;
        encoding.group = std::gcd(each.group, shape.width);
        encoding.sinks = shape.sinks;
        all.push_back(
            {element, encoding, shape.width, shape.tokens, shape.block_tokens, shape.layout,
             shape.gap, shape.start});
      }
    }
  }
  return all;
}

}  // namespace

int test_encoding() {
  const std::vector<Case> all = cases();
  for (const Case& each : all) {
    test_values(each, fill_with_values);
    test_values(each, fill_with_largest);
    test_values(each, fill_with_ties);
    test_any_bits(each);
    test_instruction_sets(each, fill_with_any_bits);
    test_instruction_sets(each, fill_with_ties);
  }
  return 6 * static_cast<int>(all.size());
}
