// what a test sets and asks of the simulator
#include "sim.h"

extern "C" {
void efft_sim_mode(int last_warp_first, int eager) {
  efft::sim::mode_order = last_warp_first;
  efft::sim::mode_eager = eager;
}

long efft_sim_launches() { return efft::sim::launches; }
}
