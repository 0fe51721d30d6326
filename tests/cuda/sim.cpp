// The simulator: threads and their order, barriers, TMA and matmuls; and the interface for tests: what they set and
// query.
#include <algorithm>

#include "sim_hopper.h"

namespace efft::sim {

void stop(At at) {
  Thread& t = self();
  t.at = at;
  if (!_setjmp(t.resume)) _longjmp(cluster->scheduler, 1);
}

static void entry() {
  cluster->kernel();
  stop(At::end);
}

static void step(Thread& t) {
  cluster->current = &t;
  if (_setjmp(cluster->scheduler)) return;
  if (t.started) _longjmp(t.resume, 1);
  t.started = true;
  setcontext(&t.context);
}

void fail(const char* what) {
  const dim3 at = cluster->current ? block().index : dim3();
  cluster->failure =
      "block (" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + "): ";
  cluster->failure += what;
  _longjmp(cluster->given_up, 1);
}

// Runs a warp until none of its threads can continue.
static bool run_warp(size_t warp) {
  bool moved = false;
  for (bool ready = true; ready;) {
    ready = false;
    for (size_t i = warp * WARP_SIZE; i < (warp + 1) * WARP_SIZE; ++i)
      if (cluster->threads[i].at == At::ready) step(cluster->threads[i]), ready = moved = true;
  }
  return moved;
}

// Lets all of these threads continue if all are at the same barrier.
template <class Threads>
static bool pass(Threads begin, Threads end, At at) {
  for (auto t = begin; t != end; ++t)
    if (t->at != at) return false;
  for (auto t = begin; t != end; ++t) t->at = At::ready;
  return true;
}

static uint32_t chance(uint32_t below) {
  static uint64_t state;
  if (!below) state = uint64_t(mode_order) * 0x9e3779b97f4a7c15;  // at the start of a launch
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return below ? uint32_t(state >> 20) % below : 0;
}

// Does one piece of TMA's pending work: the first, the last, or any.
static void run_engine() {
  auto& todo = cluster->engine;
  const size_t i = mode_order > 1 ? chance(uint32_t(todo.size())) : mode_order ? todo.size() - 1 : 0;
  const auto work = std::move(todo[i]);
  todo.erase(todo.begin() + i);
  work();
}

static void run_cluster() {
  auto& threads = cluster->threads;
  const size_t warps = threads.size() / WARP_SIZE, each = threads.size() / cluster->blocks.size();
  const bool by_chance = mode_order > 1;
  std::vector<bool> slow(warps);  // these continue when nothing else can
  for (size_t w = 0; w < warps; ++w) slow[w] = by_chance && !chance(4);
  for (;;) {
    bool moved = false;
    if (by_chance)  // some of the others, in any order
      for (uint32_t i = 1 + chance(uint32_t(warps)); i; --i) {
        if (const uint32_t w = chance(uint32_t(warps)); !slow[w]) moved |= run_warp(w);
        if (!cluster->engine.empty() && !chance(3)) run_engine(), moved = true;
      }
    for (size_t w = 0; w < warps && !(by_chance && moved); ++w)
      if (!slow[w]) moved |= run_warp(mode_order == 1 ? warps - 1 - w : w);
    size_t ended = 0;
    for (Thread& t : threads) {
      ended += t.at == At::end;
      if (t.at == At::wait && t.waits_for()) t.at = At::ready, moved |= !slow[(&t - threads.data()) >> 5];
    }
    if (ended == threads.size()) break;
    for (size_t b = 0; b < cluster->blocks.size(); ++b)
      moved |= pass(threads.begin() + b * each, threads.begin() + (b + 1) * each, At::block);
    moved |= pass(threads.begin(), threads.end(), At::cluster);
    if (moved) continue;
    // TMA works only now, when no thread can continue without it.
    if (!cluster->engine.empty()) {
      run_engine();
      continue;
    }
    for (size_t w = 0; w < warps && !moved; ++w) moved |= slow[w] && run_warp(w);
    if (!moved) fail("threads wait for what never comes");
  }
  if (!cluster->engine.empty()) fail("the kernel ends before the copy engine does");
}

const char* run(dim3 grid, int threads, size_t shared, std::function<void()> kernel, int blocks) {
  static std::string failure;
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() < size_t(threads * blocks)) stacks.emplace_back(new char[STACK]);
  Cluster c;
  cluster = &c;
  chance(0);
  c.grid = grid, c.size = dim3(threads), c.kernel = std::move(kernel);
  ++launches;
  if (_setjmp(c.given_up)) {
    failure = c.failure;
    return failure.c_str();
  }
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; x += blocks) {
        c.current = nullptr;
        c.blocks.assign(blocks, Block());
        c.threads.assign(threads * blocks, Thread());  // where they were: a fault may leave work that names them
        for (int i = 0; i < blocks; ++i) {
          Block& b = c.blocks[i];
          b.index = dim3(x + i, y, z), b.rank = i;
          b.memory.assign(shared + BASE + 1024, 0xff);
          const auto start = (reinterpret_cast<uintptr_t>(b.memory.data()) + 1023) & ~uintptr_t(1023);
          b.shared = reinterpret_cast<unsigned char*>(start);
          b.warps.resize(threads / WARP_SIZE), b.groups.resize(threads / GROUP_SIZE), b.named.resize(16);
        }
        for (int i = 0; i < threads * blocks; ++i) {
          Thread& t = c.threads[i];
          t.block = &c.blocks[i / threads];
          t.number = i % threads;
          t.index = dim3(t.number, 0, 0);
          getcontext(&t.context);
          t.context.uc_stack.ss_sp = stacks[i].get();
          t.context.uc_stack.ss_size = STACK;
          t.context.uc_link = nullptr;
          makecontext(&t.context, entry, 0);
        }
        run_cluster();
      }
  return nullptr;
}

