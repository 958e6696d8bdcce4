// Values as small integers and back, for the CPU and for CUDA.
//
// Wide: int8 about zero, value = code * scale. Narrow: 2 or 4 bits from a zero point upwards,
// value = zero + code * scale. Scale and zero point are bfloat16. A value and what comes back of it
// are at most half a scale apart, plus what rounding to the cache's own type adds.
#pragma once

#include "floats.h"

namespace pd {

// Adding it leaves a float's nearest integer in the low bits.
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23

struct Range {
  uint16_t zero;   // bfloat16
  uint16_t scale;  // bfloat16
};

// The scale of values that are at most `largest` in magnitude.
PD_BOTH uint16_t wide_scale(float largest) { return bfloat16_above(largest / 127.0f); }

// Zero point and scale of values from `low` to `high`; `levels` is the largest code.
PD_BOTH Range narrow_range(float low, float high, uint32_t levels) {
  const uint16_t zero = bfloat16_below(low + 0.0f);  // no zero has a sign from here on
  const float width = high - BFloat16::load(zero) + 0.0f;
  return {zero, bfloat16_above(width / static_cast<float>(levels))};
}

// Where the scale is next to nothing every code is 0: its inverse may be infinite.
PD_BOTH float inverse(float scale) { return scale > 1e-37f ? 1.0f / scale : 0.0f; }

// Scales are rounded up, so that no code of a value within the range is too large. What is not
// within it (a sink, an infinity, a NaN) gets some code.
PD_BOTH uint32_t narrow_code(float value, float zero, float inverse_scale, uint32_t levels) {
  return bits_of((value - zero) * inverse_scale + kRounder) & levels;
}

PD_BOTH float narrow_value(uint32_t code, float zero, float scale) {
  return zero + static_cast<float>(static_cast<int32_t>(code)) * scale;
}

PD_BOTH uint8_t wide_code(float value, float inverse_scale) {
  return static_cast<uint8_t>(bits_of(value * inverse_scale + kRounder));
}

PD_BOTH float wide_value(int8_t code, float scale) { return static_cast<float>(code) * scale; }

}  // namespace pd
