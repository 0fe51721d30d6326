// dup = p.T @ dy and dp = dy @ up.T from one read of dy, for compute capability 9.0. Compiled once per dtype,
// hopper_pass_*.cu. ddown.T = dp.T @ x is the first of the two products alone.
//
// One thread loads tiles of 64 x 64 numbers of dy by TMA; two warpgroups read them from shared memory. A tile is the A
// operand of both products: k-major for dp, transposed for dup, whose rows are the columns of dy. Both products have
// only 16 or 32 columns, the ranks, so every byte of dy is read from global memory once and from shared memory twice.
// dup stays in registers for a whole run of rows; each run then writes a slot of float32 numbers, and reduce() sums the
// slots. There are two ways to share the work:
//
// ROWS      Where dy is narrow, each warpgroup has runs of its own with all columns. dp is complete in its registers.
//
// columns   A block has TILES tiles of 64 columns and one run; its warpgroups take the even and the odd tiles. dp then
//           sums over several warpgroups, and several blocks where dy is wide, which form a cluster. After each 64 rows
//           every warpgroup sends its part of dp to its peers (st.async); each peer adds up the parts of some of the
//           elements, in the order of the warpgroups, and stores the result.
#pragma once

#include <cstring>

#include "hopper.h"

namespace efft::cuda {

constexpr int PASS_THREADS = CONSUMERS * WARPGROUP + WARP;   // The last warp issues the TMA loads.
constexpr int PASS_ROWS = 64, PASS_TILE = PASS_ROWS * LINE;  // rows and bytes of a tile of dy
static_assert(PASS_ROWS == HOPPER_PASS_ROWS && CELLS == HOPPER_PASS_COLUMNS && CONSUMERS == HOPPER_PASS_WORKERS,
              "the plan and bindings.cpp count by these");

struct HopperPass {
  TensorMap dy, up, p;
  int32_t M, R;
  int32_t tiles, parts;  // tiles of 64 rows per run; blocks across the columns, which form a cluster for dp
  uint16_t* dp;          // [M, R], rows dp_row apart; dp_row is even
  int32_t dp_row;
  float* slots;  // [runs, parts, TILES, RANKS / 8, WARPGROUP, 4]: accumulators as the threads hold them
};

template <int TILES_, int RANKS_, bool DP_, bool ROWS_ = false>
struct HopperPassTile {
  static constexpr int TILES = TILES_, RANKS = RANKS_;
  static constexpr bool DP = DP_, ROWS = ROWS_;
  static constexpr int UP = DP ? TILES * RANKS * LINE : 0, P = PASS_ROWS * 2 * RANKS;  // in bytes; P for one stage
  static constexpr int INBOX = DP && !ROWS ? PASS_ROWS * RANKS * 4 : 0;                // bytes per warpgroup
  static constexpr int P_RINGS = ROWS ? CONSUMERS : 1;                                 // of the tiles of p
  // Given the stages of dy for each warpgroup, the stages of p, for more rows than those of dy can hold: p of a row has
  // been read long before its stage is filled again, because the tiles of that row had to be read for the tiles loaded
  // since.
  static constexpr int p_stages(int stages) { return stages / (ROWS ? TILES : TILES / 2) + 2; }
  static constexpr int bytes(int stages) {
    return CONSUMERS * stages * PASS_TILE + UP + P_RINGS * p_stages(stages) * P + 2 * CONSUMERS * INBOX;
  }
  static constexpr int LEFT = HOPPER_SHARED - ALIGNMENT - 512;
  static constexpr int STAGES = bytes(8) <= LEFT ? 8 : bytes(7) <= LEFT ? 7 : 6, P_STAGES = p_stages(STAGES);
  static constexpr int SHARED = bytes(STAGES) + ALIGNMENT + 512;
  static constexpr int BARRIERS = 2 * CONSUMERS * STAGES + P_RINGS * P_STAGES + 1 + 2 * CONSUMERS;
  static_assert(bytes(STAGES) <= LEFT && BARRIERS * 8 <= 512 && TILES > 1, "the tiles fit");
};

// The descriptor of a tile of p [64, RANKS], whose rows are the terms of the sum.
template <int RANKS>
__device__ __forceinline__ uint64_t p_operand(uint32_t tile) {
  return descriptor(tile, 16, 16 * RANKS, 2 * RANKS);
}

// The descriptor of the data `bytes` further on. One addition to the low half is enough, because shared memory ends
// before the address field of the descriptor does.
__device__ __forceinline__ uint64_t further(uint64_t operand, int bytes) {
  return (operand & ~uint64_t(0xffffffff)) | uint32_t(uint32_t(operand) + uint32_t(bytes >> 4));
}

template <class T, class Tile>
__global__ void __launch_bounds__(PASS_THREADS, 1) hopper_pass_kernel(const __grid_constant__ HopperPass g) {
#if defined(EFFT_HOPPER)
  constexpr int TILES = Tile::TILES, RANKS = Tile::RANKS, STAGES = Tile::STAGES, P_STAGES = Tile::P_STAGES;
  constexpr bool DP = Tile::DP, ROWS = Tile::ROWS;
  EFFT_SHARED(raw);
  // The offset is the same in every block of the cluster, because peers address each other's inbox.
  unsigned char* const shared = raw + (ALIGNMENT - shared_address(raw) % ALIGNMENT) % ALIGNMENT;
  const uint32_t dy_tiles = shared_address(shared);
  const uint32_t up_tiles = dy_tiles + CONSUMERS * STAGES * PASS_TILE;
  const uint32_t p_tiles = up_tiles + Tile::UP;
  unsigned char* const inboxes = shared + (p_tiles - dy_tiles) + Tile::P_RINGS * P_STAGES * Tile::P;
  uint64_t* const full = reinterpret_cast<uint64_t*>(inboxes + 2 * CONSUMERS * Tile::INBOX);
  uint64_t *const empty = full + CONSUMERS * STAGES, *const p_full = empty + CONSUMERS * STAGES;
  uint64_t *const up_full = p_full + Tile::P_RINGS * P_STAGES, *const dp_full = up_full + 1;
  const auto dy_tile = [&](int consumer, int stage) { return dy_tiles + (consumer * STAGES + stage) * PASS_TILE; };
  // Each warpgroup has two inboxes, used in turn, and a barrier for each.
  const auto inbox = [&](int consumer, int turn) { return inboxes + (consumer * 2 + turn) * Tile::INBOX; };

  const int part = int(blockIdx.x) % g.parts;
  // The run of a warpgroup, its first tile of rows, and how many of these it has.
  const auto run_of = [&](int consumer) {
    return ROWS ? CONSUMERS * int(blockIdx.x) + consumer : int(blockIdx.x) / g.parts;
  };
  const auto first_of = [&](int consumer) { return run_of(consumer) * g.tiles; };
  const auto count_of = [&](int consumer) { return least(g.tiles, cdiv(g.M, PASS_ROWS) - first_of(consumer)); };
  if (threadIdx.x == CONSUMERS * WARPGROUP) {
    prefetch_map(&g.dy), prefetch_map(&g.p);
    if constexpr (DP) prefetch_map(&g.up);
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < CONSUMERS * STAGES; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, 1);
    }
    for (int i = 0; i < Tile::P_RINGS * P_STAGES; ++i) barrier_init(p_full + i, 1);
    barrier_init(up_full, 1);
    for (int i = 0; i < 2 * CONSUMERS; ++i) barrier_init(dp_full + i, 1);
    barrier_init_fence();
  }
  cluster_sync();
  // The code above may run concurrently with the previous kernel; the code below reads what that kernel wrote.
  launch_dependents();
  wait_for_prerequisites();

  if (threadIdx.x >= CONSUMERS * WARPGROUP) {
    if (threadIdx.x == CONSUMERS * WARPGROUP) {
      const int n0 = part * TILES * CELLS;
      if constexpr (DP) {
        barrier_expect(up_full, Tile::UP);
        for (int i = 0; i < TILES; ++i) tma_load(up_tiles + i * RANKS * LINE, &g.up, n0 + i * CELLS, 0, up_full);
      }
      Ring<STAGES> even, odd;
      Ring<P_STAGES> p_ring;
      const auto load = [&](Ring<STAGES>& ring, int consumer, int tile, int m0) {
        const int i = consumer * STAGES + ring.stage;
        barrier_wait(empty + i, ring.parity ^ 1);
        barrier_expect(full + i, PASS_TILE);
        tma_load(dy_tile(consumer, ring.stage), &g.dy, n0 + tile * CELLS, m0, full + i);
        ring.next();
      };
      const auto load_p = [&](int ring, int m0) {
        const int i = ring * P_STAGES + p_ring.stage;
        barrier_expect(p_full + i, Tile::P);
        tma_load(p_tiles + i * Tile::P, &g.p, 0, m0, p_full + i);
      };
#pragma unroll 1
      for (int row = 0; row < count_of(0); ++row, p_ring.next()) {  // The second warpgroup has no more than the first.
        const int m0 = (first_of(0) + row) * PASS_ROWS, m1 = (first_of(1) + row) * PASS_ROWS;
        const bool second = row < count_of(1);
        load_p(0, m0);
        if (ROWS && second) load_p(1, m1);
#pragma unroll 1
        for (int tile = 0; tile < TILES; tile += ROWS ? 1 : 2) {
          load(even, 0, tile, m0);
          if (ROWS ? second : tile + 1 < TILES) load(odd, 1, ROWS ? tile : tile + 1, m1);
        }
      }
    }
    return;
  }

  const int consumer = threadIdx.x / WARPGROUP, thread = threadIdx.x % WARPGROUP;
  const int warp = thread / WARP, lane = threadIdx.x % WARP;
  const int rank = DP && !ROWS ? cluster_rank() : 0;
  const int run = run_of(consumer), first = first_of(consumer), count = count_of(consumer);

  // Stores 4 numbers of dp as the accumulators hold them: ranks v * 8 to v * 8 + 7 of the rows of `row`.
  const auto store_dp = [&](const float* four, int row, int v) {
    const int m = (first + row) * PASS_ROWS + warp * 16 + lane / 4, r = v * 8 + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (m + half * 8 < g.M && r < g.R)
        *reinterpret_cast<uint32_t*>(g.dp + int64_t(m + half * 8) * g.dp_row + r) =
            T::pack(four[half * 2], four[half * 2 + 1]);
  };

  // dp of 64 rows has a part from each warpgroup of the cluster. A piece is what a warp holds of 8 ranks, 16 bytes in
  // each lane. The parts of a piece are adjacent in the inbox of its owner.
  const int sources = CONSUMERS * g.parts, me = CONSUMERS * rank + consumer;  // sources: 4 or 8
  const auto place = [&](int piece, int source) { return (((piece & ~(sources - 1)) + source) * WARP + lane) * 16; };
  uint64_t* const arrived = dp_full + consumer * 2;

  // clang-format off: its space after float would make another digest of what was proven on a GPU
  const auto send = [&](const float(&dp)[RANKS / 2], int row) {
    // clang-format on
    const int turn = row % 2;
    if (thread == 0) barrier_expect(arrived + turn, Tile::INBOX);
#pragma unroll
    for (int v = 0; v < RANKS / 8; ++v) {
      const int piece = v * 4 + warp, owner = piece & (sources - 1), peer = owner / CONSUMERS, its = owner % CONSUMERS;
      store_async(map_shared(shared_address(inbox(its, turn)) + place(piece, me), peer), dp + v * 4,
                  map_shared(shared_address(dp_full + its * 2 + turn), peer));
    }
  };

  // Sums the parts of the pieces that this warpgroup owns, and stores the sums.
  const auto receive = [&](int row) {
    const int turn = row % 2;
    barrier_wait_cluster(arrived + turn, row / 2 % 2);
#pragma unroll
    for (int v = 0; v < RANKS / 8; ++v) {
      const int piece = v * 4 + warp;
      if ((piece & (sources - 1)) != me) continue;
      float sum[4] = {};
      for (int source = 0; source < sources; ++source) {
        float one[4];
        memcpy(one, inbox(consumer, turn) + place(piece, source), 16);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] += one[e];
      }
      store_dp(sum, row, v);
    }
    // The next part that this warpgroup sends tells its peers that this inbox has been read.
    group_sync(1 + consumer, WARPGROUP);
  };

  // Compiled once per warpgroup, so that the compiler sees that all its threads have the same addresses of tiles.
  const auto consume = [&](auto number) {
    constexpr int CONSUMER = decltype(number)::value, COUNT = ROWS ? TILES : (TILES + 1 - CONSUMER) / 2;
    constexpr int FIRST = ROWS ? 0 : CONSUMER, STEP = ROWS ? 1 : CONSUMERS, P_RING = ROWS ? CONSUMER : 0;
    float dup[COUNT][RANKS / 2] = {};
    Ring<STAGES> ring;
    Ring<P_STAGES> p_ring;
    const auto release = [&](uint64_t* barrier) {
      if (thread == 0) barrier_arrive(barrier, rank);
    };
    if constexpr (DP) barrier_wait(up_full, 0);
#pragma unroll 1
    for (int row = 0; row < count; ++row, p_ring.next()) {
      [[maybe_unused]] float dp[RANKS / 2];
      const int p_tile = P_RING * P_STAGES + p_ring.stage;
      const uint64_t columns_of_p = p_operand<RANKS>(p_tiles + p_tile * Tile::P);
      barrier_wait(p_full + p_tile, p_ring.parity);
      int last = 0;
#pragma unroll
      for (int i = 0; i < COUNT; ++i, ring.next()) {
        const uint32_t dy = dy_tile(CONSUMER, ring.stage);
        [[maybe_unused]] const uint32_t up = up_tiles + (STEP * i + FIRST) * RANKS * LINE;
        [[maybe_unused]] const uint64_t rows_of_dy = operand<true>(dy, 0, 0), rows_of_up = operand<true>(up, 0, 0);
        const uint64_t columns_of_dy = operand<false>(dy, 0, PASS_ROWS);
        barrier_wait(full + CONSUMER * STAGES + ring.stage, ring.parity);
        hold(dup[i]);
        if constexpr (DP) hold(dp);
        wgmma_fence();
#pragma unroll
        for (int k16 = 0; k16 < PASS_ROWS / 16; ++k16) {
          if constexpr (DP)
            Wgmma<T, RANKS>::template shared<true>(dp, further(rows_of_dy, k16 * 32), further(rows_of_up, k16 * 32),
                                                   i > 0 || k16 > 0);
          WgmmaTransposed<T, RANKS>::shared(dup[i], further(columns_of_dy, k16 * 16 * LINE),
                                            further(columns_of_p, k16 * 32 * RANKS));
        }
        wgmma_commit();
        if (i > 0) {
          // One tile stays in flight; the tensor cores are done with the one before it.
          wgmma_wait<1>();
          release(empty + CONSUMER * STAGES + last);
        }
        last = ring.stage;
      }
      wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < COUNT; ++i) hold(dup[i]);
      release(empty + CONSUMER * STAGES + last);
      if constexpr (DP) {
        hold(dp);
        if constexpr (ROWS) {
#pragma unroll
          for (int v = 0; v < RANKS / 8; ++v) store_dp(dp + v * 4, row, v);
        } else {
          send(dp, row);
          receive(row);
        }
      }
    }
    if (count < 1) return;  // the second warpgroup of the last block
    uint4* const slot =
        reinterpret_cast<uint4*>(g.slots) + int64_t(run * g.parts + part) * TILES * (RANKS / 8) * WARPGROUP;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
