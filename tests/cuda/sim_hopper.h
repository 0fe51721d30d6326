// csrc/cuda/hopper_device.h for the host: barriers, clusters, TMA and the matmuls of warpgroups.
//
// Matmuls are executed when their group is waited for, not before, so that operands overwritten too early are detected.
// Shared memory is addressed as the hardware does it, by descriptors and with the swizzles in the address bits, and
// what a thread stores is visible once it has fenced. Not covered: wgmma_fence() and hold(), which only the compiler
// needs.
#pragma once

#include <map>

#include "sim.h"

#define EFFT_HOPPER

namespace efft::sim {

// A barrier, in its eight bytes.
struct Bits {
  uint16_t count, pending;
  int32_t bytes : 31;
  uint32_t phase : 1;
};
static_assert(sizeof(Bits) == 8, "as large as the hardware's");

// Barriers that not all threads of the cluster can rely on yet: initialized, or initialized and fenced.
inline std::map<unsigned char*, bool> fresh;

// The memory at an address of this block, or at a mapped one.
unsigned char* at(uint32_t address);
Bits& bits(unsigned char* p);
void arrive(Bits& b);

struct Map {
  const void* data = nullptr;
  int64_t rows = 0, cols = 0, stride = 0;
  int box_rows = 0, box_cols = 0, swizzle = 0;
};

// A group of boxes that a thread stores; done when TMA gets to it, or when the thread waits.
struct Store {
  std::vector<std::function<void()>> boxes;
  bool done = false;
  void run() {
    for (auto& b : boxes) b();
    boxes.clear();
    done = true;
  }
};

struct Stores {
  std::shared_ptr<Store> open = std::make_shared<Store>();
  std::deque<std::shared_ptr<Store>> groups;
};
inline std::map<Thread*, Stores> stores;

struct Matmul {
  int columns;
  float (*widen)(uint16_t);
  bool b_k_major, add;
  uint64_t a, b;  // descriptors
  bool a_k_major = true;
};

// A matmul that a warpgroup has issued.
struct Product : Matmul {
  Thread* threads[GROUP_SIZE];
  float* d[GROUP_SIZE];
  const uint32_t* registers[GROUP_SIZE];  // of a, or null
  void run() const;
};

struct Products {
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
};
inline std::map<Meeting*, Products> products;

inline Meeting& my_group() { return block().groups[self().number / GROUP_SIZE]; }

// Issues a matmul of the warpgroup, with this thread's part of the result and of operand a, or null.
void issue(const Matmul& matmul, float* d, const uint32_t* registers);
// Executes all but the last `open` groups of matmuls of the warpgroup.
void wait_for_products(size_t open);

}  // namespace efft::sim

namespace efft::cuda {

using TensorMap = sim::Map;

void barrier_init(uint64_t* barrier, int arrivals);
void barrier_init_fence();
void barrier_expect(uint64_t* barrier, int bytes);
void barrier_arrive(uint64_t* barrier, int rank);
void barrier_wait(uint64_t* barrier, int parity);

inline void barrier_wait_cluster(uint64_t* barrier, int parity) { barrier_wait(barrier, parity); }

inline void group_sync(int id, int threads) {
  sim::meet(sim::block().named[id], size_t(threads), [](sim::Thread* const*) {});
}

inline void group_arrive(int id, int threads) { sim::arrive_at(sim::block().named[id], size_t(threads)); }

inline int cluster_rank() { return sim::block().rank; }

inline void cluster_sync() {
  sim::stop(sim::At::cluster);
  for (auto it = sim::fresh.begin(); it != sim::fresh.end();) it = it->second ? sim::fresh.erase(it) : std::next(it);
}

inline uint32_t map_shared(uint32_t address, int rank) { return address | uint32_t(rank + 1) << 24; }

void store_async(uint32_t to, const float* v, uint32_t barrier);

template <int COUNT>
void take_registers() {}
template <int COUNT>
void leave_registers() {}

inline void prefetch_map(const TensorMap*) {}

void tma_load(uint32_t to, const TensorMap* map, int col, int row, uint64_t* barrier);
void tma_load_all(uint32_t to, const TensorMap* map, int col, int row, uint64_t* barrier, int mask);
void tma_store(const TensorMap* map, uint32_t from, int col, int row);
void tma_store_commit();

template <int N>
void tma_store_wait_read() {
  auto& groups = sim::stores[&sim::self()].groups;
  for (; groups.size() > N; groups.pop_front())
    if (!groups.front()->done) groups.front()->run();
}

void store_matrices(void* row, const uint32_t (&v)[4]);

inline void fence_async() {
  for (const auto& [to, v] : sim::self().unfenced) memcpy(to, &v, 4);
  sim::self().unfenced.clear();
}

inline void wgmma_fence() {
  sim::meet(sim::my_group(), sim::GROUP_SIZE, [](sim::Thread* const*) {});
}

inline void wgmma_commit() {
  sim::Meeting& group = sim::my_group();
  sim::meet(group, sim::GROUP_SIZE, [&](sim::Thread* const*) {
    sim::Products& mine = sim::products[&group];
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
  });
}

template <int N>
void wgmma_wait() {
  sim::wait_for_products(N);
}

template <int COUNT>
void hold(float (&d)[COUNT]) {
  asm volatile("" : : "r"(d) : "memory");  // other threads write its elements
}

template <int COUNT>
void hold(uint32_t (&a)[COUNT][4]) {
  asm volatile("" : : "r"(a) : "memory");
}

template <class T, int N>
struct Wgmma {
  template <bool B_K_MAJOR>
  static void shared(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {
    sim::issue({N, T::widen, B_K_MAJOR, bool(add), a, b}, d, nullptr);
  }
  template <bool B_K_MAJOR>
  static void registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
    sim::issue({N, T::widen, B_K_MAJOR, true, 0, b}, d, a);
  }
};

template <class T, int N>
struct WgmmaTransposed {
  static void shared(float (&d)[N / 2], uint64_t a, uint64_t b) {
    sim::issue({N, T::widen, false, true, a, b, false}, d, nullptr);
  }
};

// Returns null, or the reason why the driver would refuse.
inline const char* make_map(TensorMap* map, const void* data, int64_t rows, int64_t cols, int64_t row_stride,
                            int box_rows, int box_cols, int swizzle_bytes) {
  *map = {data, rows, cols, row_stride, box_rows, box_cols, swizzle_bytes};
  if (reinterpret_cast<uintptr_t>(data) % 16 || row_stride * 2 % 16) return "a matrix that is not on 16 bytes";
  if (box_rows > 256 || box_cols > 256 || box_cols * 2 > swizzle_bytes) return "a box that is too large";
  return rows > 0 && cols > 0 && row_stride >= cols ? nullptr : "a matrix without rows";
}

inline int multiprocessors() { return 4; }  // few, so that blocks take several tiles

template <class Arguments>
const char* launch_clusters(void (*kernel)(Arguments), dim3 grid, int cluster, int threads, int shared, void*,
                            const Arguments& g) {
  sim::most_shared = shared > sim::most_shared ? shared : sim::most_shared;
  sim::stores.clear(), sim::products.clear(), sim::fresh.clear();
  return sim::run(grid, threads, shared, [&] { kernel(g); }, cluster);
}

}  // namespace efft::cuda
