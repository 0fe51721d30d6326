// y = [x | p] @ [w ; up] + bias for compute capability 9.0. compiled once per dtype, hopper_*.cu
//
// blocks stay and take tile after tile. one warp lets the copy engine fill stages of shared memory, two warpgroups
// multiply from there, 64 rows of the tile each, so copies of the next tile go on while one is stored. where p is
// formed beside y, two blocks of a cluster, side by side, have the rows of x in common: each copies half of them for
// both, and forms p from half of the terms; then they exchange their halves. so p costs a block what the least product
// of the tensor cores costs at half of the steps, whatever the number of tiles beside one another.
#pragma once

#include <cstring>
#include <type_traits>

#include "hopper_device.h"
#include "tile.h"

namespace efft::cuda {

constexpr int HOPPER_SHARED = 227 << 10;  // bytes that a block may have at compute capability 9.0
constexpr int WARPGROUP = 128, CONSUMERS = 2, HOPPER_THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232, REGISTERS = 168;  // of a thread; at the start
static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= (1 + CONSUMERS) * REGISTERS,
              "else they never come");
constexpr int LINE = 128;        // bytes of a row of a tile, and of the widest swizzle
constexpr int CELLS = LINE / 2;  // numbers of it
constexpr int ALIGNMENT = 1024;  // of tiles: the swizzle goes by bits 4 to 9 of an address
constexpr int PART_COLS = 32, PART_LINE = 2 * PART_COLS, PART = 64 * PART_LINE;  // of y on its way: 64 rows
static_assert(CELLS == BK, "a row of a tile has the terms of a step");

struct HopperLinear {
  TensorMap x, w, down, up, p, y;
  int32_t M, N, K, R;
  const uint32_t* bias;  // [N / 2], two numbers each
  uint16_t* p_out;       // [M, R]
  int32_t p_row;
};

// BN columns of y by 128 rows. RANKS as in linear.h: p is formed for up to so many, or read
template <int BN_, int CLUSTER_, int RANKS_>
struct HopperTile {
  static constexpr int BM = 128, BN = BN_, CLUSTER = CLUSTER_, RANKS = RANKS_;
  static_assert(CLUSTER == 1 || CLUSTER == 2, "a sum of two halves has one order");
  static constexpr int X = BM * LINE, W = BN * LINE, DOWN = RANKS * LINE, STAGE = X + W + DOWN;  // bytes
  static constexpr int SLOT = RANKS && CLUSTER > 1 ? 64 * RANKS * 4 : 0;  // the other block's half of p, a warpgroup's
  // what is left of two parts of y on their way for each warpgroup goes to stages, the rest to more such parts
  static constexpr int BIAS = BN * 2, LEAST = CONSUMERS * (2 * PART + SLOT + BIAS) + ALIGNMENT + 256;
  static constexpr int STAGES = least((HOPPER_SHARED - LEAST) / STAGE, 6);
  static constexpr int MOST_PARTS = 2 + (HOPPER_SHARED - LEAST - STAGES * STAGE) / (CONSUMERS * PART);
  // a divisor of the parts of a tile: a tile starts with the place that has been waiting the longest
  static constexpr int PARTS = MOST_PARTS >= 4 && BN % 128 == 0 ? 4 : MOST_PARTS >= 3 && BN % 96 == 0 ? 3 : 2;
  static constexpr int SHARED = STAGES * STAGE + LEAST + (PARTS - 2) * CONSUMERS * PART;
  static_assert(BN / PART_COLS % PARTS == 0, "the order of places is the same in every tile");
  static constexpr int BARRIERS = 2 * STAGES + 2 * CONSUMERS;
  static_assert(STAGES >= 3 && BARRIERS * 8 <= 256 && W % ALIGNMENT == 0 && DOWN % ALIGNMENT == 0, "tiles fit");
};

template <int N>
using Count = std::integral_constant<int, N>;

