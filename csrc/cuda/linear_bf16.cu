#include "linear.h"

namespace efft::cuda {

const char* lowrank_linear_bf16(const Linear& g, bool large_tile, void* stream) {
  return linear<Bf16>(g, large_tile, stream);
}

}  // namespace efft::cuda
