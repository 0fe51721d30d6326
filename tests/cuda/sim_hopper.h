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
inline unsigned char* at(uint32_t address) {
  Block& b = address >> 24 ? cluster->blocks[(address >> 24) - 1] : block();
  bool ended = true;
  for (const Thread& t : cluster->threads) ended &= t.block != &b || t.at == At::end;
  if (ended) fail("shared memory of a block that has ended");
  address &= 0xffffff;
  if (address >= b.memory.size()) fail("an address beyond shared memory");
  return b.shared + address;
}

inline Bits& bits(unsigned char* p) {
  Bits& b = *reinterpret_cast<Bits*>(p);
  if (reinterpret_cast<uintptr_t>(p) % 8 || b.count == 0xffff) fail("a barrier that was not initialized");
  if (fresh.count(p)) fail("a barrier before all of the cluster know of it");
  return b;
}

inline void settle(Bits& b) {
  if (b.pending || b.bytes) return;
  b.phase ^= 1;
  b.pending = b.count;
}

inline void arrive(Bits& b) {
  if (!b.pending) fail("a barrier at which more arrive than it counts");
  --b.pending;
  settle(b);
}

inline void complete(unsigned char* barrier, int bytes) {
  Bits& b = bits(barrier);
  b.bytes -= bytes;
  settle(b);
}

// Does work of TMA at once, or when no thread can continue without it.
inline void engine(std::function<void()> work) {
  if (mode_eager)
    work();
  else
    cluster->engine.push_back(std::move(work));
}

// Address bits 4 and up are XORed with bits 7 and up: one bit for rows of 32 bytes, two for 64, three for 128.
inline uint32_t swizzled(uint32_t address, int bytes) { return address ^ (address >> 7 & (bytes / 16 - 1)) << 4; }

struct Map {
  const void* data = nullptr;
  int64_t rows = 0, cols = 0, stride = 0;
  int box_rows = 0, box_cols = 0, swizzle = 0;
};

inline void check_box(const Map& map, uint32_t address) {
  if (address % 128 || (address & 0xffffff) % (map.swizzle * 8)) fail("a box that is not where its swizzle starts");
}

// Visits the elements of a box one by one: f(its place in shared memory, its place in the matrix or null).
template <class F>
void box(const Map& map, unsigned char* shared, uint32_t address, int col, int row, F f) {
  for (int i = 0; i < map.box_rows; ++i)
    for (int j = 0; j < map.box_cols; ++j) {
      const bool inside = row + i >= 0 && row + i < map.rows && col + j >= 0 && col + j < map.cols;
      const auto to = shared + swizzled(address + (i * map.box_cols + j) * 2, map.swizzle);
      const auto data = static_cast<const uint16_t*>(map.data);
      f(reinterpret_cast<uint16_t*>(to), inside ? data + (row + i) * map.stride + col + j : nullptr);
    }
}

inline void load_box(const Map& map, Block& b, uint32_t address, int col, int row, uint32_t barrier) {
  check_box(map, address);
  engine([=, &b] {
    box(map, b.shared, address, col, row, [](uint16_t* to, const uint16_t* from) { *to = from ? *from : 0; });
    complete(b.shared + barrier, map.box_rows * map.box_cols * 2);
  });
}

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

// A matmul that a warpgroup has issued.
struct Product {
  int columns;
  float (*widen)(uint16_t);
  bool b_k_major, add;
  uint64_t a, b;
  Thread* threads[GROUP_SIZE];
  float* d[GROUP_SIZE];
  const uint32_t* registers[GROUP_SIZE];  // of a, or null
  bool a_k_major = true;
  void run() const;
};

struct Products {
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
};
inline std::map<Meeting*, Products> products;

struct Descriptor {
  uint32_t start, leading, stride;
  int swizzle;
  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4) {
    const int kinds[] = {0, 128, 64, 32};
    swizzle = kinds[bits >> 62];
    if (!swizzle) fail("a descriptor without a swizzle");
  }
  // Element (i, k) of an operand with rows (or columns) i and terms k.
  const uint16_t* at(const Block& b, bool k_major, int i, int k) const {
    const int width = swizzle / 2;
    const uint32_t offset = k_major ? i / 8 * stride + i % 8 * swizzle + k * 2
                                    : i / width * leading + i % width * 2 + k / 8 * stride + k % 8 * swizzle;
    return reinterpret_cast<const uint16_t*>(b.shared + swizzled(start + offset, swizzle));
  }
};