#pragma unroll
      for (int v = 0; v < RANKS / 8; ++v) {
        uint4 four;
        memcpy(&four, dup[i] + v * 4, 16);
        slot[((STEP * i + FIRST) * (RANKS / 8) + v) * WARPGROUP + thread] = four;
      }
  };
  if (consumer == 0)
    consume(Count<0>());
  else
    consume(Count<1>());
#endif
}

template <class T, class Tile>
const char* launch_hopper_pass(const DyPass& g, const HopperPassPlan& plan, void* stream) {
  constexpr int RANKS = Tile::RANKS;
  HopperPass h{};
  h.M = g.M, h.R = g.R, h.tiles = plan.rows / PASS_ROWS, h.parts = plan.parts;
  h.dp = static_cast<uint16_t*>(g.dp_slots), h.dp_row = g.dp_row;
  h.slots = static_cast<float*>(g.dup_slots);
  const char* error = make_map(&h.dy, g.dy.data, g.M, g.N, g.dy.row, PASS_ROWS, CELLS, LINE);
  if (!error) error = make_map(&h.p, g.p.data, g.M, g.R, g.p.row, PASS_ROWS, RANKS, 2 * RANKS);
  if (Tile::DP && !error) error = make_map(&h.up, g.up.data, g.R, g.N, g.up.row, RANKS, CELLS, LINE);
  if (!error && !multiprocessors()) error = "this kernel is for compute capability 9.0";
  if (error) return error;
  const int blocks = Tile::ROWS ? cdiv(plan.runs, CONSUMERS) : plan.runs * plan.parts;
  return launch_clusters(hopper_pass_kernel<T, Tile>, blocks, Tile::DP ? plan.parts : 1, PASS_THREADS, Tile::SHARED,
                         stream, h);
}

