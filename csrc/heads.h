// Some heads of some tokens, out of the blocks and as [layers, tokens, heads, channels], for the
// CPU and for CUDA. A head's channels are those of its parts, one after the other.
#pragma once

#include <type_traits>

#include "tiling.h"

namespace pd {

// Where one part of the heads of a run lies in such a slab.
struct HeadSlab {
  Element element;
  int64_t channels;       // of a head, all parts
  int64_t first_channel;  // of this part
  const float* scales;    // of this part in each layer, where values become fp8; else null

  // Where a row begins, in bytes; items are the heads of the run, layer by layer.
  PD_BOTH int64_t place(const TokenRun& run, int64_t item, int64_t token) const {
    const int64_t layer = item / run.heads, head = item - layer * run.heads;
    const int64_t row = (layer * run.tokens + token) * run.heads + head;
    return (row * channels + first_channel) * bytes_of(element);
  }

  PD_BOTH float scale(const TokenRun& run, int64_t item) const {
    return scales == nullptr ? 1.0f : scales[item / run.heads];
  }
};

// From one element type to another. An equal one is copied, bit for bit; what becomes fp8 is
// divided by a scale first.
template <class Source, class Target>
struct Conversion {
  using From = Source;
  using To = Target;
  static constexpr bool kIsCopy = std::is_same<From, To>::value;

  static PD_BOTH typename To::Type of(typename From::Type value, [[maybe_unused]] float scale) {
    if constexpr (kIsCopy) {
      return value;
    } else if constexpr (std::is_same<To, Float8>::value) {
      return To::store(From::load(value) / scale);
    } else {
      return To::store(From::load(value));
    }
  }
};

inline bool can_convert(Element from, Element to) { return from == to || from != Element::kFloat8; }

template <class From, class Work>
inline PD_INLINED void with_conversion_from(Element to, Work work) {
  switch (to) {
    case Element::kFloat32:
      return work(Conversion<From, Float32>());
    case Element::kBFloat16:
      return work(Conversion<From, BFloat16>());
    case Element::kFloat16:
      return work(Conversion<From, Float16>());
    case Element::kFloat8:
      return work(Conversion<From, Float8>());
  }
}

// Calls work(conversion), which is of a type of its own for each pair that can be converted.
template <class Work>
inline PD_INLINED void with_conversion(Element from, Element to, Work work) {
  switch (from) {
    case Element::kFloat32:
      return with_conversion_from<Float32>(to, work);
    case Element::kBFloat16:
      return with_conversion_from<BFloat16>(to, work);
    case Element::kFloat16:
      return with_conversion_from<Float16>(to, work);
    case Element::kFloat8:
      return work(Conversion<Float8, Float8>());
  }
}

}  // namespace pd
