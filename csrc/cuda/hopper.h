// y = [x | p] @ [w ; up] + bias for compute capability 9.0. Compiled once per dtype, in hopper_*.cu.
//
// The kernel is persistent: blocks process tile after tile. One thread fills stages of shared memory by TMA and two
// consumer warpgroups multiply from there, so that the copies of the next tile go on while y of the last one is stored.
// Where p is computed inside the matmul, down is stacked below w: p takes RANKS more columns of the same wgmma
// instructions, in every block.
#pragma once

#include <cstring>
#include <type_traits>

#include "hopper_device.h"
#include "tile.h"

namespace efft::cuda {

constexpr int HOPPER_SHARED = 227 << 10;  // bytes per block at compute capability 9.0
constexpr int WARPGROUP = 128, CONSUMERS = 2, HOPPER_THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232, REGISTERS = 168;  // per thread; the last one at launch
static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= (1 + CONSUMERS) * REGISTERS,
              "else they never come");
constexpr int LINE = 128;        // bytes of a row of a tile, and of the widest swizzle
constexpr int CELLS = LINE / 2;  // 16-bit numbers in a LINE
constexpr int ALIGNMENT = 1024;  // of tiles, in bytes: the swizzle depends on bits 4 to 9 of an address
constexpr int WARP_ROWS = 16;    // rows of y that a warp of a consumer holds and stores
constexpr int CONSUMER_WARPS = CONSUMERS * WARPGROUP / WARP;
static_assert(CELLS == BK, "a row of a tile has the terms of a step");

struct HopperLinear {
  TensorMap x, w, down, up, p, y;
  int32_t M, N, K, R;
  const uint32_t* bias;  // [N / 2], two numbers each
  uint16_t* p_out;       // [M, R]
  int32_t p_row;
};

// A tile of y: 128 rows by BN columns. RANKS as in linear.h: p is computed for up to that many ranks, or read (0).
//
// CLUSTER adjacent blocks share the rows of x, each copying a part of them to all (multicast). The two consumers either
// take 64 rows each of one tile, or take whole tiles in turn (ALTERNATE), so that one stores y while the other keeps
// the tensor cores busy; that needs twice the accumulators, so the tile has fewer columns.
template <int BN_, int CLUSTER_, int RANKS_, bool ALTERNATE_>
struct HopperTile {
  static constexpr int BM = 128, BN = BN_, CLUSTER = CLUSTER_, RANKS = RANKS_;
  static constexpr bool ALTERNATE = ALTERNATE_;
  // w and down are stacked into one operand: p takes more columns of the same instruction.
  static constexpr int COLUMNS = BN + RANKS;
  static constexpr int X = BM * LINE, W = COLUMNS * LINE, STAGE = X + W;  // bytes
  static constexpr int BLOCKS = ALTERNATE ? 2 : 1;                        // blocks of 64 rows per consumer
  static constexpr int READERS = ALTERNATE ? 1 : CONSUMERS;               // consumers that read a stage
  // A warp stores its rows of y in parts, which are as wide as a swizzle allows.
  static constexpr int PART_COLS = BN % 64 == 0 ? 64 : 32, PART_LINE = 2 * PART_COLS, PART = WARP_ROWS * PART_LINE;
  static constexpr int ALL_PARTS = BN / PART_COLS, EXTRA = 2 * 8 * 8 + ALIGNMENT;
  static constexpr int STAGES = least((HOPPER_SHARED - EXTRA - 2 * CONSUMER_WARPS * PART) / STAGE, 6);
  // The number of buffers for parts of y: with more of them, fewer parts wait for an earlier store. It divides the
  // number of parts, so that every tile starts at the first buffer.
  static constexpr int FITTING = (HOPPER_SHARED - EXTRA - STAGES * STAGE) / (CONSUMER_WARPS * PART);
  static constexpr int PARTS = FITTING >= ALL_PARTS ? ALL_PARTS : ALL_PARTS % 2 == 0 && FITTING >= 2 ? 2 : 1;
  static_assert(COLUMNS <= 256 && STAGES >= 3 && STAGE % ALIGNMENT == 0 && X % ALIGNMENT == 0 && PART % ALIGNMENT == 0,
                "tiles fit");
};

