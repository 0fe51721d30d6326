// compares the kernels of all instruction sets on odd shapes with plain loops in double. run under the sanitizers: each
// buffer is exactly as large as its contents, so that a read or write past its end is reported.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/kernels.h"

namespace efft {

extern const Kernels wide_kernels, wide_bf16_kernels;

int64_t thread_count() { return 3; }

void parallel_for(int64_t count, const std::function<void(int64_t)>& task) {
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < thread_count(); ++t) {
    threads.emplace_back([&, t] {
      for (int64_t i = t; i < count; i += thread_count()) task(i);
    });
  }
  for (auto& thread : threads) thread.join();
}

}  // namespace efft

namespace {

using namespace efft;

int failures = 0;

// one number in each dtype
struct Number {
  double f64;
  float f32;
  _Float16 f16;

  char* in(Dtype dtype) {
    if (dtype == Dtype::f64) return reinterpret_cast<char*>(&f64);
    if (dtype == Dtype::f16) return reinterpret_cast<char*>(&f16);
    return reinterpret_cast<char*>(&f32) + (dtype == Dtype::bf16 ? 2 : 0);  // the upper half of a float
  }
};

// a matrix in the dtype under test together with its values in double; `by_columns` makes it column-major
struct Matrix {
  Dtype dtype;
  int64_t rows, columns;
  bool by_columns;
  std::vector<double> values;
  std::unique_ptr<char[]> data;  // without padding, so that the sanitizer knows its end

  int64_t size() const { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

  Matrix(Dtype dtype, int64_t rows, int64_t columns, bool by_columns = false)
      : dtype(dtype), rows(rows), columns(columns), by_columns(by_columns), values(rows * columns) {
    static std::mt19937 random(0);
    std::uniform_int_distribution<int> eighths(-8, 8);  // exact in every dtype, as are short sums of them
    for (double& v : values) v = eighths(random) / 8.0;
    data.reset(new char[rows * columns * size()]);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) put(i, j, values[i * columns + j]);
    }
  }

  char* at(int64_t i, int64_t j) const { return data.get() + (by_columns ? j * rows + i : i * columns + j) * size(); }

  View view() const { return {data.get(), by_columns ? 1 : columns, by_columns ? rows : 1}; }

  void put(int64_t i, int64_t j, double v) {
    Number n{v, float(v), _Float16(v)};
    std::memcpy(at(i, j), n.in(dtype), size());
  }

  double get(int64_t i, int64_t j) const {
    Number n{};
    std::memcpy(n.in(dtype), at(i, j), size());
    return dtype == Dtype::f64 ? n.f64 : dtype == Dtype::f16 ? double(n.f16) : n.f32;
  }

  double operator()(int64_t i, int64_t j) const { return values[i * columns + j]; }
};

void expect(const char* what, const Kernels& k, const Matrix& got, int64_t K, const std::vector<double>& want) {
  const double digits = got.dtype == Dtype::bf16 ? 8 : got.dtype == Dtype::f16 ? 11 : got.dtype == Dtype::f32 ? 22 : 50;
  for (int64_t i = 0; i < got.rows; ++i) {
    for (int64_t j = 0; j < got.columns; ++j) {
      const double g = got.get(i, j), w = want[i * got.columns + j];
      if (std::abs(g - w) <= std::ldexp(std::abs(w) + std::sqrt(double(K)), int(-digits))) continue;
      std::printf("%s %s, dtype %d, [%lld, %lld] over %lld: element (%lld, %lld) is %g, not %g\n", k.name, what,
                  int(got.dtype), (long long)got.rows, (long long)got.columns, (long long)K, (long long)i, (long long)j,
                  g, w);
      ++failures;
      return;
    }
  }
}

template <class A, class B>
std::vector<double> product(int64_t I, int64_t J, int64_t L, const A& a, const B& b) {
  std::vector<double> c(I * J);
  for (int64_t i = 0; i < I; ++i) {
    for (int64_t l = 0; l < L; ++l) {
      for (int64_t j = 0; j < J; ++j) c[i * J + j] += a(i, l) * b(l, j);
    }
  }
  return c;
}

