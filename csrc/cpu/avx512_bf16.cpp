// AVX-512 with the bfloat16 dot product (vdpbf16ps): twice the arithmetic per instruction. for other dtypes as
// avx512.cpp.
#include "headers.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define VB 64
#define MR 14
#define EFFT_DOT 1
EFFT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#include "isa.h"
EFFT_TARGET_END

namespace efft {
extern const Kernels avx512_bf16_kernels{"avx512_bf16", packed_bytes, pack, lowrank, overwrites_x, few_rows};
}
#endif