template <class Tile>
struct HopperShared {
  struct {
    unsigned char x[Tile::X], w[Tile::W];
  } stages[Tile::STAGES];
  unsigned char y[CONSUMER_WARPS][Tile::PARTS][Tile::PART];
  uint64_t full[Tile::STAGES], empty[Tile::STAGES];
};

template <int N>
using Count = std::integral_constant<int, N>;

// The current stage of the ring, and the parity of the number of rounds.
template <int STAGES>
struct Ring {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ void skip(int steps) {
    stage += steps;
    parity ^= stage / STAGES & 1;
    stage %= STAGES;
  }
};

// The matrix descriptor that wgmma reads a tile by: its start address, the bytes from one group of its rows (or
// columns) to the next, and its swizzle. For a k-major tile `stride` leads from eight rows to the next eight. Otherwise
// `stride` leads from eight terms to the next eight, and `leading` from one swizzle width of rows to the next.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, int leading, int stride, int swizzle) {
  const uint64_t kind = swizzle == 128 ? 1 : swizzle == 64 ? 2 : 3;
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | kind << 62;
}

// The descriptor of term 16 * k16 of a tile [rows, 64 terms], or of a tile [64 terms or `terms`, rows] in parts of 64
// rows.
template <bool K_MAJOR>
__device__ __forceinline__ uint64_t operand(uint32_t tile, int k16, int terms) {
  return K_MAJOR ? descriptor(tile + k16 * 32, 16, 8 * LINE, LINE)
                 : descriptor(tile + k16 * 16 * LINE, terms * LINE, 8 * LINE, LINE);
}

// Stores a thread's part of p: rows m and m + 8, columns col, col + 1, col + 8, ...
template <int RANKS>
__device__ __forceinline__ void store_p(const HopperLinear& g, const uint32_t (&p)[RANKS / 16][4], int m, int col) {
#pragma unroll
  for (int i = 0; i < RANKS / 4; ++i) {
    const int r = i / 2 * 8 + col;
    if (m + i % 2 * 8 >= g.M || r >= g.R) continue;
    uint16_t* const to = g.p_out + int64_t(m + i % 2 * 8) * g.p_row + r;
    if (g.R % 2 == 0 && g.p_row % 2 == 0) {
      *reinterpret_cast<uint32_t*>(to) = p[i / 4][i % 4];
    } else {
      to[0] = uint16_t(p[i / 4][i % 4]);
      if (r + 1 < g.R) to[1] = uint16_t(p[i / 4][i % 4] >> 16);
    }
  }
}