// all outputs of LowRank at once, then c alone: with b packed on the way, by the kernel of few rows, with c_adds
void run(const Kernels& k, Dtype dtype, int64_t M, int64_t K, int64_t N, int64_t R, bool transposed) {
  Matrix a(dtype, M, K, transposed), b(dtype, K, N, !transposed);
  Matrix d(dtype, K, R, transposed), u(dtype, R, N, !transposed);
  Matrix bias(dtype, 1, N), q(dtype, M, R, transposed), x(dtype, M, N, transposed);
  Matrix c(dtype, M, N), p(dtype, M, R), qa(dtype, R, K), xp(dtype, N, R), sum(dtype, M, N, transposed);
  std::unique_ptr<char[]> panels(new char[k.packed_bytes(dtype, K, N)]);
  k.pack(dtype, b.view(), K, N, panels.get());

  LowRank g;
  g.M = M, g.K = K, g.N = N, g.R = R;
  g.a = a.view(), g.b = panels.get(), g.d = d.view(), g.u = u.view(), g.bias = bias.view(), g.q = q.view();
  g.x = x.view(), g.c = c.view(), g.p = p.data.get(), g.qa = qa.data.get(), g.xp = xp.data.get();
  k.lowrank(dtype, g);

  const auto P = product(M, R, K, a, d);
  const auto p_at = [&](int64_t i, int64_t j) { return P[i * R + j]; };
  auto C = product(M, N, K, a, b);
  auto S = C;
  const auto low = product(M, N, R, p_at, u);
  for (int64_t i = 0; i < M * N; ++i) C[i] += low[i] + bias.values[i % N], S[i] = sum.values[i] + 0.5 * S[i];
  expect("p", k, p, K, P);
  expect("c", k, c, K * R, C);
  expect("qa", k, qa, M, product(R, K, M, [&](int64_t i, int64_t j) { return q(j, i); }, a));
  expect("xp", k, xp, M * K, product(N, R, M, [&](int64_t i, int64_t j) { return x(j, i); }, p_at));
  g.b = nullptr, g.b_rows = b.view();
  std::fill_n(c.data.get(), M * N * c.size(), char(0x7f));
  k.lowrank(dtype, g);
  expect("c of a pass that packs b", k, c, K * R, C);
  if (!transposed && k.overwrites_x(dtype, g)) {
    g.c = g.x;
    k.lowrank(dtype, g);
    expect("c in the place of x", k, x, K * R, C);
    expect("xp of x that is overwritten", k, xp, M * K,
           product(N, R, M, [&](int64_t i, int64_t j) { return x(j, i); }, p_at));
  }

  LowRank f;
  f.M = M, f.K = K, f.N = N, f.R = R, f.scale = 0.5;
  f.a = a.view(), f.b_rows = b.view(), f.q = q.view(), f.u = u.view(), f.bias = bias.view(), f.c = c.view();
  k.few_rows(dtype, f);
  auto F = product(M, N, R, q, u);
  const auto AB = product(M, N, K, a, b);
  for (int64_t i = 0; i < M * N; ++i) F[i] = 0.5 * F[i] + AB[i] + bias.values[i % N];
  expect("c of few rows", k, c, K * R, F);

  LowRank h;
  h.M = M, h.K = K, h.N = N;
  h.a = a.view(), h.b = panels.get(), h.c = sum.view(), h.c_adds = true, h.scale = 0.5;
  k.lowrank(dtype, h);
  expect("c +=", k, sum, K, S);
}

