// one tile of the kernel for compute capability 9.0, both ways to form p: compiled again for every fault planted there
#include "hopper.h"

namespace efft::cuda {

const char* hopper_linear_bf16(const Linear& g, int32_t, void* stream) {
  if (g.down.data) return launch_hopper<Bf16, HopperTile<192, 2, 16>, true, false>(g, stream);
  if (g.w.k_major) return launch_hopper<Bf16, HopperTile<192, 2, 0>, true, false>(g, stream);
  return launch_hopper<Bf16, HopperTile<192, 2, 0>, false, false>(g, stream);
}

}  // namespace efft::cuda
