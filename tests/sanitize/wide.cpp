// avx512.cpp compiled for any processor, so that it can be tested, slowly, on one without AVX-512.
#include "../../csrc/cpu/headers.h"

#define VB 64
#define MR 14
#define EFFT_DOT 0
#include "../../csrc/cpu/isa.h"

namespace efft {
extern const Kernels wide_kernels{"wide", packed_bytes, pack, lowrank, overwrites_x, few_rows};
}
