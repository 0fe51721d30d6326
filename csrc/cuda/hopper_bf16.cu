#include "hopper.h"

namespace efft::cuda {

const char* hopper_linear_bf16(const Linear& g, int32_t tile, void* stream) { return hopper_linear<Bf16>(g, tile, stream); }

}  // namespace efft::cuda
