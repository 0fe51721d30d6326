#include "hopper_pass.h"

namespace efft::cuda {

const char* hopper_pass_bf16(const DyPass& g, const HopperPassPlan& plan, void* stream) {
  return hopper_pass<Bf16>(g, plan, stream);
}

}  // namespace efft::cuda
