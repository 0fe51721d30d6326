// NEON: a 10 x 8 tile: 20 accumulators, 2 vectors of a panel and 10 numbers of a fill the 32 registers of 16 bytes.
#include "headers.h"

#if defined(__aarch64__)
#define VB 16
#define MR 10
#define EFFT_DOT 0
#include "isa.h"

namespace efft {
extern const Kernels neon_kernels{"neon", packed_bytes, pack, lowrank, overwrites_x, few_rows};
}
#endif