// a stage of the ring, and how often it came round
template <int STAGES>
struct Ring {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// what the tensor cores are told of a tile: where it starts, the bytes from one group of its rows (or columns) to the
// next, and its swizzle. k-major, `stride` leads from eight rows to the next eight; else it leads from eight terms to
// the next eight, and `leading` from one swizzle's width of rows to the next
__device__ __forceinline__ uint64_t descriptor(uint32_t address, int leading, int stride, int swizzle) {
  const uint64_t kind = swizzle == 128 ? 1 : swizzle == 64 ? 2 : 3;
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | kind << 62;
}

// term 16 * k16 of a tile [rows, 64 terms], or of a tile [64 terms or `terms`, rows] in parts of 64 rows
template <bool K_MAJOR>
__device__ __forceinline__ uint64_t operand(uint32_t tile, int k16, int terms) {
  return K_MAJOR ? descriptor(tile + k16 * 32, 16, 8 * LINE, LINE)
                 : descriptor(tile + k16 * 16 * LINE, terms * LINE, 8 * LINE, LINE);
}

// the same of down: not k-major its rows are as short as the ranks
template <int RANKS, bool K_MAJOR>
__device__ __forceinline__ uint64_t down_operand(uint32_t tile, int k16) {
  return K_MAJOR ? operand<true>(tile, k16, 0) : descriptor(tile + k16 * 32 * RANKS, 16, 16 * RANKS, 2 * RANKS);
}

// rows m and m + 8 of p, columns col, col + 1, col + 8, ...: a thread's part of it
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
  EFFT_SHARED(raw);
  // the same in every block of the cluster: a copy to all, and an exchange, go to one place
  const uint32_t skip = (ALIGNMENT - shared_address(raw) % ALIGNMENT) % ALIGNMENT;
  unsigned char* const shared = raw + skip;
  const uint32_t tiles = shared_address(shared);
  const auto x_tile = [&](int stage) { return tiles + stage * Tile::STAGE; };
  const auto w_tile = [&](int stage) { return x_tile(stage) + Tile::X; };
  const auto down_tile = [&](int stage) { return w_tile(stage) + Tile::W; };
  unsigned char* const y_tiles = shared + STAGES * Tile::STAGE;
  unsigned char* const slots = y_tiles + CONSUMERS * Tile::PARTS * PART;
  uint32_t* const biases = reinterpret_cast<uint32_t*>(slots + CONSUMERS * Tile::SLOT);
  uint64_t* const full = reinterpret_cast<uint64_t*>(biases + CONSUMERS * BN / 2);
  uint64_t *const empty = full + STAGES, *const p_full = empty + STAGES, *const p_free = p_full + CONSUMERS;

  const int rank = CLUSTER > 1 ? cluster_rank() : 0, group = threadIdx.x / WARPGROUP;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, CONSUMERS * CLUSTER);
    }
    for (int i = 0; i < CONSUMERS; ++i) {
      barrier_init(p_full + i, 1);
      barrier_init(p_free + i, WARPGROUP);
    }
    barrier_init_fence();
  }
  cluster_sync();

  const int tiles_m = cdiv(g.M, BM), sets_n = cdiv(cdiv(g.N, BN), CLUSTER);  // sets of tiles, one for each block
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
          tma_load_all(to, map, col, m0 + rank * ROWS, full + ring.stage, (1 << CLUSTER) - 1);
        else
          tma_load(to, map, col, m0, full + ring.stage);
      };
      // a tile of w or up, in one box or in one for every 64 columns
      const auto load_columns = [&](const TensorMap* map, bool k_major, int n0, int k0, int terms) {
        if (k_major) {
          tma_load(w_tile(ring.stage), map, k0, n0, full + ring.stage);
        } else {
#pragma unroll
          for (int i = 0; i < BN / CELLS; ++i)
            tma_load(w_tile(ring.stage) + i * terms * LINE, map, n0 + i * CELLS, k0, full + ring.stage);
        }
      };
