// finds the instruction sets that this processor supports.
#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace efft {

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels;
#elif defined(__aarch64__)
extern const Kernels neon_kernels, neon_bf16_kernels;
extern const bool has_neon_bf16;
#endif

const Kernels* const* available_kernels() {
  static const Kernels* found[5] = {};
  static const bool filled = [] {
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      // measured on an Emerald Rapids: Intel's processors multiply floats faster than by vdpbf16ps
      const bool dot = __builtin_cpu_supports("avx512bf16"), intel = __builtin_cpu_is("intel");
      if (dot && !intel) found[n++] = &avx512_bf16_kernels;
      found[n++] = &avx512_kernels;
      if (dot && intel) found[n++] = &avx512_bf16_kernels;
    }
    if (avx2) found[n++] = &avx2_kernels;
#elif defined(__aarch64__)
#if defined(__linux__)
    const bool bf16 = getauxval(AT_HWCAP2) & (1 << 14);  // HWCAP2_BF16, which older headers do not name
    if (bf16 && has_neon_bf16) found[n++] = &neon_bf16_kernels;
#endif
    found[n++] = &neon_kernels;
#endif
    found[n++] = &portable_kernels;
    return true;
  }();
  (void)filled;
  return found;
}

}  // namespace efft
