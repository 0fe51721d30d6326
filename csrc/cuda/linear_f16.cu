#include "linear.h"

namespace efft::cuda {

const char* lowrank_linear_f16(const Linear& g, int32_t tile, void* stream) { return linear<F16>(g, tile, stream); }

}  // namespace efft::cuda
