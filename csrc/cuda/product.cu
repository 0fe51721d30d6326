// c = scale * a @ b, several of them in one launch: p = x @ down, the group update, its backward, the merge of a group.
#include "tile.h"

namespace efft::cuda {
namespace {

constexpr int BM = SMALL_TILE, BN = SMALL_TILE, WARPS = 4, THREADS = WARPS * WARP, STAGES = 3;
constexpr int STAGE = (BM + BN) * BK;

// The number of products that one launch takes. A few are the common case, and arguments are copied at every launch.
constexpr int FEW = 2, MANY = 256;

template <int MOST>
struct Products {
  Product of[MOST];
  int32_t count;
};
static_assert(sizeof(Products<MANY>) <= 32764, "arguments of a kernel, since CUDA 12.1");

template <class T, int MOST>
__global__ void __launch_bounds__(THREADS, 2) products_kernel(const __grid_constant__ Products<MOST> all) {
  launch_dependents();
  wait_for_prerequisites();
  EFFT_SHARED(shared);
  uint16_t* const tiles = reinterpret_cast<uint16_t*>(shared);
  // Finds the last product whose first tile is not beyond this block's.
  int low = 0, high = all.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (all.of[middle].first_tile <= int(blockIdx.x) ? low : high) = middle;
  }
  const Product g = all.of[low];
  int tm, tn;
  tile_of(blockIdx.x - g.first_tile, cdiv(g.M, BM), cdiv(g.N, BN), tm, tn);
  const int m0 = tm * BM, n0 = tn * BN;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, wm = warp / 2 * 32, wn = warp % 2 * 32;

  const auto load = [&](int step, int stage) {
    load_operand<BM, THREADS, true>(tiles + stage * STAGE, g.a, g.a.k_major, m0, step * BK, g.M, g.K);
    load_operand<BN, THREADS, true>(tiles + stage * STAGE + BM * BK, g.b, g.b.k_major, n0, step * BK, g.N, g.K);
  };
  float acc[2][4][4] = {};
  const auto use = [&](int step, int stage) {
    const uint16_t* const a = tiles + stage * STAGE;
    const int steps = cdiv(least(g.K - step * BK, BK), 16);
    multiply<T, BM, BN, 1>(acc, a, g.a.k_major, wm, a + BM * BK, g.b.k_major, wn, steps, lane);
  };
  pipeline<STAGES>(cdiv(g.K, BK), load, use);

  uint16_t* const c = static_cast<uint16_t*>(g.c);
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int m = m0 + wm + i * 16 + accumulator_row(lane, e), n = n0 + wn + j * 8 + accumulator_col(lane, e);
        if (m >= g.M || n >= g.N) continue;
        uint16_t* const to = c + int64_t(m) * g.c_row + int64_t(n) * g.c_col;
        // The whole formula is rounded once.
        *to = T::round(acc[i][j][e] * g.scale + (g.adds ? T::widen(*to) : 0.0f));
      }
}

template <class T, int MOST>
const char* launch_products(Product* list, int32_t count, void* stream) {
  Products<MOST> g{};
  int32_t tiles = 0;
  for (g.count = 0; g.count < count; ++g.count) {
    list[g.count].first_tile = tiles;
    tiles += cdiv(list[g.count].M, BM) * cdiv(list[g.count].N, BN);
    g.of[g.count] = list[g.count];
  }
  return tiles ? launch(products_kernel<T, MOST>, dim3(tiles), THREADS, STAGES * STAGE * 2, stream, g) : nullptr;
}

template <class T>
const char* launch_all(Product* list, int32_t count, void* stream) {
  if (count <= FEW) return launch_products<T, FEW>(list, count, stream);
  for (int32_t i = 0; i < count; i += MANY)
    if (const char* error = launch_products<T, MANY>(list + i, least(count - i, MANY), stream)) return error;
  return nullptr;
}

}  // namespace

const char* use_device([[maybe_unused]] int32_t index) {
#ifndef EFFT_SIM
  if (const cudaError_t error = cudaSetDevice(index); error != cudaSuccess) return cudaGetErrorString(error);
#endif
  return nullptr;
}

const char* products(Dtype dtype, Product* list, int32_t count, void* stream) {
  return dtype == Dtype::bf16 ? launch_all<Bf16>(list, count, stream) : launch_all<F16>(list, count, stream);
}

}  // namespace efft::cuda