#pragma unroll 1
      for (int set = first; set < tiles_m * sets_n; set += step_of_sets) {
        int tm, tn;
        tile_of(set, tiles_m, sets_n, tm, tn);
        const int m0 = tm * BM, n0 = (tn * CLUSTER + rank) * BN;
#pragma unroll 1
        for (int step = 0; step < k_steps; ++step, ring.next()) {
          barrier_wait(empty + ring.stage, ring.parity ^ 1);
          barrier_expect(full + ring.stage, Tile::STAGE);
          load_rows(&g.x, step * BK, m0);
          load_columns(&g.w, W_K_MAJOR, n0, step * BK, BK);
          if constexpr (RANKS > 0)
            tma_load(down_tile(ring.stage), &g.down, LOW_K_MAJOR ? step * BK : 0, LOW_K_MAJOR ? 0 : step * BK,
                     full + ring.stage);
        }
#pragma unroll 1
        for (int step = 0; step < r_steps; ++step, ring.next()) {
          barrier_wait(empty + ring.stage, ring.parity ^ 1);
          barrier_expect(full + ring.stage, (RANKS ? 0 : Tile::X) + BN * (LOW_K_MAJOR ? LINE : UP_TERMS * 2));
          if constexpr (RANKS == 0) load_rows(&g.p, step * BK, m0);
          load_columns(&g.up, LOW_K_MAJOR, n0, step * BK, UP_TERMS);
        }
      }
    }
    // no block goes while another still arrives at its barriers
    cluster_sync();
  } else {
    take_registers<CONSUMER_REGISTERS>();
    const int consumer = group - 1, thread = threadIdx.x % WARPGROUP, lane = threadIdx.x % WARP;
    const int row = consumer * 64 + thread / WARP * 16 + lane / 4, col = lane % 4 * 2;  // of d[0], in the tile
    const uint32_t a_offset = consumer * 64 * LINE;
    uint32_t* const bias = biases + consumer * BN / 2;
    Ring<STAGES> ring;
    int p_parity = 0;
    // to both blocks: each fills half of the other's x
    const auto release = [&](int stage) {
      if (thread < CLUSTER) barrier_arrive(empty + stage, thread);
    };

#pragma unroll 1
    for (int set = first; set < tiles_m * sets_n; set += step_of_sets) {
      int tm, tn;
      tile_of(set, tiles_m, sets_n, tm, tn);
      const int m0 = tm * BM, n0 = (tn * CLUSTER + rank) * BN;
      float acc[BN / 2], acc_p[RANKS ? RANKS / 2 : 1];
      uint32_t p[RANKS ? RANKS / 16 : 1][4];

      // read now, and needed after all products
      const int pair = n0 / 2 + thread;
      const uint32_t bias_pair = g.bias && thread < BN / 2 && 2 * pair < g.N ? g.bias[pair] : 0;
      // the last stage that is still read
      int last = 0;
      const auto multiply = [&](bool add) {
        const uint32_t a = x_tile(ring.stage) + a_offset, b = w_tile(ring.stage);
#pragma unroll
        for (int k16 = 0; k16 < BK / 16; ++k16)
          Wgmma<T, BN>::template shared<W_K_MAJOR>(acc, operand<true>(a, k16, 0), operand<W_K_MAJOR>(b, k16, BK),
                                                   add || k16 > 0);
      };
      const auto form_p = [&](bool add) {
        if constexpr (RANKS > 0) {
          constexpr int SHARE = BK / 16 / CLUSTER;
          const uint32_t a = x_tile(ring.stage) + a_offset, b = down_tile(ring.stage);
#pragma unroll
          for (int i = 0; i < SHARE; ++i) {
            const int k16 = rank * SHARE + i;
            Wgmma<T, RANKS>::template shared<LOW_K_MAJOR>(acc_p, operand<true>(a, k16, 0),
                                                          down_operand<RANKS, LOW_K_MAJOR>(b, k16), add || i > 0);
          }
        }
      };
#pragma unroll 1
      for (int step = 0; step < k_steps - (RANKS > 0); ++step, ring.next()) {
        barrier_wait(full + ring.stage, ring.parity);
        hold(acc), hold(acc_p);
        wgmma_fence();
        form_p(step > 0);
        multiply(step > 0);
        wgmma_commit();
        // one step stays under way; the one before it is read
        wgmma_wait<1>();
        if (step > 0) release(last);
        last = ring.stage;
      }

      if constexpr (RANKS > 0) {
        // the last step in two: the halves of p are exchanged while the tensor cores are at y
        barrier_wait(full + ring.stage, ring.parity);
        hold(acc), hold(acc_p);
        wgmma_fence();
        form_p(k_steps > 1);
        wgmma_commit();
        multiply(k_steps > 1);
        wgmma_commit();
        wgmma_wait<1>();
        hold(acc_p);
        if (k_steps > 1) release(last);
        last = ring.stage;
        ring.next();
        if constexpr (CLUSTER > 1) {
          // thread i of the other block has the same elements of the other half
          constexpr int VECTORS = RANKS / 8;
          float* const slot = reinterpret_cast<float*>(slots + consumer * Tile::SLOT);
          const uint32_t there = map_shared(shared_address(slot), rank ^ 1);
          const uint32_t barrier = map_shared(shared_address(p_full + consumer), rank ^ 1);
          if (thread == 0) barrier_expect(p_full + consumer, Tile::SLOT);
          barrier_wait_cluster(p_free + consumer, p_parity ^ 1);
#pragma unroll
          for (int i = 0; i < VECTORS; ++i) store_async(there + (i * WARPGROUP + thread) * 16, acc_p + i * 4, barrier);
          barrier_wait_cluster(p_full + consumer, p_parity);
#pragma unroll
          for (int i = 0; i < VECTORS; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) acc_p[i * 4 + j] += slot[(i * WARPGROUP + thread) * 4 + j];
          barrier_arrive_cluster(p_free + consumer, rank ^ 1);
          p_parity ^= 1;
        }
        // y uses p as rounded for storage, so that it is the y of the p that backward sees. beyond R it is nan where x
        // is infinite, times the zeros of down
#pragma unroll
        for (int i = 0; i < RANKS / 4; ++i) {
          const int r = i / 2 * 8 + col;
          p[i / 4][i % 4] = T::pack(r < g.R ? acc_p[i * 2] : 0, r + 1 < g.R ? acc_p[i * 2 + 1] : 0);
        }
      }
#pragma unroll 1
      for (int step = 0; step < r_steps; ++step, ring.next()) {
        barrier_wait(full + ring.stage, ring.parity);
        const uint32_t a = x_tile(ring.stage) + a_offset, b = w_tile(ring.stage);
        // so many in a row without a branch between them, which would make the tensor cores wait
        const auto products = [&](auto count) {
          hold(acc);
          wgmma_fence();
#pragma unroll
          for (int k16 = 0; k16 < decltype(count)::value; ++k16) {
            const uint64_t up = operand<LOW_K_MAJOR>(b, k16, UP_TERMS);
            if constexpr (RANKS > 0)
              Wgmma<T, BN>::template registers<LOW_K_MAJOR>(acc, p[k16], up);
            else
              Wgmma<T, BN>::template shared<LOW_K_MAJOR>(acc, operand<true>(a, k16, 0), up, 1);
          }
          wgmma_commit();
        };
        if constexpr (RANKS > 0) {
          // p is stored while they are under way, from other registers than they read
          uint32_t stored[RANKS / 16][4];
          memcpy(stored, p, sizeof p);
          hold(p);
          products(Count<UP_TERMS / 16>());
          if (n0 == 0) store_p<RANKS>(g, stored, m0 + row, col);
        } else if (g.R - step * BK <= 16)
          products(Count<1>());
        else if (g.R - step * BK <= 32)
          products(Count<2>());
        else
          products(Count<4>());
        wgmma_wait<1>();
        release(last);
        last = ring.stage;
      }
      wgmma_wait<0>();
      hold(acc);
      release(last);

      // y in parts of 32 columns, by way of shared memory and the copy engine
      if (thread < BN / 2) bias[thread] = bias_pair;
#pragma unroll
      for (int i = 0; i < BN / PART_COLS; ++i) {
        unsigned char* const part = y_tiles + (consumer * Tile::PARTS + i % Tile::PARTS) * PART;
        if (thread == 0) tma_store_wait_read<Tile::PARTS - 1>();
        group_sync(1 + consumer, WARPGROUP);
#pragma unroll
        for (int j = 0; j < PART_COLS / 8; ++j) {
          const uint32_t both = bias[(i * PART_COLS + j * 8 + col) / 2];
          const float add[] = {T::widen(uint16_t(both)), T::widen(uint16_t(both >> 16))};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float* const d = acc + (i * PART_COLS / 8 + j) * 4 + half * 2;
            const int line = row % 64 + half * 8;
            store_shared(part + line * PART_LINE + (j ^ line / 2 % 4) * 16 + col * 2,
                         T::pack(d[0] + add[0], d[1] + add[1]));
          }
        }
        fence_async();
        group_sync(1 + consumer, WARPGROUP);
        if (thread == 0) {
          const int n = n0 + i * PART_COLS;
          if (n < g.N) tma_store(&g.y, shared_address(part), n, m0 + consumer * 64);
          tma_store_commit();
        }
      }
    }
    if (thread == 0) tma_store_wait_read<0>();
    cluster_sync();
  }
