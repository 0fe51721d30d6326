// csrc/cuda/device.h for the host: the same kernels, compiled by a C++ compiler and run on the CPU. for tests only.
//
// every thread of a block is a fiber, blocks run one after the other. what real hardware may do at any time is done at
// the worst time, one of two for each (efft_sim_mode):
//   order  which warp runs as far as it can, up to a barrier, before the next: the first, or the last
//   eager  whether a cp.async copies at once, over what others may still read, or not before its thread waits for it
// shared memory is nan before a block writes it. a barrier that not all threads reach ends the program.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace efft::sim {

struct Copy {
  void* to;
  const void* from;
  int bytes;
  void run() const {
    memcpy(to, from, bytes);
    memset(static_cast<char*>(to) + bytes, 0, 16 - bytes);
  }
};

enum class At { ready, warp, block, end };

struct Thread {
  ucontext_t context;
  jmp_buf resume;
  bool started = false;
  At at = At::ready;
  dim3 index;
  // what a lane brings to an instruction of its warp
  const void *in[2] = {};
  void* out = nullptr;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

constexpr size_t STACK = 128 << 10, WARP_SIZE = 32;

struct Block {
  dim3 index, size, grid;
  std::vector<Thread> threads;
  std::vector<int> arrived;  // of each warp, at its instruction
  std::vector<unsigned char> shared;
  std::function<void()> kernel;
  jmp_buf scheduler;
  int current = 0;
};

inline Block* block;
inline int mode_order = 0, mode_eager = 0;
inline long launches = 0;
inline int most_shared = 0;  // bytes, of all launches

inline Thread& self() { return block->threads[block->current]; }

inline void stop(At at) {
  Thread& t = self();
  t.at = at;
  if (!_setjmp(t.resume)) _longjmp(block->scheduler, 1);
}

inline void entry() {
  block->kernel();
  stop(At::end);
}

inline void step(int number) {
  block->current = number;
  Thread& t = self();
  if (_setjmp(block->scheduler)) return;
  if (t.started) _longjmp(t.resume, 1);
  t.started = true;
  setcontext(&t.context);
}

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "simulated kernel, block (%u, %u, %u): %s\n", block->index.x, block->index.y, block->index.z, what);
  abort();
}

// runs a warp until all of its threads are at a barrier of the block, or at the end
inline bool run_warp(int warp) {
  bool moved = false;
  for (bool ready = true; ready;) {
    ready = false;
    for (size_t i = warp * WARP_SIZE; i < (warp + 1) * WARP_SIZE; ++i)
      if (block->threads[i].at == At::ready) step(int(i)), ready = moved = true;
  }
  return moved;
}

inline void run_block() {
  const int warps = int(block->threads.size() / WARP_SIZE);
  for (;;) {
    bool moved = false;
    for (int w = 0; w < warps; ++w) moved |= run_warp(mode_order ? warps - 1 - w : w);
    size_t ended = 0, waiting = 0;
    for (Thread& t : block->threads) ended += t.at == At::end, waiting += t.at == At::block;
    if (ended == block->threads.size()) return;
    if (waiting == block->threads.size())
      for (Thread& t : block->threads) t.at = At::ready;
    else if (!moved)
      fail("a barrier that not all threads reach");
  }
}

inline void run(dim3 grid, int threads, size_t shared, std::function<void()> kernel) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() < size_t(threads)) stacks.emplace_back(new char[STACK]);
  Block b;
  block = &b;
  b.grid = grid, b.size = dim3(threads), b.kernel = std::move(kernel);
  b.shared.resize(shared + 128);
  ++launches;
  for (b.index.z = 0; b.index.z < grid.z; ++b.index.z)
    for (b.index.y = 0; b.index.y < grid.y; ++b.index.y)
      for (b.index.x = 0; b.index.x < grid.x; ++b.index.x) {
        memset(b.shared.data(), 0xff, b.shared.size());
        b.threads.assign(threads, Thread());
        b.arrived.assign(threads / WARP_SIZE, 0);
        for (int i = 0; i < threads; ++i) {
          Thread& t = b.threads[i];
          t.index = dim3(i, 0, 0);
          getcontext(&t.context);
          t.context.uc_stack.ss_sp = stacks[i].get();
          t.context.uc_stack.ss_size = STACK;
          t.context.uc_link = nullptr;
          makecontext(&t.context, entry, 0);
        }
        run_block();
      }
}

// an instruction that the lanes of a warp run together: the last to arrive does it for all
template <class Instruction>
inline void together(Instruction instruction) {
  const int warp = block->current / int(WARP_SIZE);
  if (++block->arrived[warp] < int(WARP_SIZE)) return stop(At::warp);
  block->arrived[warp] = 0;
  Thread* const lanes = &block->threads[warp * WARP_SIZE];
  instruction(lanes);
  for (size_t i = 0; i < WARP_SIZE; ++i) lanes[i].at = At::ready;
}

