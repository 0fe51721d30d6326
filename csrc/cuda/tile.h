// Tiles in shared memory: their layout, their loads from global memory, and how the tensor cores read them.
#pragma once

#include "device.h"
#include "kernels.h"

namespace efft::cuda {

constexpr int BK = 64;  // terms of a sum per pipeline step: rows of 128 bytes
constexpr int WARP = 32;
constexpr int MAX_SHARED = 163 << 10;  // bytes per block at compute capability 8.0, the least of the three

// The position, in numbers, of 16-byte chunk `chunk` of row `row` in a tile with rows of W numbers.
//
// ldmatrix reads one chunk of each of eight rows at a time. In eight adjacent rows the same chunk is moved to eight
// different places of 128 bytes, so these reads hit each of the 32 banks once, and so do the writes of a row.
template <int W>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  constexpr int CHUNKS = W / 8 < 8 ? W / 8 : 8, ROWS = 8 / CHUNKS;  // per 128-byte line
  static_assert(W >= 16 && (W & (W - 1)) == 0, "rows are a power of two");
  return row * W + (chunk ^ (row / ROWS % CHUNKS)) * 8;
}

__host__ __device__ constexpr int cdiv(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int least(int a, int b) { return a < b ? a : b; }

template <bool GROUPED>
__device__ __forceinline__ int64_t row_offset(const Operand& g, int row) {
  return GROUPED ? int64_t(row / g.group) * g.outer + int64_t(row % g.group) * g.row : int64_t(row) * g.row;
}

// Starts to copy rows row0 ... and columns col0 ... of g into a tile [ROWS, W], with zeros beyond `rows` and `cols`.
// The caller commits. All THREADS threads take part; each keeps to one column of chunks.
template <int ROWS, int W, int THREADS, bool GROUPED>
__device__ __forceinline__ void load(uint16_t* tile, const Operand& g, int row0, int col0, int rows, int cols) {
  constexpr int CHUNKS = W / 8, STEP = THREADS / CHUNKS, COUNT = cdiv(ROWS, STEP);
  static_assert(THREADS % CHUNKS == 0, "every thread has one column of chunks");
  const uint16_t* const data = static_cast<const uint16_t*>(g.data);
  const int chunk = threadIdx.x % CHUNKS, first = threadIdx.x / CHUNKS, col = col0 + chunk * 8;
  const int there = least(cols - col, 8);  // numbers of the chunk that exist; none if below 1
  if (g.vector) {
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
      const int i = first + n * STEP, row = row0 + i;
      if (ROWS % STEP != 0 && i >= ROWS) break;
      const bool inside = row < rows && there > 0;
      const int64_t from = inside ? row_offset<GROUPED>(g, row) + col : 0;
      cp_async16(tile + swizzled<W>(i, chunk), data + from, inside ? 2 * there : 0);
    }
  } else {
    // Any strides, at the cost of speed.
#pragma unroll 1
    for (int i = first; i < ROWS; i += STEP) {
      const int row = row0 + i;
      uint16_t* const to = tile + swizzled<W>(i, chunk);
      const uint16_t* const from = data + (row < rows ? row_offset<GROUPED>(g, row) : 0);
#pragma unroll
      for (int j = 0; j < 8; ++j) to[j] = row < rows && j < there ? from[int64_t(col + j) * g.col] : uint16_t(0);
    }
  }
}

// Loads a tile of an operand of a product: MN rows (of a) or columns (of b) from mn0 on, BK terms from k0 on. It is
// [MN, BK] if k-major and otherwise [BK, MN], which has the same size.
template <int MN, int THREADS, bool GROUPED = false>
__device__ __forceinline__ void load_operand(uint16_t* tile, const Operand& g, bool k_major, int mn0, int k0, int mn,
                                             int k) {
  if (k_major)
    load<MN, BK, THREADS, GROUPED>(tile, g, mn0, k0, mn, k);
  else
    load<BK, MN, THREADS, GROUPED>(tile, g, k0, mn0, k, mn);
}

// Loads the fragment of a 16 x 16 block of a from a tile [M, W], at row m and column k.
template <int W>
__device__ __forceinline__ void fragment_a(uint32_t (&f)[4], const uint16_t* tile, int m, int k, int lane) {
  ldmatrix<false>(f, tile + swizzled<W>(m + lane % 16, k / 8 + lane / 16));
}

