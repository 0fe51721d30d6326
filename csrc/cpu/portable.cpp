// any processor: vectors of 16 bytes, the size of SSE2 and NEON.
#include "headers.h"

#define VB 16
#define MR 6
#define EFFT_DOT 0
#include "isa.h"

namespace efft {
extern const Kernels portable_kernels{"portable", packed_bytes, pack, lowrank, overwrites_x, few_rows};
}