inline void Product::run() const {
  const Block& block = *threads[0]->block;
  float left[64][16], right[16][256], sum[64][256];
  if (registers[0]) {
    for (int t = 0; t < 128; ++t)
      for (int i = 0; i < 4; ++i)
        for (int h = 0; h < 2; ++h)
          left[t / 32 * 16 + t % 32 / 4 + i % 2 * 8][t % 4 * 2 + h + i / 2 * 8] =
              widen(uint16_t(registers[t][i] >> 16 * h));
  } else {
    const Descriptor desc(a);
    for (int m = 0; m < 64; ++m)
      for (int k = 0; k < 16; ++k) left[m][k] = widen(*desc.at(block, a_k_major, m, k));
  }
  const Descriptor desc(b);
  for (int n = 0; n < columns; ++n)
    for (int k = 0; k < 16; ++k) right[k][n] = widen(*desc.at(block, b_k_major, n, k));
  memset(sum, 0, sizeof sum);
  for (int m = 0; m < 64; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < columns; ++n) sum[m][n] += left[m][k] * right[k][n];
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < columns / 2; ++i) {
      const float s = sum[t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8][i / 4 * 8 + t % 4 * 2 + i % 2];
      d[t][i] = add ? d[t][i] + s : s;
    }
}

inline Meeting& my_group() { return block().groups[self().number / GROUP_SIZE]; }

template <int COLUMNS, class T>
void issue(float* d, const uint32_t* registers, uint64_t a, uint64_t b, bool k_major, bool add, bool a_k_major = true) {
  Thread& t = self();
  t.in[0] = registers, t.out = d;
  Meeting& group = my_group();
  meet(group, GROUP_SIZE, [&](Thread** threads) {
    Product product{COLUMNS, T::widen, k_major, add, a, b, {}, {}, {}, a_k_major};
    for (size_t i = 0; i < GROUP_SIZE; ++i) {
      product.threads[i] = threads[i];
      product.d[i] = static_cast<float*>(threads[i]->out);
      product.registers[i] = static_cast<const uint32_t*>(threads[i]->in[0]);
    }
    products[&group].open.push_back(product);
  });
}

}  // namespace efft::sim

