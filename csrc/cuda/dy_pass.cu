// dp = dy @ up.T and dup = p.T @ dy from one read of dy; ddown.T = dp.T @ x is the second product alone. And the sum of
// slots.
#include <cstring>

#include "tile.h"

namespace efft::cuda {
namespace {

// A block processes BM rows of dy at a time, in BN columns, for BR of the ranks. A wide BN means few slots of dp, a
// large BR few reads of dy; both cost registers.
template <int BN_, int BR_>
struct PassTile {
  static constexpr int BM = DY_PASS_ROWS, BN = BN_, BR = BR_, WARPS = BM / 16, THREADS = WARPS * WARP, STAGES = 3;
  static constexpr int WN = BN / WARPS, STAGE = BM * (BN + BR);
};

using NarrowPass = PassTile<256, 16>;
using MiddlePass = PassTile<256, 32>;
using WidePass = PassTile<128, 64>;

template <class T, class Tile, bool DP>
__global__ void __launch_bounds__(Tile::THREADS, 1) dy_pass_kernel(const __grid_constant__ DyPass g) {
  launch_dependents();
  wait_for_prerequisites();
  constexpr int BM = Tile::BM, BN = Tile::BN, BR = Tile::BR, NJ = Tile::WN / 8;
  EFFT_SHARED(shared);
  uint16_t* const up_tile = reinterpret_cast<uint16_t*>(shared);  // [BR, BN], for the lifetime of the block
  uint16_t* const tiles = up_tile + (DP ? BR * BN : 0);
  const auto dy_tile = [&](int stage) { return tiles + stage * Tile::STAGE; };  // [BM, BN]
  const auto p_tile = [&](int stage) { return dy_tile(stage) + BM * BN; };      // [BM, BR]

  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, wn = warp * Tile::WN;
  const int run = blockIdx.x, chunk = blockIdx.y, n0 = chunk * BN, r0 = blockIdx.z * BR;
  const int begin = run * g.rows, end = least(begin + g.rows, g.M);
  // The number of blocks of 16 ranks and of 16 columns that exist.
  const int r_blocks = least(cdiv(g.R - r0, 16), BR / 16), n_blocks = least(cdiv(g.N - n0, 16), BN / 16);

  // This copy belongs to the first group of copies.
  if constexpr (DP) load<BR, BN, Tile::THREADS, false>(up_tile, g.up, r0, n0, g.R, g.N);
  const auto load_rows = [&](int step, int stage) {
    load<BM, BN, Tile::THREADS, false>(dy_tile(stage), g.dy, begin + step * BM, n0, end, g.N);
    load<BM, BR, Tile::THREADS, false>(p_tile(stage), g.p, begin + step * BM, r0, end, g.R);
  };

  float dup[BR / 16][NJ][4] = {};
  const auto use = [&](int step, int stage) {
    const uint16_t *const dy = dy_tile(stage), *const p = p_tile(stage);
    if constexpr (DP) {
      // Every warp has 16 rows and all columns, which dp sums over.
      float dp[BR / 8][4] = {};
#pragma unroll 4
      for (int n = 0; n < n_blocks; ++n) {
        uint32_t fa[4], fb[4];
        fragment_a<BN>(fa, dy, warp * 16, n * 16, lane);
#pragma unroll
        for (int r = 0; r < BR / 16; ++r) {
          if (r >= r_blocks) break;
          fragment_b_turned<BN>(fb, up_tile, n * 16, r * 16, lane);
          T::mma(dp[2 * r], fa, fb);
          T::mma(dp[2 * r + 1], fa, fb + 2);
        }
      }
#pragma unroll
      for (int j = 0; j < BR / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int m = begin + step * BM + warp * 16 + accumulator_row(lane, e);
          const int r = r0 + j * 8 + accumulator_col(lane, e);
          if (m >= end || r >= g.R) continue;
          if (gridDim.y == 1)
            static_cast<uint16_t*>(g.dp_slots)[int64_t(m) * g.R + r] = T::round(dp[j][e]);
          else
            static_cast<float*>(g.dp_slots)[(int64_t(chunk) * g.M + m) * g.R + r] = dp[j][e];
        }
    }
    // Every warp has WN columns and all rows, which dup sums over.
#pragma unroll
    for (int m = 0; m < BM; m += 16) {
      uint32_t fa[BR / 16][4], fb[4];
#pragma unroll
      for (int r = 0; r < BR / 16; ++r) fragment_a_turned<BR>(fa[r], p, r * 16, m, lane);
#pragma unroll
      for (int j = 0; j < NJ / 2; ++j) {
        fragment_b<BN>(fb, dy, m, wn + j * 16, lane);
#pragma unroll
        for (int r = 0; r < BR / 16; ++r) {
          T::mma(dup[r][2 * j], fa[r], fb);
          T::mma(dup[r][2 * j + 1], fa[r], fb + 2);
        }
      }
    }
  };
  pipeline<Tile::STAGES>(cdiv(end - begin, BM), load_rows, use);

#pragma unroll
  for (int i = 0; i < BR / 16; ++i)
#pragma unroll
    for (int j = 0; j < NJ; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = r0 + i * 16 + accumulator_row(lane, e), n = n0 + wn + j * 8 + accumulator_col(lane, e);
        if (r >= g.R || n >= g.N) continue;
        const int64_t at = int64_t(r) * g.dup_row + int64_t(n) * g.dup_col;
        if (gridDim.x == 1)
          static_cast<uint16_t*>(g.dup_slots)[at] = T::round(dup[i][j][e]);
        else
          static_cast<float*>(g.dup_slots)[int64_t(run) * g.R * g.N + at] = dup[i][j][e];
      }
}

template <class T, class Tile>
const char* pass(const DyPass& g, void* stream) {
  const dim3 grid(cdiv(g.M, g.rows), cdiv(g.N, Tile::BN), cdiv(g.R, Tile::BR));
  constexpr int tiles = Tile::STAGES * Tile::STAGE * 2, with_up = tiles + Tile::BR * Tile::BN * 2;
  static_assert(with_up <= MAX_SHARED, "fewer stages or smaller tiles");
  if (!g.up.data) return launch(dy_pass_kernel<T, Tile, false>, grid, Tile::THREADS, tiles, stream, g);
  return launch(dy_pass_kernel<T, Tile, true>, grid, Tile::THREADS, with_up, stream, g);
}

template <class T>
const char* pass_by_rank(const DyPass& g, void* stream) {
  if (g.R <= NarrowPass::BR) return pass<T, NarrowPass>(g, stream);
  if (g.R <= MiddlePass::BR) return pass<T, MiddlePass>(g, stream);
  return pass<T, WidePass>(g, stream);
}

// A block of reduce_kernel sums SUMMED vectors of four numbers, one in each lane. Its warps take every SUM_WARPS-th
// slot, so that reads of many slots are in flight at once, and the first warp adds up the sums of the others.
constexpr int SUMMED = WARP, SUM_WARPS = 8, SUM_THREADS = SUM_WARPS * WARP, SUM_SHARED = SUM_THREADS * 16;

int64_t vectors(const Reduction& g) { return (g.size + 3) / 4; }

template <class T>
__global__ void __launch_bounds__(SUM_THREADS) reduce_kernel(const __grid_constant__ Reductions all) {
  launch_dependents();
  wait_for_prerequisites();
  EFFT_SHARED(raw);
  float* const sums = reinterpret_cast<float*>(raw);  // [SUM_WARPS, WARP, 4]
  const int first_blocks = int((all.of[0].size + 4 * SUMMED - 1) / (4 * SUMMED));
  const bool second = int(blockIdx.x) >= first_blocks;
  const Reduction& g = all.of[second];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64_t vector = int64_t(blockIdx.x - (second ? first_blocks : 0)) * SUMMED + lane, at = vector * 4;
  float sum[4] = {};
  if (at < g.size) {
    if (g.size % 4 == 0) {
#pragma unroll 8
      for (int s = warp; s < g.count; s += SUM_WARPS) {
        const uint4 bits = *reinterpret_cast<const uint4*>(g.slots + s * g.size + at);
        float four[4];
        memcpy(four, &bits, 16);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] += four[e];
      }
    } else {
      for (int s = warp; s < g.count; s += SUM_WARPS)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] += at + e < g.size ? g.slots[s * g.size + at + e] : 0.f;
    }
  }
  memcpy(sums + threadIdx.x * 4, sum, 16);
  __syncthreads();
  if (warp || at >= g.size) return;
#pragma unroll
  for (int w = 1; w < SUM_WARPS; ++w)
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] += sums[(w * WARP + lane) * 4 + e];
  uint16_t* const out = static_cast<uint16_t*>(g.out);
  if (!g.ranks) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (at + e < g.size) out[at + e] = T::round(sum[e]);
    return;
  }
  // Vector i of the accumulators belongs to thread i % 128, 8 ranks and 64 columns.
  const int thread = int(vector % 128), eights = g.ranks / 8;
  const int n0 = int(vector / 128 / eights) * HOPPER_PASS_COLUMNS + thread / WARP * 16;
  const int r0 = int(vector / 128 % eights) * 8;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int n = n0 + accumulator_row(lane, e), r = r0 + accumulator_col(lane, e);
    if (n < g.N && r < g.R) out[int64_t(n) * g.col + int64_t(r) * g.row] = T::round(sum[e]);
  }
}

}  // namespace