template <class T, class Tile, bool W_K_MAJOR, bool LOW_K_MAJOR>
__global__ void __launch_bounds__(HOPPER_THREADS, 1) hopper_linear_kernel(const __grid_constant__ HopperLinear g) {
#if defined(EFFT_HOPPER)
  constexpr int BM = Tile::BM, BN = Tile::BN, RANKS = Tile::RANKS, CLUSTER = Tile::CLUSTER, STAGES = Tile::STAGES;
  constexpr int UP_TERMS = RANKS ? RANKS : BK;  // rows of a tile of up that is not k-major
  static_assert(RANKS == 0 || (W_K_MAJOR && !LOW_K_MAJOR),
                "w and down are one operand, up has its columns side by side");
  EFFT_SHARED(raw);
  // The offset is the same in every block of the cluster, because a multicast copy goes to one offset in all of them.
  const uint32_t skip = (ALIGNMENT - shared_address(raw) % ALIGNMENT) % ALIGNMENT;
  auto& shared = *reinterpret_cast<HopperShared<Tile>*>(raw + skip);
  const uint32_t stages = shared_address(shared.stages);
  const auto x_tile = [&](int stage) { return stages + stage * Tile::STAGE; };
  const auto w_tile = [&](int stage) { return x_tile(stage) + Tile::X; };

  const int rank = CLUSTER > 1 ? cluster_rank() : 0, group = threadIdx.x / WARPGROUP;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(shared.full + i, 1);
      barrier_init(shared.empty + i, Tile::READERS * CLUSTER);
    }
    barrier_init_fence();
  }
  cluster_sync();
  // The code above may run concurrently with the previous kernel; the code below reads what that kernel wrote.
  launch_dependents();
  wait_for_prerequisites();

  const int tiles_m = cdiv(g.M, BM), sets_n = cdiv(cdiv(g.N, BN), CLUSTER);  // sets of CLUSTER tiles, one per block
  const int k_steps = cdiv(g.K, BK), r_steps = RANKS ? 1 : cdiv(g.R, BK);
  const int first = blockIdx.x / CLUSTER, step_of_sets = gridDim.x / CLUSTER;

  if (group == 0) {
    leave_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) {
      prefetch_map(&g.x), prefetch_map(&g.w), prefetch_map(&g.up), prefetch_map(&g.y);
      prefetch_map(RANKS ? &g.down : &g.p);
      Ring<STAGES> ring;
      const auto load_rows = [&](const TensorMap* map, int col, int m0) {
        constexpr int ROWS = BM / CLUSTER;
        const uint32_t to = x_tile(ring.stage) + rank * ROWS * LINE;
        if constexpr (CLUSTER > 1)
          tma_load_all(to, map, col, m0 + rank * ROWS, shared.full + ring.stage, (1 << CLUSTER) - 1);
        else
          tma_load(to, map, col, m0, shared.full + ring.stage);
      };
      // Loads a tile of w or up, in one box or in one box per 64 columns.
      const auto load_columns = [&](const TensorMap* map, bool k_major, int n0, int k0, int terms) {
        if (k_major) {
          tma_load(w_tile(ring.stage), map, k0, n0, shared.full + ring.stage);
        } else {
#pragma unroll
          for (int i = 0; i < cdiv(BN, CELLS); ++i)
            tma_load(w_tile(ring.stage) + i * terms * LINE, map, n0 + i * CELLS, k0, shared.full + ring.stage);
        }
      };
#pragma unroll 1
      for (int set = first; set < tiles_m * sets_n; set += step_of_sets) {
        int tm, tn;
        tile_of(set, tiles_m, sets_n, tm, tn);
        const int m0 = tm * BM, n0 = (tn * CLUSTER + rank) * BN;
#pragma unroll 1
        for (int step = 0; step < k_steps; ++step, ring.next()) {
          barrier_wait(shared.empty + ring.stage, ring.parity ^ 1);
          barrier_expect(shared.full + ring.stage, Tile::STAGE);
          load_rows(&g.x, step * BK, m0);
          load_columns(&g.w, W_K_MAJOR, n0, step * BK, BK);
          if constexpr (RANKS > 0)
            tma_load(w_tile(ring.stage) + BN * LINE, &g.down, step * BK, 0, shared.full + ring.stage);
        }
#pragma unroll 1
        for (int step = 0; step < r_steps; ++step, ring.next()) {
          barrier_wait(shared.empty + ring.stage, ring.parity ^ 1);
          barrier_expect(shared.full + ring.stage,
                         (RANKS ? 0 : Tile::X) + (LOW_K_MAJOR ? BN * LINE : cdiv(BN, CELLS) * UP_TERMS * LINE));
          if constexpr (RANKS == 0) load_rows(&g.p, step * BK, m0);
          load_columns(&g.up, LOW_K_MAJOR, n0, step * BK, UP_TERMS);
        }
      }
    }
    // A block stays until no other block of the cluster can still arrive at its barriers.
    cluster_sync();
  } else {
    take_registers<CONSUMER_REGISTERS>();
    const int consumer = group - 1, thread = threadIdx.x % WARPGROUP, warp = thread / WARP, lane = threadIdx.x % WARP;
    // Rows of the tile: the first of this warp, and that of d[0], in the first block of 64 rows.
    const int warp_row = (Tile::ALTERNATE ? 0 : consumer * 64) + warp * WARP_ROWS, row = warp_row + lane / 4;
    const int col = lane % 4 * 2;  // the column of d[0]
    const uint32_t a_offset = Tile::ALTERNATE ? 0 : consumer * 64 * LINE;
    unsigned char* const y_parts = shared.y[consumer * WARPGROUP / WARP + warp][0];
    Ring<STAGES> ring;
    // Releases the stage in every block of the cluster, because each of them fills a part of the others' x.
    const auto release = [&](int stage) {
      if (thread < CLUSTER) barrier_arrive(shared.empty + stage, thread);
    };
    if (Tile::ALTERNATE && consumer == 1) ring.skip(k_steps + r_steps);

    constexpr int EVERY = Tile::ALTERNATE ? CONSUMERS : 1;
#pragma unroll 1
    for (int set = first + (Tile::ALTERNATE ? consumer * step_of_sets : 0); set < tiles_m * sets_n;
         set += EVERY * step_of_sets) {
      int tm, tn;
      tile_of(set, tiles_m, sets_n, tm, tn);
      const int m0 = tm * BM, n0 = (tn * CLUSTER + rank) * BN;
      float acc[Tile::BLOCKS][Tile::COLUMNS / 2];  // y, then p
      // Consumers that alternate begin a tile when the other has seen all copies of the previous tile: the parity of a
      // barrier distinguishes only one round of the ring from the next.
      const auto hand_over = [&] {
        if (Tile::ALTERNATE && set + step_of_sets < tiles_m * sets_n)
          group_arrive(1 + (consumer ^ 1), CONSUMERS * WARPGROUP);
      };
      if (Tile::ALTERNATE && set != first) group_sync(1 + consumer, CONSUMERS * WARPGROUP);

      int last = 0;  // the stage that the tensor cores still read
#pragma unroll 1
      for (int step = 0; step < k_steps; ++step, ring.next()) {
        barrier_wait(shared.full + ring.stage, ring.parity);
        for (auto& d : acc) hold(d);
        wgmma_fence();
        const uint32_t a = x_tile(ring.stage) + a_offset, b = w_tile(ring.stage);
#pragma unroll
        for (int k16 = 0; k16 < BK / 16; ++k16)
#pragma unroll
          for (int block = 0; block < Tile::BLOCKS; ++block)
            Wgmma<T, Tile::COLUMNS>::template shared<W_K_MAJOR>(acc[block],
                                                                operand<true>(a + block * 64 * LINE, k16, 0),
                                                                operand<W_K_MAJOR>(b, k16, BK), step > 0 || k16 > 0);
        wgmma_commit();
        // One step stays in flight; the tensor cores are done with the stage before it.
        wgmma_wait<1>();
        if (step > 0) release(last);
        last = ring.stage;
      }

      // The bias of a thread's columns is read while the last matmuls are in flight.
      uint32_t bias[BN / 8];
      const auto read_bias = [&] {
#pragma unroll
        for (int j = 0; j < BN / 8; ++j) {
          const int n = n0 + j * 8 + col;
          bias[j] = g.bias && n < g.N ? g.bias[n / 2] : 0;
        }
      };
      if constexpr (RANKS > 0) {
        barrier_wait(shared.full + ring.stage, ring.parity);
        hand_over();
        wgmma_wait<0>();
        for (auto& d : acc) hold(d);
        release(last);
        // y uses p as rounded for storage, which is the p that the backward reads. Beyond R it would be nan where x is
        // infinite, because TMA fills down with zeros there.
        uint32_t p[Tile::BLOCKS][RANKS / 16][4], stored[Tile::BLOCKS][RANKS / 16][4];
#pragma unroll
        for (int block = 0; block < Tile::BLOCKS; ++block)
#pragma unroll
          for (int i = 0; i < RANKS / 4; ++i) {
            const float* const sum = acc[block] + BN / 2 + i * 2;
            const int r = i / 2 * 8 + col;
            p[block][i / 4][i % 4] = T::pack(r < g.R ? sum[0] : 0, r + 1 < g.R ? sum[1] : 0);
          }
        // p is stored while the matmuls are in flight, from other registers than the ones they read.
        memcpy(stored, p, sizeof p);
#pragma unroll
        for (int block = 0; block < Tile::BLOCKS; ++block)
          // clang-format off: its space after float would make another digest of what was proven on a GPU
          hold(p[block]), hold(reinterpret_cast<float(&)[BN / 2]>(acc[block]));
        // clang-format on
        wgmma_fence();
#pragma unroll
        for (int k16 = 0; k16 < RANKS / 16; ++k16)
#pragma unroll
          for (int block = 0; block < Tile::BLOCKS; ++block)
            // clang-format off: its space after float would make another digest of what was proven on a GPU
            Wgmma<T, BN>::template registers<LOW_K_MAJOR>(reinterpret_cast<float(&)[BN / 2]>(acc[block]), p[block][k16],
                                                          operand<LOW_K_MAJOR>(w_tile(ring.stage), k16, UP_TERMS));
        // clang-format on
        wgmma_commit();
        if (n0 == 0)
#pragma unroll
          for (int block = 0; block < Tile::BLOCKS; ++block)
            store_p<RANKS>(g, stored[block], m0 + row + block * 64, col);
        last = ring.stage;
        ring.next();
        read_bias();
      } else {
#pragma unroll 1
        for (int step = 0; step < r_steps; ++step, ring.next()) {
          barrier_wait(shared.full + ring.stage, ring.parity);
          const uint32_t a = x_tile(ring.stage) + a_offset, b = w_tile(ring.stage);
          // Issues `count` steps in a row without a branch between them, because a branch would make the tensor cores
          // wait.
          const auto products = [&](auto count) {
            for (auto& d : acc) hold(d);
            wgmma_fence();
#pragma unroll
            for (int k16 = 0; k16 < decltype(count)::value; ++k16)
#pragma unroll
              for (int block = 0; block < Tile::BLOCKS; ++block)
                Wgmma<T, BN>::template shared<LOW_K_MAJOR>(acc[block], operand<true>(a + block * 64 * LINE, k16, 0),
                                                           operand<LOW_K_MAJOR>(b, k16, UP_TERMS), 1);
            wgmma_commit();
          };
          if (g.R - step * BK <= 16)
            products(Count<1>());
          else if (g.R - step * BK <= 32)
            products(Count<2>());
          else
            products(Count<4>());
          wgmma_wait<1>();
          release(last);
          last = ring.stage;
        }
        hand_over();
        read_bias();
      }
      wgmma_wait<0>();
      for (auto& d : acc) hold(d);
      release(last);
      if (Tile::ALTERNATE) ring.skip(k_steps + r_steps);  // skips the other consumer's tile

      // y goes through shared memory to TMA in parts. Every warp stores its own rows, so that warps never wait for each
      // other here.
#pragma unroll
      for (int block = 0; block < Tile::BLOCKS; ++block)
#pragma unroll
        for (int i = 0; i < Tile::ALL_PARTS; ++i) {
          unsigned char* const part = y_parts + i % Tile::PARTS * Tile::PART;
          if (lane == 0) tma_store_wait_read<Tile::PARTS - 1>();
          warp_sync();
#pragma unroll
          for (int j = 0; j < Tile::PART_COLS / 16; ++j) {
            // Four blocks of 8 x 8: columns 16 j and 16 j + 8, rows 0 and 8 of the warp.
            uint32_t packed[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int square = i * Tile::PART_COLS / 8 + 2 * j + e / 2;
              const float* const d = acc[block] + square * 4 + e % 2 * 2;
              packed[e] =
                  T::pack(d[0] + T::widen(uint16_t(bias[square])), d[1] + T::widen(uint16_t(bias[square] >> 16)));
            }
            const int line = lane % 16, chunk = 2 * j + lane / 16;
            constexpr int CHUNKS = Tile::PART_LINE / 16;
            const int swizzled_chunk = chunk ^ (line * Tile::PART_LINE / LINE & (CHUNKS - 1));
            store_matrices(part + line * Tile::PART_LINE + swizzled_chunk * 16, packed);
          }
          fence_async();
          warp_sync();
          if (lane == 0) {
            const int n = n0 + i * Tile::PART_COLS;
            if (n < g.N) tma_store(&g.y, shared_address(part), n, m0 + warp_row + block * 64);
            tma_store_commit();
          }
        }
    }
    if (lane == 0) tma_store_wait_read<0>();
    cluster_sync();
  }