std::vector<Thread*> met(Meeting& meeting, size_t count) {
  meeting.there.push_back(&self());
  std::vector<Thread*> there;
  if (meeting.there.size() + meeting.passing.size() < count) {
    stop(At::meeting);
    return there;
  }
  meeting.passing.clear();
  there.swap(meeting.there);
  const auto before = [](Thread* a, Thread* b) { return a->number < b->number; };
  if (!std::is_sorted(there.begin(), there.end(), before)) std::sort(there.begin(), there.end(), before);
  return there;
}

void arrive_at(Meeting& meeting, size_t count) {
  meeting.passing.push_back(&self());
  if (meeting.there.size() + meeting.passing.size() < count) return;
  for (Thread* t : meeting.there) t->at = At::ready;
  meeting.there.clear(), meeting.passing.clear();
}

unsigned char* at(uint32_t address) {
  Block& b = address >> 24 ? cluster->blocks[(address >> 24) - 1] : block();
  const auto runs = [&b](const Thread& t) { return t.block == &b && t.at != At::end; };
  if (std::none_of(cluster->threads.begin(), cluster->threads.end(), runs))
    fail("shared memory of a block that has ended");
  address &= 0xffffff;
  if (address >= b.memory.size()) fail("an address beyond shared memory");
  return b.shared + address;
}

Bits& bits(unsigned char* p) {
  Bits& b = *reinterpret_cast<Bits*>(p);
  if (reinterpret_cast<uintptr_t>(p) % 8 || b.count == 0xffff) fail("a barrier that was not initialized");
  if (fresh.count(p)) fail("a barrier before all of the cluster know of it");
  return b;
}

static void settle(Bits& b) {
  if (b.pending || b.bytes) return;
  b.phase ^= 1;
  b.pending = b.count;
}

void arrive(Bits& b) {
  if (!b.pending) fail("a barrier at which more arrive than it counts");
  --b.pending;
  settle(b);
}

static void complete(unsigned char* barrier, int bytes) {
  Bits& b = bits(barrier);
  b.bytes -= bytes;
  settle(b);
}

// Does work of TMA at once, or when no thread can continue without it.
static void engine(std::function<void()> work) {
  if (mode_eager)
    work();
  else
    cluster->engine.push_back(std::move(work));
}

// Address bits 4 and up are XORed with bits 7 and up: one bit for rows of 32 bytes, two for 64, three for 128.
static uint32_t swizzled(uint32_t address, int bytes) { return address ^ (address >> 7 & (bytes / 16 - 1)) << 4; }

static void check_box(const Map& map, uint32_t address) {
  if (address % 128 || (address & 0xffffff) % (map.swizzle * 8)) fail("a box that is not where its swizzle starts");
}

// Visits the elements of a box one by one: f(its place in shared memory, its place in the matrix or null).
template <class F>
static void box(const Map& map, unsigned char* shared, uint32_t address, int col, int row, F f) {
  for (int i = 0; i < map.box_rows; ++i)
    for (int j = 0; j < map.box_cols; ++j) {
      const bool inside = row + i >= 0 && row + i < map.rows && col + j >= 0 && col + j < map.cols;
      const auto to = shared + swizzled(address + (i * map.box_cols + j) * 2, map.swizzle);
      const auto data = static_cast<const uint16_t*>(map.data);
      f(reinterpret_cast<uint16_t*>(to), inside ? data + (row + i) * map.stride + col + j : nullptr);
    }
}

