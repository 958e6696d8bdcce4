#include "../../csrc/heads.h"

#include <cstring>
#include <vector>

#include "../../csrc/cpu/isa.h"
#include "../../csrc/ops.h"
#include "cache.h"
#include "tests.h"

namespace {

constexpr float kScale = 0.37f;

// The second of three parts in the slab, of which the others have 3 channels and 1.
struct Slab {
  Slab(const pd::TokenRun& run, pd::Element element, const float* scales)
      : place{element, run.tiling.width + 4, 3, scales} {
    const int64_t rows = run.num_parts * run.tokens * run.heads;
    const int64_t size = rows * place.channels * pd::bytes_of(element);
    bytes.resize(static_cast<size_t>(size), kSentinel);
  }

  // What another part has is as it was.
  void require_no_stray_writes(const Case& of) const {
    const auto size = static_cast<size_t>(pd::bytes_of(place.element));
    for (size_t i = 0; i < bytes.size(); ++i) {
      const auto channel = static_cast<int64_t>(i / size) % place.channels;
      if (channel >= 3 && channel < place.channels - 1) continue;
      REQUIRE(bytes[i] == kSentinel, "%s", of.name().c_str());
    }
  }

  pd::HeadSlab place;
  std::vector<char> bytes;
};

// Where the slab has an element, counted from its definition.
char* element_of(Slab& slab, const pd::TokenRun& run, int64_t stripe, int64_t token, int64_t c) {
  const int64_t layer = stripe / run.heads, head = stripe % run.heads;
  const int64_t row = layer * run.tokens * run.heads + token * run.heads + head;
  const int64_t index = row * slab.place.channels + slab.place.first_channel + c;
  return slab.bytes.data() + index * pd::bytes_of(slab.place.element);
}

template <class Converts>
void require_converted(const char* source, const char* target, const Case& of) {
  typename Converts::From::Type from;
  typename Converts::To::Type to;
  std::memcpy(&from, source, sizeof(from));
  const auto expected = Converts::of(from, kScale);
  std::memcpy(&to, target, sizeof(to));
  REQUIRE(std::memcmp(&to, &expected, sizeof(to)) == 0, "%s", of.name().c_str());
}

// In two shares, as two threads would.
template <class Move>
void in_shares(const pd::TokenRun& run, const Move& move) {
  const int64_t items = pd::encoding_items(run);
  move(1, items);
  move(0, 1);
}

// Gathers all tokens of a cache but the first `skipped`, then scatters them into another one.
void test_one(const Case& of, pd::Element in_slab, int64_t skipped) {
  Cache cache(of);
  fill_with_any_bits(cache);
  const std::vector<std::vector<char>> before = cache.memory;
  pd::TokenRun run = cache.run();
  run.skipped = skipped;
  run.tokens -= skipped;
  const std::vector<float> scales(static_cast<size_t>(Cache::kParts), kScale);
  Slab slab(run, in_slab, scales.data());
  in_shares(run, [&](int64_t first, int64_t last) {
    pd::gather_heads_cpu(run, slab.place, slab.bytes.data(), first, last);
  });
  REQUIRE(cache.memory == before, "%s", of.name().c_str());
  slab.require_no_stray_writes(of);
  cache.for_each([&](int64_t stripe, int64_t token, int64_t channel) {
    if (token < skipped) return;
    const char* const there = element_of(slab, run, stripe, token - skipped, channel);
    pd::with_conversion(of.element, in_slab, [&](auto conversion) {
      require_converted<decltype(conversion)>(cache.at(stripe, token, channel), there, of);
    });
  });
  if (!pd::can_convert(in_slab, of.element)) return;
  Cache target(of);
  pd::TokenRun into = run;
  into.parts = target.parts.data();
  in_shares(run, [&](int64_t first, int64_t last) {
    pd::scatter_heads_cpu(into, slab.place, slab.bytes.data(), first, last);
  });
  target.for_each([&](int64_t stripe, int64_t token, int64_t channel) {
    if (token < skipped) return;
    char* const here = target.at(stripe, token, channel);
    const char* const there = element_of(slab, run, stripe, token - skipped, channel);
    pd::with_conversion(in_slab, of.element, [&](auto conversion) {
      require_converted<decltype(conversion)>(there, here, of);
    });
    std::memset(here, kSentinel, static_cast<size_t>(pd::bytes_of(of.element)));
  });
  for (const std::vector<char>& each : target.memory) {
    for (const char byte : each) REQUIRE(byte == kSentinel, "%s", of.name().c_str());
  }
}

std::vector<Case> cases(pd::Element element) {
  struct Shape {
    int64_t width, tokens, block_tokens;
    Layout layout;
    int64_t gap, start;
  };
  const std::vector<Shape> shapes = {
      {32, 5, 16, Layout::kHeads, 0, 0},        {64, 96, 16, Layout::kHeads, 3, 1},
      {7, 70, 5, Layout::kTokens, 0, 3},        {128, 65, 16, Layout::kTokens, 8, 0},
      {128, 129, 128, Layout::kChannels, 0, 0}, {80, 63, 32, Layout::kChannels, 1, 0},
      {64, 33, 128, Layout::kTiles, 0, 0},      {160, 63, 16, Layout::kTiles, 1, 5},
      {64, 97, 128, Layout::kKeyTiles, 0, 0},   {80, 63, 16, Layout::kKeyTiles, 2, 1},
      {64, 97, 128, Layout::kValueTiles, 0, 0}, {80, 63, 16, Layout::kValueTiles, 2, 1},
      {1024, 32, 16, Layout::kTokens, 0, 0},    {64, 0, 16, Layout::kHeads, 0, 0}};
  std::vector<Case> all;
  for (const Shape& shape : shapes) {
    all.push_back(
        {element,
         {8, false, 1, 0},
         shape.width,
         shape.tokens,
         shape.block_tokens,
         shape.layout,
         shape.gap,
         shape.start});
  }
  return all;
}

}  // namespace

int test_heads() {
  constexpr pd::Element kElements[] = {
      pd::Element::kFloat32, pd::Element::kBFloat16, pd::Element::kFloat16, pd::Element::kFloat8};
  const pd::Isa best = pd::chosen_isa();
  int count = 0;
  for (const pd::Isa isa : {pd::Isa::kPlain, pd::Isa::kAvx2, pd::Isa::kAvx512}) {
    if (!pd::has_isa(isa)) continue;
    pd::chosen_isa() = isa;
    for (const pd::Element element : kElements) {
      for (const Case& each : cases(element)) {
        for (const pd::Element in_slab : kElements) {
          if (!pd::can_convert(element, in_slab)) continue;
          for (const int64_t skipped : {int64_t{0}, each.block_tokens - 1}) {
            if (skipped > each.tokens) continue;
            test_one(each, in_slab, skipped);
            ++count;
          }
        }
      }
    }
  }
  pd::chosen_isa() = best;
  return count;
}