namespace efft::cuda {

using TensorMap = sim::Map;

inline void barrier_init(uint64_t* barrier, int arrivals) {
  *reinterpret_cast<sim::Bits*>(barrier) = {uint16_t(arrivals), uint16_t(arrivals), 0, 0};
  sim::fresh[reinterpret_cast<unsigned char*>(barrier)] = false;
}

inline void barrier_init_fence() {
  for (auto& [barrier, fenced] : sim::fresh) fenced = true;
}

inline void barrier_expect(uint64_t* barrier, int bytes) {
  sim::Bits& b = sim::bits(reinterpret_cast<unsigned char*>(barrier));
  b.bytes += bytes;
  sim::arrive(b);
}

inline void barrier_arrive(uint64_t* barrier, int rank) {
  sim::arrive(sim::bits(sim::at(shared_address(barrier) | uint32_t(rank + 1) << 24)));
}

inline void barrier_wait(uint64_t* barrier, int parity) {
  const auto over = [=] { return sim::bits(reinterpret_cast<unsigned char*>(barrier)).phase != uint32_t(parity); };
  if (over()) return;
  sim::self().waits_for = over;
  sim::stop(sim::At::wait);
}

inline void barrier_wait_cluster(uint64_t* barrier, int parity) { barrier_wait(barrier, parity); }

inline void group_sync(int id, int threads) {
  sim::meet(sim::block().named[id], size_t(threads), [](sim::Thread**) {});
}

inline void group_arrive(int id, int threads) { sim::arrive_at(sim::block().named[id], size_t(threads)); }

inline int cluster_rank() { return sim::block().rank; }

inline void cluster_sync() {
  sim::stop(sim::At::cluster);
  for (auto it = sim::fresh.begin(); it != sim::fresh.end();) it = it->second ? sim::fresh.erase(it) : std::next(it);
}

inline uint32_t map_shared(uint32_t address, int rank) { return address | uint32_t(rank + 1) << 24; }

inline void store_async(uint32_t to, const float* v, uint32_t barrier) {
  if (to % 16) sim::fail("an asynchronous store that is not on 16 bytes");
  if (sim::cluster->blocks.size() == 1) sim::fail("an illegal instruction: st.async in a launch without clusters");
  unsigned char *const place = sim::at(to), *const counts = sim::at(barrier);
  const float a = v[0], b = v[1], c = v[2], d = v[3];
  sim::engine([=] {
    const float values[] = {a, b, c, d};
    memcpy(place, values, 16);
    sim::complete(counts, 16);
  });
}

template <int COUNT>
void take_registers() {}
template <int COUNT>
void leave_registers() {}

inline void prefetch_map(const TensorMap*) {}

inline void tma_load(uint32_t to, const TensorMap* map, int col, int row, uint64_t* barrier) {
  sim::load_box(*map, sim::block(), to, col, row, shared_address(barrier));
}

inline void tma_load_all(uint32_t to, const TensorMap* map, int col, int row, uint64_t* barrier, int mask) {
  for (sim::Block& b : sim::cluster->blocks)
    if (mask >> b.rank & 1) sim::load_box(*map, b, to, col, row, shared_address(barrier));
}

inline void tma_store(const TensorMap* map, uint32_t from, int col, int row) {
  sim::check_box(*map, from);
  const auto copy = [=, m = *map, &b = sim::block()] {
    sim::box(m, b.shared, from, col, row, [](uint16_t* source, const uint16_t* to) {
      if (to) *const_cast<uint16_t*>(to) = *source;
    });
  };
  sim::stores[&sim::self()].open->boxes.push_back(copy);
}

inline void tma_store_commit() {
  sim::Stores& mine = sim::stores[&sim::self()];
  const auto group = mine.open;
  mine.open = std::make_shared<sim::Store>();
  mine.groups.push_back(group);
  if (sim::mode_eager) group->run();
}

template <int N>
void tma_store_wait_read() {
  auto& groups = sim::stores[&sim::self()].groups;
  for (; groups.size() > N; groups.pop_front())
    if (!groups.front()->done) groups.front()->run();
}

inline void store_matrices(void* row, const uint32_t (&v)[4]) {
  if (reinterpret_cast<uintptr_t>(row) % 16) sim::fail("an stmatrix that is not on 16 bytes");
  auto& t = sim::self();
  t.in[0] = row, t.in[1] = v;
  sim::together([](sim::Thread** lanes) {
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        const auto start = static_cast<const unsigned char*>(lanes[i * 8 + l / 4]->in[0]);
        lanes[l]->unfenced.emplace_back(const_cast<unsigned char*>(start) + l % 4 * 4,
                                        static_cast<const uint32_t*>(lanes[l]->in[1])[i]);
      }
  });
}

inline void fence_async() {
  for (const auto& [to, v] : sim::self().unfenced) memcpy(to, &v, 4);
  sim::self().unfenced.clear();
}

inline void wgmma_fence() {
  sim::meet(sim::my_group(), sim::GROUP_SIZE, [](sim::Thread**) {});
}

inline void wgmma_commit() {
  sim::Meeting& group = sim::my_group();
  sim::meet(group, sim::GROUP_SIZE, [&](sim::Thread**) {
    sim::Products& mine = sim::products[&group];
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
  });
}

template <int N>
void wgmma_wait() {
  sim::Meeting& group = sim::my_group();
  sim::meet(group, sim::GROUP_SIZE, [&](sim::Thread**) {
    auto& groups = sim::products[&group].groups;
    for (; groups.size() > N; groups.pop_front())
      for (const sim::Product& product : groups.front()) product.run();
  });
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
    sim::issue<N, T>(d, nullptr, a, b, B_K_MAJOR, add);
  }
  template <bool B_K_MAJOR>
  static void registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
    sim::issue<N, T>(d, a, 0, b, B_K_MAJOR, true);
  }
};

template <class T, int N>
struct WgmmaTransposed {
  static void shared(float (&d)[N / 2], uint64_t a, uint64_t b) {
    sim::issue<N, T>(d, nullptr, a, b, false, true, false);
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
