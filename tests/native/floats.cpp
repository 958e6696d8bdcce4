#include "../../csrc/floats.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "tests.h"

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Calls test(value) for values that are likely to be special somewhere, then for many others of
// every magnitude, and for NaNs.
template <class Test>
int for_floats(Test test) {
  int cases = 0;
  for (uint32_t half = 0; half < 65536; half += 1) {
    for (const uint32_t low :
         {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xefffu, 0xf000u, 0xf001u, 0xffffu}) {
      test(pd::float_of(half << 16 | low));
      ++cases;
    }
  }
  std::mt19937 random(1);
  for (int i = 0; i < 500000; ++i, ++cases) test(pd::float_of(static_cast<uint32_t>(random())));
  return cases;
}

template <class Floats>
int test_all_halves(uint32_t infinity) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = Floats::load(half);
    const bool is_nan = (bits & 0x7fffu) > infinity;
    REQUIRE(std::isnan(value) == is_nan, "%04x", bits);
    REQUIRE(std::signbit(value) == (bits >> 15 != 0), "%04x", bits);
    if (is_nan) {
      REQUIRE(std::isnan(Floats::load(Floats::store(value))), "%04x", bits);
      continue;
    }
    REQUIRE(Floats::store(value) == half, "%04x", bits);
    REQUIRE(Floats::at(Floats::order(half)) == value, "%04x", bits);
    REQUIRE(Floats::at(Floats::magnitude(half)) == std::fabs(value), "%04x", bits);
    const bool has_next = (bits & 0x7fffu) < infinity;
    if (has_next) {
      const auto next = static_cast<uint16_t>(bits + 1);  // away from zero
      const bool grows = bits >> 15 == 0;
      REQUIRE((Floats::load(next) > value) == grows, "%04x", bits);
      REQUIRE((Floats::order(next) > Floats::order(half)) == grows, "%04x", bits);
    }
  }
  return 65536;
}

// The value of a half; of an infinity, what it would be if there were a larger exponent.
template <class Floats>
double unlimited(uint16_t half) {
  const float value = Floats::load(half);
  if (!std::isinf(value)) return value;
  const double before = Floats::load(static_cast<uint16_t>(half - 1));
  return before + (before - Floats::load(static_cast<uint16_t>(half - 2)));
}

// No half is nearer to a value than the one that it is rounded to, and of two the even one is
// taken.
template <class Floats>
void test_rounding(float value) {
  const uint16_t half = Floats::store(value);
  if (std::isnan(value)) {
    REQUIRE(std::isnan(Floats::load(half)), "%a", value);
    return;
  }
  REQUIRE(std::signbit(value) == std::signbit(Floats::load(half)), "%a", value);
  const double chosen = unlimited<Floats>(half);
  if (std::isinf(Floats::load(half)) && std::fabs(value) >= std::fabs(chosen)) return;
  const double distance = std::fabs(value - chosen);
  for (const int other : {half - 1, half + 1}) {
    const double neighbour = unlimited<Floats>(static_cast<uint16_t>(other));
    if (std::isnan(neighbour)) continue;  // beyond a zero or an infinity
    const double its_distance = std::fabs(value - neighbour);
    const bool is_best = distance < its_distance || (distance == its_distance && half % 2 == 0);
    REQUIRE(is_best, "%a became %a, not %a", value, chosen, neighbour);
  }
}

#ifdef __FLT16_MANT_DIG__
void test_against_compiler(float value) {
  if (std::isnan(value)) return;
  const auto expected = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &expected, 2);
  REQUIRE(pd::Float16::store(value) == bits, "%a", value);
  REQUIRE(pd::Float16::load(bits) == static_cast<float>(expected), "%04x", bits);
}
#endif

void test_bounds(float value) {
  if (std::isnan(value)) {
    REQUIRE(pd::bfloat16_above(std::fabs(value)) == 0x7f7f, "%a", value);
    return;
  }
  const uint16_t above = pd::bfloat16_above(std::fabs(value));
  const float bound = pd::BFloat16::load(above);
  REQUIRE(std::isfinite(bound), "%a", value);
  REQUIRE(bound >= std::fabs(value) || above == 0x7f7f, "%a", value);
  if (above > 0) {
    const float lower = pd::BFloat16::load(static_cast<uint16_t>(above - 1));
    REQUIRE(lower < std::fabs(value), "%a is not the least above %a", bound, value);
  }
  const uint16_t below = pd::bfloat16_below(value);
  REQUIRE(pd::BFloat16::load(below) <= value, "%a", value);
  const auto next = static_cast<int16_t>(pd::BFloat16::order(below) + 1);
  const bool is_largest = value == kInfinity || value == 0;  // which have a zero or a NaN next
  REQUIRE(is_largest || pd::BFloat16::at(next) > value, "%a", value);
}

void test_float32(float value) {
  const int32_t order = pd::Float32::order(value);
  REQUIRE(pd::bits_of(pd::Float32::at(order)) == pd::bits_of(value), "%a", value);
  if (std::isnan(value)) return;
  REQUIRE(pd::Float32::at(pd::Float32::magnitude(value)) == std::fabs(value), "%a", value);
  REQUIRE((order > pd::Float32::order(1.5f)) == (value > 1.5f), "%a", value);
  REQUIRE((order > pd::Float32::order(-1.5f)) == (value > -1.5f), "%a", value);
}

float float8_value(uint32_t bits) {
  const auto exponent = static_cast<int>(bits >> 3 & 15u), mantissa = static_cast<int>(bits & 7u);
  const float magnitude = exponent == 0
                              ? std::ldexp(static_cast<float>(mantissa), -9)
                              : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return bits >> 7 == 0 ? magnitude : -magnitude;
}

// No fp8 is nearer, of two the even one is taken, and what is too large becomes the largest.
void test_float8(float value) {
  const uint32_t bits = pd::Float8::store(value), magnitude = bits & 0x7fu;
  REQUIRE((bits >> 7 != 0) == std::signbit(value), "%a", value);
  REQUIRE((magnitude == 0x7fu) == std::isnan(value), "%a became %02x", value, bits);
  if (std::isnan(value)) return;
  const double wanted = std::fmin(std::fabs(value), 448.0f);
  const double distance = std::fabs(wanted - float8_value(magnitude));
  for (const uint32_t other : {magnitude - 1, magnitude + 1}) {
    if (other > 0x7eu) continue;  // beyond zero, or the NaN
    const double its_distance = std::fabs(wanted - float8_value(other));
    const bool is_best = distance < its_distance || (distance == its_distance && bits % 2 == 0);
    REQUIRE(is_best, "%a became %02x, not %02x", value, magnitude, other);
  }
}

}  // namespace

int test_floats() {
  int cases = test_all_halves<pd::BFloat16>(0x7f80) + test_all_halves<pd::Float16>(0x7c00);
  cases += for_floats(test_rounding<pd::BFloat16>);
  cases += for_floats(test_rounding<pd::Float16>);
#ifdef __FLT16_MANT_DIG__
  cases += for_floats(test_against_compiler);
#endif
  cases += for_floats(test_bounds);
  cases += for_floats(test_float32);
  cases += for_floats(test_float8);
  return cases;
}
