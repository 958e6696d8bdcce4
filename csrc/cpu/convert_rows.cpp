#include "convert_rows.h"

#include "isa.h"

namespace pd {
namespace {

template <class Converts>
PD_BOTH void convert_elements(
    const typename Converts::From::Type* __restrict from,
    typename Converts::To::Type* __restrict to, int64_t count, float scale) {
  for (int64_t i = 0; i < count; ++i) to[i] = Converts::of(from[i], scale);
}

PD_BOTH void convert(
    Element from, Element to, const char* source, char* target, int64_t count, float scale) {
  with_conversion(from, to, [&](auto conversion) PD_INLINED {
    using Converts = decltype(conversion);
    convert_elements<Converts>(
        reinterpret_cast<const typename Converts::From::Type*>(source),
        reinterpret_cast<typename Converts::To::Type*>(target), count, scale);
  });
}

}  // namespace

PD_FOR_EACH_ISA(
    convert_row, convert,
    (Element from, Element to, const char* source, char* target, int64_t count, float scale),
    (from, to, source, target, count, scale))

}  // namespace pd
