// y = [x | p] @ [w ; up] + bias, with p = x @ down computed in the same launch or given. Compiled once per dtype, in
// linear_*.cu.
#pragma once

#include "tile.h"

namespace efft::cuda {

// A block computes BM x BN of y with BM / 16 warps, WARPS_M of them above each other. MIN_BLOCKS blocks should fit on a
// multiprocessor, which sets the compiler's register limit.
template <int BM_, int BN_, int WARPS_M, int MIN_BLOCKS_>
struct LinearTile {
  static constexpr int BM = BM_, BN = BN_, MIN_BLOCKS = MIN_BLOCKS_, STAGES = 3;
  static constexpr int WARPS = BM / 16, THREADS = WARPS * WARP;
  static constexpr int WARPS_N = WARPS / WARPS_M, WM = BM / WARPS_M, WN = BN / WARPS_N;
};

using LargeTile = LinearTile<LARGE_TILE, LARGE_TILE, 2, 1>;
using SmallTile = LinearTile<SMALL_TILE, SMALL_TILE, 2, 2>;

// The size of a pipeline stage in numbers: x, w, down.
template <class Tile, int RANKS>
__host__ __device__ constexpr int stage_size() {
  return (Tile::BM + Tile::BN + RANKS) * BK;
}

// RANKS > 0: p is computed next to y, for up to that many ranks. Every column of blocks computes it, which costs up to
// RANKS / BN of the matmul and saves a second pass over x; the first column stores it. RANKS = 0: p is read, and the
// sum over K continues over R. W_K_MAJOR: the terms of the sum are adjacent in w, as in weight.T.
template <class T, class Tile, int RANKS, bool W_K_MAJOR>
__global__ void __launch_bounds__(Tile::THREADS, Tile::MIN_BLOCKS)
    lowrank_linear_kernel(const __grid_constant__ Linear g) {
  launch_dependents();
  wait_for_prerequisites();
  constexpr int BM = Tile::BM, BN = Tile::BN, MI = Tile::WM / 16, NJ = Tile::WN / 8, PJ = RANKS ? RANKS / 8 : 2;
  EFFT_SHARED(shared);
  uint16_t* const tiles = reinterpret_cast<uint16_t*>(shared);
  const auto x_tile = [&](int stage) { return tiles + stage * stage_size<Tile, RANKS>(); };
  const auto w_tile = [&](int stage) { return x_tile(stage) + BM * BK; };
  const auto down_tile = [&](int stage) { return w_tile(stage) + BN * BK; };

  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int wm = warp / Tile::WARPS_N * Tile::WM, wn = warp % Tile::WARPS_N * Tile::WN;
  int tm, tn;
  tile_of(blockIdx.x, cdiv(g.M, BM), cdiv(g.N, BN), tm, tn);
  const int m0 = tm * BM, n0 = tn * BN;

  const int k_steps = cdiv(g.K, BK), r_steps = RANKS ? 1 : cdiv(g.R, BK);
  const auto load = [&](int step, int stage) {
    if (step < k_steps) {
      load_operand<BM, Tile::THREADS>(x_tile(stage), g.x, true, m0, step * BK, g.M, g.K);
      load_operand<BN, Tile::THREADS>(w_tile(stage), g.w, W_K_MAJOR, n0, step * BK, g.N, g.K);
      if constexpr (RANKS > 0)
        load_operand<RANKS, Tile::THREADS>(down_tile(stage), g.down, g.down.k_major, 0, step * BK, g.R, g.K);
    } else {
      const int r0 = (step - k_steps) * BK;
      if constexpr (RANKS == 0) {
        const Operand p{g.p, g.p_row, 1, UNGROUPED, 0, g.p_row % 8 == 0, true};
        load_operand<BM, Tile::THREADS>(x_tile(stage), p, true, m0, r0, g.M, g.R);
      }
      load_operand<BN, Tile::THREADS>(w_tile(stage), g.up, g.up.k_major, n0, r0, g.N, g.R);
    }
  };

  float acc[MI][NJ][4] = {}, acc_p[1][PJ][4] = {};
  const auto use = [&](int step, int stage) {
    const uint16_t *a = x_tile(stage), *b = w_tile(stage);
    if (step < k_steps) {
      const int steps = step + 1 < k_steps ? BK / 16 : cdiv(g.K - step * BK, 16);
      multiply<T, BM, BN, 4>(acc, a, true, wm, b, W_K_MAJOR, wn, steps, lane);
      // Every warp has 16 rows of p.
      if constexpr (RANKS > 0)
        multiply<T, BM, RANKS, 4>(acc_p, a, true, warp * 16, down_tile(stage), g.down.k_major, 0, steps, lane,
                                  cdiv(g.R, 16));
      return;
    }
    if constexpr (RANKS > 0) {
      // p takes the place of x. y uses it as rounded for storage, which is the p that the backward reads.
      uint16_t* const to = x_tile(stage);
      uint16_t* const p = static_cast<uint16_t*>(g.p);
#pragma unroll
      for (int j = 0; j < PJ; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = warp * 16 + accumulator_row(lane, e), r = j * 8 + accumulator_col(lane, e);
          const uint16_t value = T::round(acc_p[0][j][e]);
          // Beyond R it is nan where x is infinite, because down is zero there.
          to[swizzled<BK>(row, r / 8) + r % 8] = r < g.R ? value : uint16_t(0);
          if (tn == 0 && m0 + row < g.M && r < g.R) p[int64_t(m0 + row) * g.p_row + r] = value;
        }
      __syncthreads();
    }
    const int steps = cdiv(least(g.R - (step - k_steps) * BK, BK), 16);
    multiply<T, BM, BN, 1>(acc, a, true, wm, b, g.up.k_major, wn, steps, lane);
  };
  pipeline<Tile::STAGES>(k_steps + r_steps, load, use);

  // y goes through shared memory, so that whole rows are stored instead of the eight columns of a fragment.
  const uint16_t* const bias = static_cast<const uint16_t*>(g.bias);
  __syncthreads();
#pragma unroll
  for (int j = 0; j < NJ; ++j) {
    const int col = wn + j * 8 + accumulator_col(lane, 0);
    float add[2] = {0, 0};
    if (bias)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (n0 + col + e < g.N) add[e] = T::widen(bias[int64_t(n0 + col + e) * g.bias_stride]);
#pragma unroll
    for (int i = 0; i < MI; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = wm + i * 16 + accumulator_row(lane, half * 2);
        uint32_t* const to = reinterpret_cast<uint32_t*>(tiles + swizzled<BN>(row, col / 8) + col % 8);
        *to = T::round(acc[i][j][half * 2] + add[0]) | uint32_t(T::round(acc[i][j][half * 2 + 1] + add[1])) << 16;
      }
  }
  __syncthreads();
  uint16_t* const y = static_cast<uint16_t*>(g.y);
  const bool vector = g.N % 8 == 0;  // y was allocated by us, aligned to 16 bytes
#pragma unroll 1
  for (int i = threadIdx.x; i < BM * BN / 8; i += Tile::THREADS) {
    const int row = i / (BN / 8), chunk = i % (BN / 8), left = least(g.N - n0 - chunk * 8, 8);
    if (m0 + row >= g.M || left <= 0) continue;
    const uint16_t* const from = tiles + swizzled<BN>(row, chunk);
    uint16_t* const to = y + int64_t(m0 + row) * g.N + n0 + chunk * 8;
    if (vector)
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    else
      for (int j = 0; j < left; ++j) to[j] = from[j];
  }
}

template <class T, class Tile, int RANKS, bool W_K_MAJOR>
const char* launch_linear(const Linear& g, void* stream) {
  static_assert(Tile::BM * Tile::BN <= Tile::STAGES * stage_size<Tile, RANKS>(), "y is staged where the tiles were");
  constexpr int shared = Tile::STAGES * stage_size<Tile, RANKS>() * 2;
  static_assert(shared <= MAX_SHARED, "fewer stages or smaller tiles");
  const dim3 grid(cdiv(g.M, Tile::BM) * cdiv(g.N, Tile::BN));
  return launch(lowrank_linear_kernel<T, Tile, RANKS, W_K_MAJOR>, grid, Tile::THREADS, shared, stream, g);
}

template <class T, class Tile, int RANKS>
const char* linear_by_weight(const Linear& g, void* stream) {
  return g.w.k_major ? launch_linear<T, Tile, RANKS, true>(g, stream) : launch_linear<T, Tile, RANKS, false>(g, stream);
}

template <class T, class Tile>
const char* linear_by_rank(const Linear& g, void* stream) {
  if (!g.down.data) return linear_by_weight<T, Tile, 0>(g, stream);
  if (g.R <= 16) return linear_by_weight<T, Tile, 16>(g, stream);
  return linear_by_weight<T, Tile, MAX_RANK_BESIDE>(g, stream);
}

template <class T>
const char* linear(const Linear& g, int32_t tile, void* stream) {
  return tile == LARGE_TILE ? linear_by_rank<T, LargeTile>(g, stream) : linear_by_rank<T, SmallTile>(g, stream);
}

}  // namespace efft::cuda