static void load_box(const Map& map, Block& b, uint32_t address, int col, int row, uint32_t barrier) {
  check_box(map, address);
  engine([=, &b] {
    box(map, b.shared, address, col, row, [](uint16_t* to, const uint16_t* from) { *to = from ? *from : 0; });
    complete(b.shared + barrier, map.box_rows * map.box_cols * 2);
  });
}

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

void Product::run() const {
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
    for (int n = 0; n < columns; n += 8)  // eight at a time, which a compiler does by vectors
      for (int k = 0; k < 16; ++k)
        for (int i = 0; i < 8; ++i) sum[m][n + i] += left[m][k] * right[k][n + i];
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < columns / 2; ++i) {
      const float s = sum[t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8][i / 4 * 8 + t % 4 * 2 + i % 2];
      d[t][i] = add ? d[t][i] + s : s;
    }
}

void issue(const Matmul& matmul, float* d, const uint32_t* registers) {
  Thread& t = self();
  t.in[0] = registers, t.out = d;
  Meeting& group = my_group();
  meet(group, GROUP_SIZE, [&](Thread* const* threads) {
    Product product{matmul, {}, {}, {}};
    for (size_t i = 0; i < GROUP_SIZE; ++i) {
      product.threads[i] = threads[i];
      product.d[i] = static_cast<float*>(threads[i]->out);
      product.registers[i] = static_cast<const uint32_t*>(threads[i]->in[0]);
    }
    products[&group].open.push_back(product);
  });
}

void wait_for_products(size_t open) {
  Meeting& group = my_group();
  meet(group, GROUP_SIZE, [&](Thread* const*) {
    auto& groups = products[&group].groups;
    for (; groups.size() > open; groups.pop_front())
      for (const Product& product : groups.front()) product.run();
  });
}

}  // namespace efft::sim

namespace efft::cuda {

void barrier_init(uint64_t* barrier, int arrivals) {
  *reinterpret_cast<sim::Bits*>(barrier) = {uint16_t(arrivals), uint16_t(arrivals), 0, 0};
  sim::fresh[reinterpret_cast<unsigned char*>(barrier)] = false;
}

void barrier_init_fence() {
  for (auto& [barrier, fenced] : sim::fresh) fenced = true;
}

void barrier_expect(uint64_t* barrier, int bytes) {
  sim::Bits& b = sim::bits(reinterpret_cast<unsigned char*>(barrier));
  b.bytes += bytes;
  sim::arrive(b);
}

void barrier_arrive(uint64_t* barrier, int rank) {
  sim::arrive(sim::bits(sim::at(shared_address(barrier) | uint32_t(rank + 1) << 24)));
}

void barrier_wait(uint64_t* barrier, int parity) {
  const auto over = [=] { return sim::bits(reinterpret_cast<unsigned char*>(barrier)).phase != uint32_t(parity); };
  if (over()) return;
  sim::self().waits_for = over;
  sim::stop(sim::At::wait);
}

void store_async(uint32_t to, const float* v, uint32_t barrier) {
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

void tma_load(uint32_t to, const TensorMap* map, int col, int row, uint64_t* barrier) {
  sim::load_box(*map, sim::block(), to, col, row, shared_address(barrier));
}

void tma_load_all(uint32_t to, const TensorMap* map, int col, int row, uint64_t* barrier, int mask) {
  for (sim::Block& b : sim::cluster->blocks)
    if (mask >> b.rank & 1) sim::load_box(*map, b, to, col, row, shared_address(barrier));
}

void tma_store(const TensorMap* map, uint32_t from, int col, int row) {
  sim::check_box(*map, from);
  const auto copy = [=, m = *map, &b = sim::block()] {
    sim::box(m, b.shared, from, col, row, [](uint16_t* source, const uint16_t* to) {
      if (to) *const_cast<uint16_t*>(to) = *source;
    });
  };
  sim::stores[&sim::self()].open->boxes.push_back(copy);
}

void tma_store_commit() {
  sim::Stores& mine = sim::stores[&sim::self()];
  const auto group = mine.open;
  mine.open = std::make_shared<sim::Store>();
  mine.groups.push_back(group);
  if (sim::mode_eager) group->run();
}

void store_matrices(void* row, const uint32_t (&v)[4]) {
  if (reinterpret_cast<uintptr_t>(row) % 16) sim::fail("an stmatrix that is not on 16 bytes");
  auto& t = sim::self();
  t.in[0] = row, t.in[1] = v;
  sim::together([](sim::Thread* const* lanes) {
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        const auto start = static_cast<const unsigned char*>(lanes[i * 8 + l / 4]->in[0]);
        lanes[l]->unfenced.emplace_back(const_cast<unsigned char*>(start) + l % 4 * 4,
                                        static_cast<const uint32_t*>(lanes[l]->in[1])[i]);
      }
  });
}

}  // namespace efft::cuda

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