// a mixed batch: all outputs at once, with a sum over rows per adapter
void run_mixed(const Kernels& k, Dtype dtype, int64_t B, int64_t T, int64_t K, int64_t N, int64_t R, int64_t A,
               bool transposed) {
  const int64_t M = B * T;
  Matrix a(dtype, M, K, transposed), b(dtype, K, N, !transposed);
  Matrix d(dtype, A * K, R, transposed), u(dtype, A * R, N, !transposed);
  Matrix bias(dtype, 1, N), q(dtype, M, R, transposed), x(dtype, M, N, transposed);
  Matrix c(dtype, M, N), p(dtype, M, R), qa(dtype, A * R, K), xp(dtype, A * N, R);
  std::unique_ptr<char[]> panels(new char[k.packed_bytes(dtype, K, N)]);
  k.pack(dtype, b.view(), K, N, panels.get());
  // some samples without an adapter, some adjacent ones with the same, and one adapter without samples
  std::unique_ptr<int64_t[]> ids(new int64_t[B]);
  for (int64_t i = 0; i < B; ++i) ids[i] = i / 2 * 3 % A - 1;

  LowRank g;
  g.M = M, g.K = K, g.N = N, g.R = R, g.A = A, g.B = B, g.ids = ids.get();
  g.a = a.view(), g.b = panels.get(), g.d = d.view(), g.u = u.view(), g.bias = bias.view(), g.q = q.view();
  g.d_adapter = transposed ? K : K * R, g.u_adapter = transposed ? R * N : R;
  g.x = x.view(), g.c = c.view(), g.p = p.data.get(), g.qa = qa.data.get(), g.xp = xp.data.get();
  k.lowrank(dtype, g);

  std::vector<double> P(M * R), C = product(M, N, K, a, b), QA(A * R * K), XP(A * N * R);
  for (int64_t m = 0; m < M; ++m) {
    const int64_t id = ids[m / T];
    for (int64_t n = 0; n < N; ++n) C[m * N + n] += bias.values[n];
    for (int64_t r = 0; id >= 0 && r < R; ++r) {
      double& p_mr = P[m * R + r];
      for (int64_t i = 0; i < K; ++i) p_mr += a(m, i) * d(id * K + i, r), QA[(id * R + r) * K + i] += q(m, r) * a(m, i);
      for (int64_t n = 0; n < N; ++n)
        C[m * N + n] += p_mr * u(id * R + r, n), XP[(id * N + n) * R + r] += x(m, n) * p_mr;
    }
  }
  expect("mixed p", k, p, K, P);
  expect("mixed c", k, c, K * R, C);
  expect("mixed qa", k, qa, M, QA);
  expect("mixed xp", k, xp, M * K, XP);
}

}  // namespace

// with arguments: checks the kernels that they name, and prints only the names of the others
int main(int count, char** names) {
#ifdef EFFT_AVAILABLE_ONLY
  std::vector<const Kernels*> all;
#else
  std::vector<const Kernels*> all{&wide_kernels, &wide_bf16_kernels};
#endif
  for (auto k = available_kernels(); *k; ++k) all.push_back(*k);
  const int64_t shapes[][4] = {{0, 3, 5, 1},      {1, 1, 1, 1},    {2, 100, 33, 3},   {5, 7, 7, 17},
                               {13, 33, 100, 16}, {97, 40, 49, 5}, {30, 1100, 20, 9}, {25, 20, 300, 270}};
  const int64_t mixed[][6] = {{3, 0, 5, 3, 1, 2},     {1, 1, 1, 1, 1, 1},      {9, 1, 40, 33, 3, 4},
                              {4, 15, 33, 49, 16, 3}, {5, 31, 1100, 20, 9, 6}, {2, 25, 20, 300, 270, 2}};
  for (const Kernels* k : all) {
    if (count > 1 && std::none_of(names + 1, names + count, [&](char* name) { return !std::strcmp(name, k->name); })) {
      std::printf("%s\n", k->name);
      continue;
    }
    for (Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16}) {
      for (const auto& s : shapes) {
        for (bool transposed : {false, true}) run(*k, dtype, s[0], s[1], s[2], s[3], transposed);
      }
      for (const auto& s : mixed) {
        for (bool transposed : {false, true}) run_mixed(*k, dtype, s[0], s[1], s[2], s[3], s[4], s[5], transposed);
      }
    }
    std::printf("%s: %s\n", k->name, failures ? "FAILED" : "passed");
  }
  return failures != 0;
}