#endif
}

// rows of the tile by 64 terms; for an operand that is not k-major a box of terms by 64 of its rows
inline const char* map_operand(TensorMap* map, const Operand& g, int rows, int terms, int box_rows, int box_terms = BK,
                               int narrow = LINE) {
  if (g.k_major) return make_map(map, g.data, rows, terms, g.row, box_rows, BK, LINE);
  return make_map(map, g.data, terms, rows, g.row, box_terms, narrow / 2, narrow);
}

template <class T, class Tile, bool W_K_MAJOR, bool LOW_K_MAJOR>
const char* launch_hopper(const Linear& g, void* stream) {
  constexpr int BN = Tile::BN, RANKS = Tile::RANKS, ROWS = Tile::BM / Tile::CLUSTER;
  // it would wait for other bytes than come
  const bool as_compiled = g.w.k_major == W_K_MAJOR && g.up.k_major == LOW_K_MAJOR && (RANKS == 0) == !g.down.data &&
                           (RANKS == 0 || g.down.k_major == LOW_K_MAJOR);
  if (!as_compiled) return "operands lie otherwise than the kernel takes them";
  HopperLinear h{};
  h.M = g.M, h.N = g.N, h.K = g.K, h.R = g.R;
  h.bias = static_cast<const uint32_t*>(g.bias);
  h.p_out = static_cast<uint16_t*>(g.p), h.p_row = g.p_row;
  const char* error = map_operand(&h.x, g.x, g.M, g.K, ROWS);
  if (!error) error = map_operand(&h.w, g.w, g.N, g.K, BN);
  if (!error) error = map_operand(&h.up, g.up, g.N, g.R, BN, RANKS ? RANKS : BK);
  if (RANKS && !error) error = map_operand(&h.down, g.down, g.R, g.K, RANKS, BK, 2 * RANKS);
  if (!RANKS && !error) error = make_map(&h.p, g.p, g.M, g.R, g.p_row, ROWS, BK, LINE);
  if (!error) error = make_map(&h.y, g.y, g.M, g.N, g.N, 64, PART_COLS, PART_LINE);
  if (error) return error;
  const int sets = cdiv(g.M, Tile::BM) * cdiv(cdiv(g.N, BN), Tile::CLUSTER), there = multiprocessors() / Tile::CLUSTER;
  if (!there) return "this kernel is for compute capability 9.0";
  const auto kernel = hopper_linear_kernel<T, Tile, W_K_MAJOR, LOW_K_MAJOR>;
  return launch_clusters(kernel, (sets < there ? sets : there) * Tile::CLUSTER, Tile::CLUSTER, HOPPER_THREADS,
                         Tile::SHARED, stream, h);
}