int32_t dy_pass_columns(int32_t R) { return R <= MiddlePass::BR ? MiddlePass::BN : WidePass::BN; }

// Minimizes the work of the slowest block, counted in tiles of 64 x 64 numbers: the tiles of its rows, for each 64 rows
// the read of p and the exchange of dp, and its part of a slot, which is written and read in float32.
HopperPassPlan plan_hopper_pass(int32_t M, int32_t N, int32_t R, bool dp) {
  HopperPassPlan best;
  if (R > HOPPER_PASS_RANK) return best;
  const int rows = cdiv(M, HOPPER_PASS_ROWS), columns = cdiv(N, HOPPER_PASS_COLUMNS), ranks = R <= 16 ? 16 : 32;
  double least_cost = 0;
  const auto consider = [&](int tiles, int parts, int at_once, double step, double rest) {
    const int wanted = at_once / parts;
    if (!wanted || tiles * parts < columns) return;
    const int each = cdiv(rows, least(wanted, rows));
    const double cost = each * step + rest;
    if (best.tiles && cost >= least_cost) return;
    least_cost = cost;
    best.tiles = tiles, best.parts = parts, best.rows = each * HOPPER_PASS_ROWS;
    best.runs = cdiv(rows, each), best.ranks = ranks;
  };
  // A cost is counted in tiles loaded by a block, plus what its p and its slots cost.
  const double p = 0.015 * ranks, slot = ranks / 16.0;
  if (dp) {
    // Up to 9 tiles (with 32 ranks 6), beyond which clusters were as fast on an H200; below, the exchange of dp took
    // most of their time.
    for (int tiles : {2, 3, 5, 6, ranks == 16 ? 9 : 6})
      consider(tiles, 1, HOPPER_PASS_WORKERS * BLOCKS_AT_ONCE, HOPPER_PASS_WORKERS * (tiles + p),
               HOPPER_PASS_WORKERS * tiles * slot);
    // Clusters, never of one block: st.async in a launch without clusters is an illegal instruction (seen on an H200).
    for (int parts : {2, 4})
      for (int tiles : {6, 9, 12, ranks == 16 ? 16 : 12})
        consider(tiles, parts, parts == 4 ? BLOCKS_IN_FOURS : BLOCKS_AT_ONCE, tiles + p, tiles * slot);
  } else {
    for (int tiles : {6, 4, 3, 2}) consider(tiles, cdiv(columns, tiles), BLOCKS_AT_ONCE, tiles + p, tiles * slot);
  }
  return best;
}

const char* dy_pass(Dtype dtype, const DyPass& g, void* stream) {
  return dtype == Dtype::bf16 ? pass_by_rank<Bf16>(g, stream) : pass_by_rank<F16>(g, stream);
}

const char* reduce(Dtype dtype, const Reductions& g, void* stream) {
  int64_t blocks = 0;
  for (const Reduction& r : g.of) blocks += (vectors(r) + SUMMED - 1) / SUMMED;
  if (!blocks) return nullptr;
  const auto kernel = dtype == Dtype::bf16 ? reduce_kernel<Bf16> : reduce_kernel<F16>;
  return launch(kernel, dim3(unsigned(blocks)), SUM_THREADS, SUM_SHARED, stream, g);
}

}  // namespace efft::cuda
