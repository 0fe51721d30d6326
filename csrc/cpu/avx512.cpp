// AVX-512: a 14 x 32 tile of accumulators in the 32 registers of 64 bytes.
#include "headers.h"

#if defined(__x86_64__)
#define VB 64
#define MR 14
#define EFFT_DOT 0
EFFT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#include "isa.h"
EFFT_TARGET_END

namespace efft {
extern const Kernels avx512_kernels{"avx512", packed_bytes, pack, lowrank, overwrites_x, few_rows};
}
#endif