inline void* shared_memory() {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(block->shared.data()) + 127) & ~uintptr_t(127));
}

}  // namespace efft::sim

#define threadIdx (efft::sim::self().index)
#define blockIdx (efft::sim::block->index)
#define blockDim (efft::sim::block->size)
#define gridDim (efft::sim::block->grid)
#define __syncthreads() efft::sim::stop(efft::sim::At::block)
#define EFFT_SHARED(name) unsigned char* name = static_cast<unsigned char*>(efft::sim::shared_memory())

namespace efft::cuda {

// d += a @ b of a warp. lane l holds
//   a [16, 16]  in register i, half h: row l / 4 + i % 2 * 8, column l % 4 * 2 + h + i / 2 * 8
//   b [16, 8]   in register i, half h: row l % 4 * 2 + h + i * 8, column l / 4
//   d [16, 8]   in register i: row l / 4 + i / 2 * 8, column l % 4 * 2 + i % 2
template <class T>
struct Numbers {
  static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
    auto& t = sim::self();
    t.in[0] = a, t.in[1] = b, t.out = d;
    sim::together([](sim::Thread* lanes) {
      float left[16][16], right[16][8];
      for (int l = 0; l < 32; ++l)
        for (int h = 0; h < 2; ++h) {
          for (int i = 0; i < 4; ++i)
            left[l / 4 + i % 2 * 8][l % 4 * 2 + h + i / 2 * 8] =
                T::widen(uint16_t(static_cast<const uint32_t*>(lanes[l].in[0])[i] >> 16 * h));
          for (int i = 0; i < 2; ++i)
            right[l % 4 * 2 + h + i * 8][l / 4] =
                T::widen(uint16_t(static_cast<const uint32_t*>(lanes[l].in[1])[i] >> 16 * h));
        }
      float sum[16][8] = {};
      for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k)
          for (int n = 0; n < 8; ++n) sum[m][n] += left[m][k] * right[k][n];
      for (int l = 0; l < 32; ++l)
        for (int i = 0; i < 4; ++i)
          static_cast<float*>(lanes[l].out)[i] += sum[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
    });
  }
};

struct Bf16 : Numbers<Bf16> {
  static float widen(uint16_t v) {
    const uint32_t bits = uint32_t(v) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
  static uint16_t round(float v) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return v != v ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};

struct F16 : Numbers<F16> {
  static float widen(uint16_t v) {
    _Float16 h;
    memcpy(&h, &v, 2);
    return float(h);
  }
  static uint16_t round(float v) {
    const _Float16 h = _Float16(v);
    uint16_t bits;
    memcpy(&bits, &h, 2);
    return bits;
  }
};

inline void cp_async16(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    sim::fail("a cp.async that is not on 16 bytes");
  const sim::Copy copy{to, from, bytes};
  if (sim::mode_eager)
    copy.run();
  else
    sim::self().open.push_back(copy);
}

inline void cp_async_commit() {
  auto& t = sim::self();
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}

template <int N>
void cp_async_wait() {
  auto& groups = sim::self().groups;
  for (; groups.size() > N; groups.pop_front())
    for (const sim::Copy& copy : groups.front()) copy.run();
}

template <bool TRANSPOSED>
void ldmatrix(uint32_t (&f)[4], const uint16_t* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) sim::fail("an ldmatrix that is not on 16 bytes");
  auto& t = sim::self();
  t.in[0] = row, t.out = f;
  sim::together([](sim::Thread* lanes) {
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        uint32_t both = 0;
        for (int h = 0; h < 2; ++h) {
          const int r = TRANSPOSED ? l % 4 * 2 + h : l / 4, c = TRANSPOSED ? l / 4 : l % 4 * 2 + h;
          both |= uint32_t(static_cast<const uint16_t*>(lanes[i * 8 + r].in[0])[c]) << 16 * h;
        }
        static_cast<uint32_t*>(lanes[l].out)[i] = both;
      }
  });
}

template <class Arguments>
const char* launch(void (*kernel)(Arguments), dim3 grid, int threads, int shared, void*, const Arguments& g) {
  sim::most_shared = shared > sim::most_shared ? shared : sim::most_shared;
  sim::run(grid, threads, shared, [&] { kernel(g); });
  return nullptr;
}

inline const char* upload(void* to, const void* from, size_t bytes, void*) {
  memcpy(to, from, bytes);
  return nullptr;
}

}  // namespace efft::cuda
