// One tile of the linear kernel, with both ways to compute p: recompiled for every planted fault.
#include "linear.h"

namespace efft::cuda {

const char* lowrank_linear_bf16(const Linear& g, int32_t, void* stream) {
  if (g.down.data) return launch_linear<Bf16, SmallTile, 16, true>(g, stream);
  return launch_linear<Bf16, SmallTile, 0, true>(g, stream);
}

}  // namespace efft::cuda
