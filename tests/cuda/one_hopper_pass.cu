// A few tiles of the passes for compute capability 9.0: recompiled for every fault planted there.
#include "hopper_pass.h"

namespace efft::cuda {

const char* hopper_pass_bf16(const DyPass& g, const HopperPassPlan& plan, void* stream) {
  const auto launch = [&](auto tile) { return launch_hopper_pass<Bf16, decltype(tile)>(g, plan, stream); };
  if (plan.tiles == 2 && !g.up.data) return launch(HopperPassTile<2, 16, false>());
  if (plan.tiles == 2) return launch(HopperPassTile<2, 16, true, true>());
  if (plan.tiles == 6 && g.up.data) return launch(HopperPassTile<6, 16, true>());
  return "the test's sizes need other tiles";
}

}  // namespace efft::cuda
