// the interface between bindings.cpp and the kernels. without torch, so that kernels can be compiled and tested alone.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>

namespace efft {

enum class Dtype { f32, f64, bf16, f16 };

// a matrix in memory. element (i, j) is at offset  (i / group) * outer + (i % group) * row + j * col:  `group` combines
// two leading dimensions with separate strides into one dimension of rows.
struct View {
  const void* data = nullptr;
  int64_t row = 0;
  int64_t col = 0;
  int64_t group = std::numeric_limits<int64_t>::max();
  int64_t outer = 0;
  bool wide = false;  // of few_rows in float16: held in float32, which has a larger range
};

// one pass over the rows of a:
//
//     p = a @ d        c = a @ b + p @ u + bias        qa = q.T @ a        xp = x.T @ p
//
// forward of the low-rank linear:  a = x, b = weight.T, d = down, u = up
// its backward:                    a = dy, b = weight, d = up.T, u = down.T, q = p, qa = dup, xp = ddown
// group update:                    a = sigma, b = v
// group backward:                  a = dup, d = v.T, p = dsigma, q = sigma, qa = dv
// merge:                           a = up.T, b = down.T, c = weight, c_adds
//
// a mixed batch has A adapters and B samples of M / B rows each. the rows of a sample use the d and u of its adapter,
// and qa and xp hold one sum per adapter, over the rows of its samples: zeros for an adapter without samples.
//
// a null pointer means that an output is not wanted or an input is absent. c may be in the place of x where
// overwrites_x.
struct LowRank {
  int64_t M = 0, K = 0, N = 0, R = 0;
  View a;                        // [M, K]
  const void* b = nullptr;       // [K, N] as packed by pack(); null: the pass packs b_rows, a panel at a time
  View b_rows;                   // [K, N]
  View d;                        // [K, R]
  View u;                        // [R, N]; null: c has no low-rank term
  View bias;                     // [1, N]
  View q;                        // [M, R]
  View x;                        // [M, N]
  double scale = 1.0;            // multiplies every output
  bool c_adds = false;           // c += instead of c =; not together with a bias
  View c;                        // [M, N]
  void* p = nullptr;             // [M, R]  contiguous
  void* qa = nullptr;            // [R, K]  contiguous; [A, R, K] if mixed
  void* xp = nullptr;            // [N, R]  contiguous; [A, N, R] if mixed
  const int64_t* ids = nullptr;  // [B]  adapter of each sample, negative for none; null: not a mixed batch
  int64_t A = 1, B = 0;
  int64_t d_adapter = 0, u_adapter = 0;  // stride between the d (u) of adapters, in elements
};

// the kernels of one instruction set
struct Kernels {
  const char* name;
  // size in bytes of packed b [K, N]
  int64_t (*packed_bytes)(Dtype, int64_t K, int64_t N);
  // packs b [K, N] into panels
  void (*pack)(Dtype, const View& b, int64_t K, int64_t N, void* panels);
  void (*lowrank)(Dtype, const LowRank&);
  // whether the threads share no columns of c, which may then be in the place of x
  bool (*overwrites_x)(Dtype, const LowRank&);
  // c = a @ b_rows + scale * q @ u + bias, or without q: c = scale * a @ b_rows + bias. nothing is packed, which pays
  // for few rows; c is contiguous along a row
  void (*few_rows)(Dtype, const LowRank&);
};

// the kernels this processor can run, the one to use first, terminated by a null pointer
const Kernels* const* available_kernels();

// runs task(0) ... task(count - 1) in any order, on thread_count() threads. both are defined by the host program.
void parallel_for(int64_t count, const std::function<void(int64_t)>& task);
int64_t thread_count();

}  // namespace efft
