// A few tiles of the passes for compute capability 9.0: recompiled for every fault planted there.
#include "hopper_pass.h"

namespace efft::cuda {

const char* hopper_pass_bf16(const DyPass& g, const HopperPassPlan& plan, void* stream) {
  if (plan.tiles == 2 && !g.up.data) return launch_hopper_pass<Bf16, 2, 16, false>(g, plan, stream);
  if (plan.tiles == 2) return launch_hopper_pass<Bf16, 2, 16, true>(g, plan, stream);
  if (plan.tiles == 3 && g.up.data) return launch_hopper_pass<Bf16, 3, 16, true>(g, plan, stream);
  return "the test's sizes need other tiles";
}

}  // namespace efft::cuda
