// The kernels without PyTorch, for the sanitizers: every buffer ends where its last byte is.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>

// What is in memory before a kernel writes to it; no test writes it itself.
constexpr char kSentinel = 0x55;

#define REQUIRE(condition, ...)                                            \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fputc('\n', stderr);                                            \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

// Each returns its number of cases.
int test_floats();
int test_digest();
int test_packing();
int test_encoding();
int test_heads();