template <class T, int BN, int CLUSTER>
const char* hopper_by_operands(const Linear& g, void* stream) {
  if (!g.down.data) {
    using Tile = HopperTile<BN, CLUSTER, 0>;
    if (g.w.k_major)
      return g.up.k_major ? launch_hopper<T, Tile, true, true>(g, stream)
                          : launch_hopper<T, Tile, true, false>(g, stream);
    return g.up.k_major ? launch_hopper<T, Tile, false, true>(g, stream)
                        : launch_hopper<T, Tile, false, false>(g, stream);
  }
  if (g.R <= 16) {
    using Tile = HopperTile<BN, CLUSTER, 16>;
    return g.up.k_major ? launch_hopper<T, Tile, true, true>(g, stream)
                        : launch_hopper<T, Tile, true, false>(g, stream);
  }
  using Tile = HopperTile<BN, CLUSTER, HOPPER_RANK_BESIDE>;
  return g.up.k_major ? launch_hopper<T, Tile, true, true>(g, stream) : launch_hopper<T, Tile, true, false>(g, stream);
}

template <class T>
const char* hopper_linear(const Linear& g, int32_t tile, void* stream) {
  if (tile == 128) return hopper_by_operands<T, 128, 1>(g, stream);
  if (tile == 192) return hopper_by_operands<T, 192, 2>(g, stream);
  return hopper_by_operands<T, 256, 2>(g, stream);
}

}  // namespace efft::cuda
