// Two tiles of the kernel for compute capability 9.0, with p computed and read: recompiled for every fault planted
// there.
#include "hopper.h"

namespace efft::cuda {

template <int BN, int CLUSTER, bool ALTERNATE>
const char* one(const Linear& g, void* stream) {
  if (g.down.data) return launch_hopper<Bf16, HopperTile<BN, CLUSTER, 16, ALTERNATE>, true, false>(g, stream);
  if (g.w.k_major) return launch_hopper<Bf16, HopperTile<BN, CLUSTER, 0, ALTERNATE>, true, false>(g, stream);
  return launch_hopper<Bf16, HopperTile<BN, CLUSTER, 0, ALTERNATE>, false, false>(g, stream);
}

const char* hopper_linear_bf16(const Linear& g, int32_t tile, void* stream) {
  return tile == 192 ? one<192, 2, false>(g, stream) : one<128, 1, true>(g, stream);
}

}  // namespace efft::cuda
