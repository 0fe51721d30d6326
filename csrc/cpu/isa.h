// the kernels of one instruction set. the including file defines VB (bytes of a vector), MR (rows of a tile, even) and
// EFFT_DOT (1: bfloat16 is multiplied by dot products of pairs), and enables the target before it includes this file.
// everything has internal linkage; otherwise the linker could merge the functions of different instruction sets.

#define EFFT_INLINE __attribute__((always_inline)) inline
#define EFFT_INLINE_LAMBDA __attribute__((always_inline))
#define EFFT_NOINLINE __attribute__((noinline))

namespace efft {
namespace {

#include "vec.inl"

#include "tile.inl"

#include "pack.inl"

#include "lowrank.inl"

#include "few_rows.inl"

template <class F>
auto with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f32:
      return f(float{});
    case Dtype::f64:
      return f(double{});
    case Dtype::bf16:
      return f(Bf16{});
    default:
      return f(Half{});
  }
}

int64_t packed_bytes(Dtype dtype, int64_t K, int64_t N) {
  return with_type(dtype, [&](auto t) {
    using T = decltype(t);
    return int64_t(panels_of<T>(N) * panel_size<T>(K) * sizeof(Panel<T>));
  });
}

void pack(Dtype dtype, const View& b, int64_t K, int64_t N, void* panels) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int NR = Shape<T>::NR;
    parallel_for(panels_of<T>(N), [&](int64_t j) {
      pack_panel<T, 2>(b, K, N, j * NR, static_cast<Panel<T>*>(panels) + j * panel_size<T>(K));
    });
  });
}

void lowrank(Dtype dtype, const LowRank& g) {
  with_type(dtype, [&](auto t) { LowRankPass<decltype(t)>(g).run(); });
}

bool overwrites_x(Dtype dtype, const LowRank& g) {
  LowRank apart = g;
  apart.c = g.a;  // anywhere but in the place of x
  return with_type(dtype, [&](auto t) { return LowRankPass<decltype(t)>(apart).shares() == 1; });
}

void few_rows(Dtype dtype, const LowRank& g) {
  with_type(dtype, [&](auto t) { FewRowsPass<decltype(t)>(g).run(); });
}

}  // namespace
}  // namespace efft
