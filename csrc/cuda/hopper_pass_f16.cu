#include "hopper_pass.h"

namespace efft::cuda {

const char* hopper_pass_f16(const DyPass& g, const HopperPassPlan& plan, void* stream) {
  return hopper_pass<F16>(g, plan, stream);
}

}  // namespace efft::cuda
