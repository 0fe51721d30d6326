// csrc/cuda/device.h for the host: the same kernels, compiled by a C++ compiler and run on the CPU. For tests only.
//
// Every thread of a block is a fiber; clusters of blocks run one after the other. What hardware may do at any time is
// done at the worst time (efft_sim_mode):
//   order  which warp runs as far as it can, up to a barrier, before the next: the first, or the last. Or one of many
//          random orders, in which some warps are slow and TMA does any of its pending work at any time
//   eager  whether a copy is done at once, over what others may still read, or as late as possible: a cp.async when its
//          thread waits for it, a TMA copy when no thread can continue without it
// Shared memory is nan before a block writes it. A barrier that not all threads reach ends the launch with an error.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>
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

enum class At { ready, meeting, block, cluster, wait, end };

constexpr size_t STACK = 128 << 10, WARP_SIZE = 32, GROUP_SIZE = 128;
constexpr size_t BASE = 128;  // offset of dynamic shared memory, modulo 1024 bytes: no more is guaranteed

struct Block;

struct Thread {
  ucontext_t context;
  jmp_buf resume;
  bool started = false;
  At at = At::ready;
  Block* block = nullptr;
  int number = 0;  // index in its block
  dim3 index;
  // the operands of a lane for an instruction of its warp
  const void* in[2] = {};
  void* out = nullptr;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  std::function<bool()> waits_for;                   // At::wait: until this returns true
  std::vector<std::pair<void*, uint32_t>> unfenced;  // stores that TMA does not see yet
};

// The threads that meet at an instruction, or at a barrier of some of them.
struct Meeting {
  std::vector<Thread*> there;
  std::vector<Thread*> passing;  // arrived without waiting
};

struct Block {
  dim3 index;
  int rank = 0;  // in the cluster
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
  std::vector<Meeting> warps, groups, named;
};

// The blocks that run together; without clusters there is one at a time.
struct Cluster {
  dim3 size, grid;
  std::vector<Block> blocks;
  std::vector<Thread> threads;
  std::function<void()> kernel;
  jmp_buf scheduler, given_up;
  std::string failure;
  Thread* current = nullptr;
  // pending work of TMA
  std::deque<std::function<void()>> engine;
};

inline Cluster* cluster;
inline int mode_order = 0, mode_eager = 0;  // order: 0, 1, or the seed of a random order
inline long launches = 0;
inline int most_shared = 0;  // bytes, the maximum over all launches
inline int fault = 0;        // the number of the planted fault that the kernels have, in a library with faults

inline Thread& self() { return *cluster->current; }
inline Block& block() { return *self().block; }

// Lets other threads run until this one is let go.
void stop(At at);
// Ends the launch, with what it has done so far.
[[noreturn]] void fail(const char* what);
// Returns null, or what went wrong.
const char* run(dim3 grid, int threads, size_t shared, std::function<void()> kernel, int blocks = 1);
// Returns all threads of a meeting of `count` in their order to the last to arrive, and none to the others.
std::vector<Thread*> met(Meeting& meeting, size_t count);
// Arrives for a thread that does not wait for the others.
void arrive_at(Meeting& meeting, size_t count);

// Runs an instruction of `count` threads together: the last to arrive executes it for all of them.
template <class Instruction>
inline void meet(Meeting& meeting, size_t count, Instruction instruction) {
  const std::vector<Thread*> there = met(meeting, count);
  if (there.empty()) return;
  instruction(there.data());
  for (Thread* t : there) t->at = At::ready;
}

// Runs an instruction of the lanes of a warp.
template <class Instruction>
inline void together(Instruction instruction) {
  meet(block().warps[self().number / WARP_SIZE], WARP_SIZE, instruction);
}

}  // namespace efft::sim

#define threadIdx (efft::sim::self().index)
#define blockIdx (efft::sim::block().index)
#define blockDim (efft::sim::cluster->size)
#define gridDim (efft::sim::cluster->grid)
#define __syncthreads() efft::sim::stop(efft::sim::At::block)
#define EFFT_SHARED(name) unsigned char* name = efft::sim::block().shared + efft::sim::BASE

namespace efft::cuda {

constexpr int BLOCKS_AT_ONCE = 8, BLOCKS_IN_FOURS = 8;  // few, so that a block has many rows

inline bool planted(int number) { return sim::fault == number; }

// d += a @ b of a warp. Lane l holds
//   a [16, 16]  in register i, half h: row l / 4 + i % 2 * 8, column l % 4 * 2 + h + i / 2 * 8
//   b [16, 8]   in register i, half h: row l % 4 * 2 + h + i * 8, column l / 4
//   d [16, 8]   in register i: row l / 4 + i / 2 * 8, column l % 4 * 2 + i % 2
template <class T>
struct Numbers {
  static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
    auto& t = sim::self();
    t.in[0] = a, t.in[1] = b, t.out = d;
    sim::together([](sim::Thread* const* lanes) {
      float left[16][16], right[16][8];
      for (int l = 0; l < 32; ++l)
        for (int h = 0; h < 2; ++h) {
          for (int i = 0; i < 4; ++i)
            left[l / 4 + i % 2 * 8][l % 4 * 2 + h + i / 2 * 8] =
                T::widen(uint16_t(static_cast<const uint32_t*>(lanes[l]->in[0])[i] >> 16 * h));
          for (int i = 0; i < 2; ++i)
            right[l % 4 * 2 + h + i * 8][l / 4] =
                T::widen(uint16_t(static_cast<const uint32_t*>(lanes[l]->in[1])[i] >> 16 * h));
        }
      float sum[16][8] = {};
      for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k)
          for (int n = 0; n < 8; ++n) sum[m][n] += left[m][k] * right[k][n];
      for (int l = 0; l < 32; ++l)
        for (int i = 0; i < 4; ++i) static_cast<float*>(lanes[l]->out)[i] += sum[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
    });
  }

  static uint32_t pack(float low, float high) { return T::round(low) | uint32_t(T::round(high)) << 16; }
};

struct Bf16 : Numbers<Bf16> {
  static float widen(uint16_t v) {
    const uint32_t bits = uint32_t(v) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
  static uint16_t round(float v) {  // Rounds to nearest, ties to even.
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

inline void warp_sync() {
  sim::together([](sim::Thread* const*) {});
}
inline void launch_dependents() {}
inline void wait_for_prerequisites() {}

inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - sim::block().shared);
}

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
  sim::together([](sim::Thread* const* lanes) {
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        uint32_t both = 0;
        for (int h = 0; h < 2; ++h) {
          const int r = TRANSPOSED ? l % 4 * 2 + h : l / 4, c = TRANSPOSED ? l / 4 : l % 4 * 2 + h;
          both |= uint32_t(static_cast<const uint16_t*>(lanes[i * 8 + r]->in[0])[c]) << 16 * h;
        }
        static_cast<uint32_t*>(lanes[l]->out)[i] = both;
      }
  });
}

template <class Arguments>
const char* launch(void (*kernel)(Arguments), dim3 grid, int threads, int shared, void*, const Arguments& g) {
  sim::most_shared = shared > sim::most_shared ? shared : sim::most_shared;
  return sim::run(grid, threads, shared, [&] { kernel(g); });
}

}  // namespace efft::cuda
