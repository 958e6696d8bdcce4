// The element types of a KV cache as float32 and back, in integer arithmetic that vectorises on
// every target and rounds to nearest, ties to even, on all of them.
#pragma once

#include <cstdint>
#include <cstring>

#include "planes.h"

namespace pd {

enum class Element { kFloat32, kBFloat16, kFloat16, kFloat8 };

PD_BOTH int64_t bytes_of(Element element) {
  return element == Element::kFloat32 ? 4 : element == Element::kFloat8 ? 1 : 2;
}

PD_BOTH uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

PD_BOTH float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

constexpr uint32_t kMagnitude = 0x7fffffffu;  // all bits of a float32 but its sign
constexpr uint32_t kInfinity = 0x7f800000u;

// The bits of a magnitude, or of `limit` where that is less. Numbers only: these are integers, for
// compilers make branches of the likes in floating point, which do not vectorise.
PD_BOTH uint32_t limited(uint32_t magnitude, uint32_t limit) {
  const auto number = static_cast<int32_t>(magnitude), most = static_cast<int32_t>(limit);
  return static_cast<uint32_t>(number < most ? number : most);
}

PD_BOTH bool is_nan(uint32_t magnitude) {
  return static_cast<int32_t>(magnitude) > static_cast<int32_t>(kInfinity);
}

// `store` rounds a value, which is made `limit` where it is beyond that (bits of a float32); a NaN
// stays one.
//
// Each has a type for integers in the order of its values, so that the smallest and the largest of
// many are found without a floating-point compare: `order` and `at` convert.
struct Float32 {
  static constexpr float kLargest = 3.40282347e38f;
  using Type = float;
  using Order = int32_t;
  static PD_BOTH float load(float value) { return value; }
  static PD_BOTH float store(float value, uint32_t limit = kInfinity) {
    const uint32_t magnitude = bits_of(value) & kMagnitude;
    const uint32_t sign = bits_of(value) & ~kMagnitude;
    return float_of((is_nan(magnitude) ? magnitude : limited(magnitude, limit)) | sign);
  }
  static PD_BOTH int32_t order(float value) {
    const int32_t bits = static_cast<int32_t>(bits_of(value));
    return bits ^ ((bits >> 31) & 0x7fffffff);
  }
  static PD_BOTH int32_t magnitude(float value) {
    return static_cast<int32_t>(bits_of(value) & kMagnitude);
  }
  static PD_BOTH float at(int32_t order) {
    return float_of(static_cast<uint32_t>(order ^ ((order >> 31) & 0x7fffffff)));
  }
};

// What both types of 16 bits have in common.
struct Half {
  using Type = uint16_t;
  using Order = int16_t;
  static PD_BOTH int16_t order(uint16_t half) {
    const int16_t bits = static_cast<int16_t>(half);
    return static_cast<int16_t>(bits ^ ((bits >> 15) & 0x7fff));
  }
  static PD_BOTH int16_t magnitude(uint16_t half) { return static_cast<int16_t>(half & 0x7fffu); }
  static PD_BOTH uint16_t bits_at(int16_t order) {
    return static_cast<uint16_t>(order ^ ((order >> 15) & 0x7fff));
  }
};

struct BFloat16 : Half {
  static constexpr float kLargest = 3.38953139e38f;
  static PD_BOTH float at(int16_t order) { return load(bits_at(order)); }
  static PD_BOTH float load(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }
  static PD_BOTH uint16_t store(float value, uint32_t limit = kInfinity) {
    const uint32_t magnitude = bits_of(value) & kMagnitude;
    const uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
    const uint32_t bits = limited(magnitude, limit);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((is_nan(magnitude) ? (magnitude >> 16) | 0x40u : rounded) | sign);
  }
};

struct Float16 : Half {
  static constexpr float kLargest = 65504.0f;
  static PD_BOTH float at(int16_t order) { return load(bits_at(order)); }
  static PD_BOTH float load(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16;
    const uint32_t rest = (half & 0x7fffu) << 13;
    const uint32_t normal = rest + (112u << 23);
    // A denormal is what exceeds 2^-14 when its bits are put behind that exponent.
    const float denormal = float_of(rest + (113u << 23)) - float_of(113u << 23);
    uint32_t bits = rest < (1u << 23) ? bits_of(denormal) : normal;
    bits = rest >= (31u << 23) ? rest | (255u << 23) : bits;
    return float_of(bits | sign);
  }
  static PD_BOTH uint16_t store(float value, uint32_t limit = kInfinity) {
    const uint32_t magnitude = bits_of(value) & kMagnitude;
    const uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
    const uint32_t bits = limited(magnitude, limit);
    const uint32_t normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    // The last bit of 0.5 is worth as much as that of a denormal.
    const uint32_t denormal = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f);
    uint32_t half = bits < (113u << 23) ? denormal : normal;
    half = bits >= 0x477ff000u ? 0x7c00u : half;  // 65520, which rounds to infinity
    half = is_nan(magnitude) ? 0x7e00u : half;
    return static_cast<uint16_t>(half | sign);
  }
};

// vLLM's fp8_e4m3: no infinity, which becomes the largest value, and one NaN of either sign.
struct Float8 {
  using Type = uint8_t;
  static PD_BOTH uint8_t store(float value) {
    const uint32_t magnitude = bits_of(value) & kMagnitude;
    const uint32_t sign = (bits_of(value) >> 24) & 0x80u;
    const uint32_t bits = limited(magnitude, 0x43e00000u);  // 448
    const uint32_t normal = (bits - (120u << 23) + 0x7ffffu + ((bits >> 20) & 1u)) >> 20;
    // The last bit of 2^14 is worth as much as that of a denormal.
    const uint32_t denormal = bits_of(float_of(bits) + 16384.0f) - bits_of(16384.0f);
    const uint32_t rounded = bits < (121u << 23) ? denormal : normal;
    return static_cast<uint8_t>((is_nan(magnitude) ? 0x7fu : rounded) | sign);
  }
};

// A bfloat16 that is not below (not above) a float32. Scales are rounded up and zero points down,
// so that no value lies outside the range that its codes span.
PD_BOTH uint16_t bfloat16_above(float not_negative) {
  const uint32_t up = (bits_of(not_negative) + 0xffffu) >> 16;
  return static_cast<uint16_t>(up < 0x7f7fu ? up : 0x7f7fu);  // the largest that is finite
}

PD_BOTH uint16_t bfloat16_below(float value) {
  const uint32_t bits = bits_of(value);
  return static_cast<uint16_t>((bits + (value < 0 ? 0xffffu : 0u)) >> 16);
}

// A value that was decoded: half a scale may carry the largest of a type beyond it.
template <class Floats>
PD_BOTH typename Floats::Type store_within(float value) {
  return Floats::store(value, bits_of(Floats::kLargest));
}

}  // namespace pd
