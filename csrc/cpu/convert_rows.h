// What gathering and scattering on the CPU share.
#pragma once

#include "../heads.h"

namespace pd {

// `count` elements that lie side by side on both sides; see `Conversion`.
void convert_row(
    Element from, Element to, const char* source, char* target, int64_t count, float scale);

// What the rows of a tile are, where only the size of an element counts.
template <class Unsigned>
struct OfSize {
  using Type = Unsigned;
};

// Calls work(elements) for the element size of a run's blocks.
template <class Work>
void with_element_size(const TokenRun& run, Work work) {
  switch (bytes_of(run.element)) {
    case 1:
      return work(OfSize<uint8_t>());
    case 2:
      return work(OfSize<uint16_t>());
    default:
      return work(OfSize<uint32_t>());
  }
}

}  // namespace pd