template <class T, int RANKS>
const char* hopper_pass_by_tiles(const DyPass& g, const HopperPassPlan& plan, void* stream) {
  const auto launch = [&](auto tile) { return launch_hopper_pass<T, decltype(tile)>(g, plan, stream); };
  if (!g.up.data) {
    if (plan.tiles == 2) return launch(HopperPassTile<2, RANKS, false>());
    if (plan.tiles == 3) return launch(HopperPassTile<3, RANKS, false>());
    if (plan.tiles == 4) return launch(HopperPassTile<4, RANKS, false>());
    return launch(HopperPassTile<6, RANKS, false>());
  }
  // With more ranks a thread has too few registers for the accumulators of more tiles.
  if (plan.parts == 1) {
    if (plan.tiles == 2) return launch(HopperPassTile<2, RANKS, true, true>());
    if (plan.tiles == 3) return launch(HopperPassTile<3, RANKS, true, true>());
    if constexpr (RANKS == 16)
      if (plan.tiles == 9) return launch(HopperPassTile<9, RANKS, true, true>());
    if (plan.tiles == 5) return launch(HopperPassTile<5, RANKS, true, true>());
    return launch(HopperPassTile<6, RANKS, true, true>());
  }
  if (plan.tiles == 6) return launch(HopperPassTile<6, RANKS, true>());
  if (plan.tiles == 9) return launch(HopperPassTile<9, RANKS, true>());
  if constexpr (RANKS == 16)
    if (plan.tiles == 16) return launch(HopperPassTile<16, RANKS, true>());
  return launch(HopperPassTile<12, RANKS, true>());
}

template <class T>
const char* hopper_pass(const DyPass& g, const HopperPassPlan& plan, void* stream) {
  if (g.R <= 16) return hopper_pass_by_tiles<T, 16>(g, plan, stream);
  return hopper_pass_by_tiles<T, 32>(g, plan, stream);
}

}  // namespace efft::cuda
