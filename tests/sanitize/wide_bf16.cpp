// the code of avx512_bf16.cpp for any processor, the one instruction that makes the difference written out.
#include "../../csrc/cpu/headers.h"

#define VB 64
#define MR 14
#define EFFT_DOT 1
#define EFFT_DOT_EMULATED
#include "../../csrc/cpu/isa.h"

namespace efft {
extern const Kernels wide_bf16_kernels{"wide_bf16", packed_bytes, pack, lowrank};
}
