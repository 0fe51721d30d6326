// AVX2 with FMA: a 6 x 16 tile of accumulators in the 16 registers of 32 bytes.
#include "headers.h"

#if defined(__x86_64__)
#define VB 32
#define MR 6
#define EFFT_DOT 0
EFFT_TARGET_BEGIN("avx2,fma")
#include "isa.h"
EFFT_TARGET_END

namespace efft {
extern const Kernels avx2_kernels{"avx2", packed_bytes, pack, lowrank, overwrites_x, few_rows};
}
#endif
