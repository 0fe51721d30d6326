// avx512_bf16.cpp compiled for any processor, with an emulated dot product.
#include "../../csrc/cpu/headers.h"

#define VB 64
#define MR 14
#define EFFT_DOT 1
#define EFFT_DOT_EMULATED
#include "../../csrc/cpu/isa.h"

namespace efft {
extern const Kernels wide_bf16_kernels{"wide_bf16", packed_bytes, pack, lowrank, overwrites_x, few_rows};
}
