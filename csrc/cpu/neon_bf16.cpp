// NEON with the bfloat16 dot product (bfdot, Armv8.6). for other dtypes as neon.cpp.
#include "headers.h"

// earlier versions of Clang declare the instruction only if all of the program may use it
#if defined(__aarch64__) && (!defined(__clang__) || __clang_major__ >= 16)
#include <arm_neon.h>

#define VB 16
#define MR 10
#define EFFT_DOT 1
EFFT_TARGET_BEGIN("arch=armv8.2-a+bf16")
#include "isa.h"
EFFT_TARGET_END

namespace efft {
extern const Kernels neon_bf16_kernels{"neon_bf16", packed_bytes, pack, lowrank, overwrites_x, few_rows};
extern const bool has_neon_bf16 = true;
}  // namespace efft
#elif defined(__aarch64__)
namespace efft {
extern const Kernels neon_bf16_kernels{"neon_bf16", nullptr, nullptr, nullptr};
extern const bool has_neon_bf16 = false;
}  // namespace efft
#endif