#endif
}

// A box has the rows of the tile by 64 terms, or for an operand that is not k-major the terms by 64 of the rows.
inline const char* map_operand(TensorMap* map, const Operand& g, int rows, int terms, int box_rows, int box_terms = BK,
                               int narrow = LINE) {
  if (g.k_major) return make_map(map, g.data, rows, terms, g.row, box_rows, BK, LINE);
  return make_map(map, g.data, terms, rows, g.row, box_terms, narrow / 2, narrow);
}

template <class T, class Tile, bool W_K_MAJOR, bool LOW_K_MAJOR>
const char* launch_hopper(const Linear& g, void* stream) {
  constexpr int BN = Tile::BN, RANKS = Tile::RANKS, ROWS = Tile::BM / Tile::CLUSTER;
  // A kernel compiled for another layout would wait for a number of bytes that never arrives.
  const bool as_compiled = g.w.k_major == W_K_MAJOR && g.up.k_major == LOW_K_MAJOR && (RANKS == 0) == !g.down.data &&
                           (RANKS == 0 || g.down.k_major);
  if (!as_compiled) return "operands lie otherwise than the kernel takes them";
  HopperLinear h{};
  h.M = g.M, h.N = g.N, h.K = g.K, h.R = g.R;
  h.bias = static_cast<const uint32_t*>(g.bias);
  h.p_out = static_cast<uint16_t*>(g.p), h.p_row = g.p_row;
  const char* error = map_operand(&h.x, g.x, g.M, g.K, ROWS);
  if (!error) error = map_operand(&h.w, g.w, g.N, g.K, BN);
  if (!error) error = map_operand(&h.up, g.up, g.N, g.R, BN, RANKS ? RANKS : BK);
  if (RANKS && !error) error = map_operand(&h.down, g.down, g.R, g.K, RANKS);
  if (!RANKS && !error) error = make_map(&h.p, g.p, g.M, g.R, g.p_row, ROWS, BK, LINE);
  if (!error) error = make_map(&h.y, g.y, g.M, g.N, g.N, WARP_ROWS, Tile::PART_COLS, Tile::PART_LINE);
  if (error) return error;
  const int sets = cdiv(g.M, Tile::BM) * cdiv(cdiv(g.N, BN), Tile::CLUSTER), there = multiprocessors() / Tile::CLUSTER;
  if (!there) return "this kernel is for compute capability 9.0";
  const auto kernel = hopper_linear_kernel<T, Tile, W_K_MAJOR, LOW_K_MAJOR>;
  return launch_clusters(kernel, (sets < there ? sets : there) * Tile::CLUSTER, Tile::CLUSTER, HOPPER_THREADS,
                         int(sizeof(HopperShared<Tile>)) + ALIGNMENT, stream, h);
}

