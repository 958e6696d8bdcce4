// One kernel for every instruction set: written once, compiled for each, chosen at run time.
#pragma once

#ifdef __x86_64__
#define PD_AVX2 __attribute__((target("avx2"), flatten))
#define PD_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"), flatten))
#endif

namespace pd {

enum class Isa { kPlain, kAvx2, kAvx512 };

inline bool has_isa(Isa isa) {
#ifdef __x86_64__
  if (isa == Isa::kAvx2) return __builtin_cpu_supports("avx2");
  if (isa == Isa::kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::kPlain;
}

// The best there is; tests of the kernels set it.
inline Isa& chosen_isa() {
  static Isa isa = has_isa(Isa::kAvx512) ? Isa::kAvx512
                   : has_isa(Isa::kAvx2) ? Isa::kAvx2
                                         : Isa::kPlain;
  return isa;
}

}  // namespace pd

// Defines `name parameters`, which calls the inline function `body arguments` as it was compiled
// for the chosen instruction set.
#ifdef __x86_64__
#define PD_FOR_EACH_ISA(name, body, parameters, arguments)    \
  namespace {                                                 \
  PD_AVX2 void name##_avx2 parameters { body arguments; }     \
  PD_AVX512 void name##_avx512 parameters { body arguments; } \
  }                                                           \
  void name parameters {                                      \
    switch (chosen_isa()) {                                   \
      case Isa::kAvx512:                                      \
        return name##_avx512 arguments;                       \
      case Isa::kAvx2:                                        \
        return name##_avx2 arguments;                         \
      case Isa::kPlain:                                       \
        body arguments;                                       \
    }                                                         \
  }
#else
#define PD_FOR_EACH_ISA(name, body, parameters, arguments) \
  void name parameters { body arguments; }
#endif
