// the code of avx512.cpp, tile and all, compiled for any processor: one without AVX-512 can test it, slowly.
#include "../../csrc/cpu/headers.h"

#define VB 64
#define MR 14
#define EFFT_DOT 0
#include "../../csrc/cpu/isa.h"

namespace efft {
extern const Kernels wide_kernels{"wide", packed_bytes, pack, lowrank};
}