template <class T, int BN, int CLUSTER, bool ALTERNATE>
const char* hopper_by_operands(const Linear& g, void* stream) {
  if (g.down.data) {
    if constexpr (BN <= 192) {
      if (g.R <= 16) return launch_hopper<T, HopperTile<BN, CLUSTER, 16, ALTERNATE>, true, false>(g, stream);
      using Tile = HopperTile<BN, CLUSTER, HOPPER_RANK_BESIDE, ALTERNATE>;
      return launch_hopper<T, Tile, true, false>(g, stream);
    }
  } else if constexpr (BN >= 128) {
    using Tile = HopperTile<BN, CLUSTER, 0, ALTERNATE>;
    if (g.w.k_major)
      return g.up.k_major ? launch_hopper<T, Tile, true, true>(g, stream)
                          : launch_hopper<T, Tile, true, false>(g, stream);
    return g.up.k_major ? launch_hopper<T, Tile, false, true>(g, stream)
                        : launch_hopper<T, Tile, false, false>(g, stream);
  }
  return "no kernel was compiled for this plan";
}

template <class T>
const char* hopper_linear(const Linear& g, int32_t tile, void* stream) {
  if (tile == 96) return hopper_by_operands<T, 96, 1, true>(g, stream);
  if (tile == 128) return hopper_by_operands<T, 128, 1, true>(g, stream);
  if (tile == 192) return hopper_by_operands<T, 192, 2, false>(g, stream);
  return hopper_by_operands<T, 256, 2, false>(g, stream);
}

}  // namespace efft::cuda
