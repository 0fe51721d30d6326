#include "linear.h"

namespace efft::cuda {

const char* lowrank_linear_bf16(const Linear& g, int32_t tile, void* stream) { return linear<Bf16>(g, tile, stream); }

}  // namespace efft::cuda
