// The simulator's interface for tests: what they set and query.
#include "sim.h"

extern "C" {
void efft_sim_mode(int order, int eager) {
  efft::sim::mode_order = order;
  efft::sim::mode_eager = eager;
}

void efft_sim_plant(int number) { efft::sim::fault = number; }

long efft_sim_launches() { return efft::sim::launches; }

// The maximum over the launches since the last call.
int efft_sim_shared() {
  const int most = efft::sim::most_shared;
  efft::sim::most_shared = 0;
  return most;
}
}