// Loads the same fragment from a tile [K, W], in which a is transposed.
template <int W>
__device__ __forceinline__ void fragment_a_turned(uint32_t (&f)[4], const uint16_t* tile, int m, int k, int lane) {
  ldmatrix<true>(f, tile + swizzled<W>(k + lane % 8 + lane / 16 * 8, m / 8 + lane / 8 % 2));
}

// Loads the fragments of two adjacent 16 x 8 blocks of b from a tile [K, W], at row k and column n: f[0], f[1] are one
// fragment.
template <int W>
__device__ __forceinline__ void fragment_b(uint32_t (&f)[4], const uint16_t* tile, int k, int n, int lane) {
  ldmatrix<true>(f, tile + swizzled<W>(k + lane % 16, n / 8 + lane / 16));
}

// Loads the same fragments from a tile [N, W], in which b is transposed.
template <int W>
__device__ __forceinline__ void fragment_b_turned(uint32_t (&f)[4], const uint16_t* tile, int k, int n, int lane) {
  ldmatrix<false>(f, tile + swizzled<W>(n + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2));
}

// acc += a tile's rows m ... times a tile's columns n ..., in `steps` steps of 16 terms and `blocks` blocks of 16
// columns. k-major or not as for load_operand(). UNROLL: the steps that are unrolled, so that reads overlap with
// tensor-core work.
template <class T, int BM, int BN, int UNROLL, int MI, int NJ>
__device__ __forceinline__ void multiply(float (&acc)[MI][NJ][4], const uint16_t* a, bool a_k_major, int m,
                                         const uint16_t* b, bool b_k_major, int n, int steps, int lane,
                                         int blocks = NJ / 2) {
#pragma unroll UNROLL
  for (int step = 0; step < BK / 16; ++step) {
    if (step >= steps) break;
    uint32_t fa[MI][4], fb[NJ / 2][4];
#pragma unroll
    for (int i = 0; i < MI; ++i) {
      if (a_k_major)
        fragment_a<BK>(fa[i], a, m + i * 16, step * 16, lane);
      else
        fragment_a_turned<BM>(fa[i], a, m + i * 16, step * 16, lane);
    }
#pragma unroll
    for (int j = 0; j < NJ / 2; ++j) {
      if (j >= blocks) break;
      if (b_k_major)
        fragment_b_turned<BK>(fb[j], b, step * 16, n + j * 16, lane);
      else
        fragment_b<BN>(fb[j], b, step * 16, n + j * 16, lane);
#pragma unroll
      for (int i = 0; i < MI; ++i) {
        T::mma(acc[i][2 * j], fa[i], fb[j]);
        T::mma(acc[i][2 * j + 1], fa[i], fb[j] + 2);
      }
    }
  }
}

// The row and column of element e of the accumulator of an m16n8 product, in its 16 x 8 block.
__device__ __forceinline__ int accumulator_row(int lane, int e) { return lane / 4 + e / 2 * 8; }
__device__ __forceinline__ int accumulator_col(int lane, int e) { return lane % 4 * 2 + e % 2; }

// load(step, stage) starts the copies of a step; use(step, stage) computes with them STAGES - 1 steps later. When use()
// runs, the whole step is in shared memory, and no thread still reads what the next load() overwrites.
template <int STAGES, class Load, class Use>
__device__ __forceinline__ void pipeline(int steps, Load load, Use use) {
#pragma unroll
  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < steps) load(step, step);
    cp_async_commit();
  }
  int stage = 0, next = STAGES - 1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    if (step + STAGES - 1 < steps) load(step + STAGES - 1, next);
    cp_async_commit();  // empty at the end, so that the wait above always has the same count
    use(step, stage);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    next = next + 1 == STAGES ? 0 : next + 1;
  }
}

// Maps a tile number to (row, column): down 8 rows, then right, so that concurrent blocks share operands in the cache.
__device__ __forceinline__ void tile_of(int tile, int tiles_m, int tiles_n, int& tm, int& tn) {
  constexpr int GROUP = 8;
  const int first = tile / (GROUP * tiles_n) * GROUP, rows = least(tiles_m - first, GROUP);
  tile %= GROUP * tiles_n;
  tm = first + tile % rows;
  tn = tile / rows;
}

}  // namespace efft::cuda
