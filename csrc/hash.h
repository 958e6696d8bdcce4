// A 64-bit hash of rows, for the CPU and for CUDA: every 8-byte word is combined with its position
// among all that is hashed, and the results are added up. So any number of threads may share the
// work, in any order. It tells changed, swapped and missing words; it is no match for an adversary.
#pragma once

#include <cstdint>
#include <cstring>

#include "planes.h"

namespace pd {

constexpr uint64_t kKeyStep = 0x9e3779b97f4a7c15ull;

// Words of a row; the last one is filled up with zeros.
PD_BOTH int64_t words_of(int64_t row_bytes) { return (row_bytes + 7) / 8; }

PD_BOTH uint64_t load_word(const char* row, int64_t row_bytes, int64_t index) {
  uint64_t word = 0;
  const char* const from = row + 8 * index;
  const int64_t left = row_bytes - 8 * index;
  if (left < 8) {
    memcpy(&word, from, left);
  } else if (reinterpret_cast<uintptr_t>(from) % 8 == 0) {  // one load, where that matters
    memcpy(&word, __builtin_assume_aligned(from, 8), 8);
  } else {
    memcpy(&word, from, 8);
  }
  return word;
}

// The product alone would not see the other half where one half is zero.
PD_BOTH uint64_t hash_word(uint64_t word, uint64_t position) {
  const uint64_t keyed = word ^ ((position + 1) * kKeyStep);
  return word + (keyed & 0xffffffffull) * (keyed >> 32);
}

// Spreads the sum over all bits (the finalizer of splitmix64).
PD_BOTH uint64_t finish_hash(uint64_t sum, uint64_t num_words) {
  uint64_t x = sum ^ (num_words * kKeyStep);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

}  // namespace pd
