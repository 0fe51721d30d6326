// The CUDA operators that torch sees: checks, allocation, the order of launches, registration. Like
// ../cpu/bindings.cpp, but in a separate library: the CPU kernels must load where a GPU, its driver or the compiler of
// this file is missing.
//
// The caller chooses the tiles and whether p is computed inside the matmul (efft_kernels/kernels/cuda.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

#ifdef EFFT_SIM
#define EFFT_DEVICE CPU  // The simulator's tensors are on the CPU; EFFT_LIBRARY gives its library a separate name.
#else
#define EFFT_LIBRARY efft_cuda
#define EFFT_DEVICE CUDA
#include <torch/csrc/stable/accelerator.h>
// A weak symbol, so that the library also builds and loads with a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace efft::cuda {
namespace {

Dtype dtype_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, "the dtype must be bfloat16 or float16");
  return type == ScalarType::BFloat16 ? Dtype::bf16 : Dtype::f16;
}

// Checks that t has the dtype and device of `like`, this shape, and sizes and strides that fit the kernels' 32 bits.
void check(const char* name, const Tensor& t, const Tensor& like, std::initializer_list<int64_t> shape) {
#ifdef EFFT_SIM
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
#else
  const bool there = t.is_cuda() && t.get_device_index() == like.get_device_index();
  STD_TORCH_CHECK(there, name, " must be on the GPU of the others");
#endif
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of the other tensors");
  std::string wanted, got;
  for (int64_t s : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(s);
  for (int64_t s : t.sizes()) got += (got.empty() ? "" : ", ") + std::to_string(s);
  STD_TORCH_CHECK(wanted == got, name, " must be [", wanted, "], got [", got, "]");
  constexpr int64_t most = int64_t(1) << 30;
  for (int64_t i = 0; i < t.dim(); ++i)
    STD_TORCH_CHECK(t.size(i) <= most && t.stride(i) <= most, name, " must have sizes and strides up to ", most);
}

void check_dim(const char* name, const Tensor& t, int64_t dim) {
  STD_TORCH_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions, got ", t.dim());
}

void check_sizes(std::initializer_list<int64_t> sizes) {
  for (int64_t s : sizes) STD_TORCH_CHECK(s >= 1, "every dimension but the rows of x must be at least 1");
}

Tensor empty(std::vector<int64_t> shape, const Tensor& like, std::optional<ScalarType> type = std::nullopt) {
  Tensor t = torch::stable::new_empty(like, {shape.data(), shape.size()}, type);
#ifdef EFFT_SIM
  memset(t.mutable_data_ptr(), 0xff, t.numel() * t.element_size());  // nan, to show what no kernel writes
#endif
  return t;
}

Tensor zeros(std::vector<int64_t> shape, const Tensor& like) {
  return torch::stable::new_zeros(like, {shape.data(), shape.size()});
}

// Makes the device of a tensor current for as long as this object lives, and gives its current stream.
class Stream {
 public:
#ifdef EFFT_SIM
  explicit Stream(const Tensor&) {}
#else
  explicit Stream(const Tensor& t) : guard_(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch is not a CUDA build");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
#endif
  operator void*() const { return stream_; }

 private:
#ifndef EFFT_SIM
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

void launched(const char* error) {
  STD_TORCH_CHECK(!error, "a CUDA kernel could not be launched: ", error ? error : "");
}

// A matrix in memory. Element (i, j) is at (i / group) * outer + (i % group) * row + j * col.
struct View {
  const void* data;
  int64_t row, col, group = UNGROUPED, outer = 0;
};

View view(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

View transposed(const View& v) { return {v.data, v.col, v.row}; }

// [S, P, Q] as a matrix with rows p * S + s, or s * P + p.
View rows_by_p(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(2), t.size(0), t.stride(1)}; }
View rows_by_s(const Tensor& t) { return {t.const_data_ptr(), t.stride(1), t.stride(2), t.size(1), t.stride(0)}; }

// The operand is copied row by row.
Operand rows(const View& v) {
  Operand g;
  g.data = v.data, g.row = int32_t(v.row), g.col = int32_t(v.col);
  g.group = int32_t(v.group), g.outer = int32_t(v.outer);
  g.vector = v.col == 1 && v.row % 8 == 0 && v.outer % 8 == 0 && reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
  return g;
}

// A factor of a product as its rows and columns: the columns are the `terms`, which the product sums over.
Operand by_rows(const View& v) {
  Operand g = rows(v);
  g.k_major = true;
  return g;
}

// The transposed case: the rows of `v` are the terms.
Operand by_terms(const View& v) { return rows(v); }

// v [rows of the result, terms], in whichever orientation it can be copied eight numbers at a time.
Operand either(const View& v) {
  const Operand straight = by_rows(v), turned = by_terms(transposed(v));
  return straight.vector || (!turned.vector && v.col <= v.row) ? straight : turned;
}

Product product(const Operand& a, const Operand& b, const Tensor& c, int64_t M, int64_t N, int64_t K, double scale) {
  Product g;
  g.a = a, g.b = b, g.c = c.mutable_data_ptr(), g.c_row = int32_t(N), g.c_col = 1;
  g.M = int32_t(M), g.N = int32_t(N), g.K = int32_t(K), g.scale = float(scale);
  return g;
}

// Computes p = x @ down.
Tensor form_p(const Tensor& x,   // [M, K]
              const View& down,  // [K, R]
              int64_t R, void* stream) {
  Tensor p = empty({x.size(0), R}, x);
  Product g = product(by_rows(view(x)), either(transposed(down)), p, x.size(0), R, x.size(1), 1);
  launched(products(dtype_of(x), &g, 1, stream));
  return p;
}

// Whether TMA can address a matrix with this many columns.
bool describable(const View& v, int64_t columns) { return v.row >= columns && rows(v).vector; }

// Returns t [rows, columns], or a copy of it whose rows are aligned to 16 bytes.
Tensor on_16_bytes(const Tensor& t) {
  if (describable(view(t), t.size(1))) return t;
  Tensor wider = empty({t.size(0), (t.size(1) + 7) / 8 * 8}, t);
  Tensor copy = torch::stable::narrow(wider, 1, 0, t.size(1));
  torch::stable::copy_(copy, t);
  return copy;
}

// How y is computed, as planned by kernels/cuda.py.
struct Plan {
  bool single_pass, hopper;
  int64_t tile;
};

void check_plan(const Plan& plan, int64_t R) {
  const bool known = plan.hopper ? plan.tile == (plan.single_pass ? 96 : 256) || plan.tile == 128 || plan.tile == 192
                                 : plan.tile == SMALL_TILE || plan.tile == LARGE_TILE;
  STD_TORCH_CHECK(known, "there are no tiles of ", plan.tile, " columns", plan.hopper ? " for hopper" : "");
  const int64_t most = plan.hopper ? HOPPER_RANK_BESIDE : MAX_RANK_BESIDE;
  STD_TORCH_CHECK(!plan.single_pass || R <= most, "p beside y must have at most ", most, " ranks, got ", R);
}

// Sets the operands of g as the kernel for compute capability 9.0 needs them: down and up in the same orientation and
// with rows aligned to 16 bytes, p with rows aligned to 16 bytes, the bias contiguous. The copies that this takes are
// kept alive in `copies`. x and w are too large to copy, so they are refused instead.
void fit_hopper(Linear& g, const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& down, const Tensor& up, const Tensor& p, std::vector<Tensor>& copies) {
  const auto fitted = [&](const Tensor& t) { return copies.emplace_back(on_16_bytes(t)); };
  const bool fits = describable(view(x), g.K) && g.N % 8 == 0 &&
                    (g.w.k_major ? describable(transposed(view(w)), g.K) : describable(view(w), g.N));
  STD_TORCH_CHECK(fits, "hopper needs x, w and y with rows on 16 bytes");
  STD_TORCH_CHECK(!down || g.w.k_major, "hopper forms p beside y only where weight has its rows side by side");
  if (down) {
    // weight and down are one operand of the tensor cores, so down is laid out like weight.
    g.down = by_rows(view(fitted(torch::stable::transpose(*down, 0, 1))));
    g.up = by_terms(view(fitted(up)));
  } else {
    const bool turned = describable(transposed(view(up)), g.R) && !describable(view(up), g.N);
    g.up = turned ? by_rows(transposed(view(up))) : by_terms(view(fitted(up)));
    const Tensor rows = fitted(p);
    g.p = rows.mutable_data_ptr(), g.p_row = int32_t(rows.stride(0));
  }
  if (bias && (g.bias_stride != 1 || reinterpret_cast<uintptr_t>(g.bias) % 4)) {
    Tensor copy = copies.emplace_back(empty({g.N}, x));
    torch::stable::copy_(copy, *bias);
    g.bias = copy.const_data_ptr(), g.bias_stride = 1;
  }
}

// Computes y = [x | p] @ [w ; up] + bias, with p = x @ down.
Tensor linear(const Tensor& x,  // [M, K]
              const Tensor& w,  // [K, N]
              const std::optional<Tensor>& bias,
              const std::optional<Tensor>& down,  // [K, R], or none if p is given
              const Tensor& up,                   // [R, N]
              const Tensor& p,                    // [M, R]
              const Plan& plan, void* stream) {
  Tensor y = empty({x.size(0), up.size(1)}, x);
  Linear g;
  g.M = int32_t(x.size(0)), g.N = int32_t(up.size(1)), g.K = int32_t(x.size(1)), g.R = int32_t(up.size(0));
  g.x = by_rows(view(x)), g.w = either(transposed(view(w)));
  if (bias) g.bias = bias->const_data_ptr(), g.bias_stride = int32_t(bias->stride(0));
  g.p = p.mutable_data_ptr(), g.p_row = int32_t(p.stride(0)), g.y = y.mutable_data_ptr();
  const bool bf16 = dtype_of(x) == Dtype::bf16;
  auto launch = bf16 ? lowrank_linear_bf16 : lowrank_linear_f16;
  std::vector<Tensor> copies;
  if (plan.hopper) {
    fit_hopper(g, x, w, bias, down, up, p, copies);
    launch = bf16 ? hopper_linear_bf16 : hopper_linear_f16;
  } else {
    g.up = either(transposed(view(up)));
    if (down) g.down = either(transposed(view(*down)));
  }
  launched(launch(g, int32_t(plan.tile), stream));
  return y;
}

// The number of runs that the rows of a pass over dy [M, N] are split into. It depends on the shape alone, never on the
// GPU at hand.
//
// There are enough runs for two blocks on each of 132 multiprocessors, as long as a run has 64 rows per rank: its slot
// of dup is written and read in float32, 8 R N bytes against 2 N per row of dy, so at most a sixteenth of the traffic.
// 64 runs are always allowed, because that few slots stay in the L2 cache, and no run is shorter than a tile.
int64_t runs(int64_t M, int64_t N, int64_t R) {
  const auto cdiv = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t chunks = cdiv(N, dy_pass_columns(int32_t(R)));
  const int64_t wanted = std::min(cdiv(264, chunks), std::max<int64_t>(64, M / (64 * std::max<int64_t>(R, 16))));
  return std::max<int64_t>(1, std::min(wanted, cdiv(M, DY_PASS_ROWS)));
}

// A sum and the slots to add up for it; without slots it is complete.
struct Sum {
  Tensor out;
  std::optional<Tensor> slots;
  Reduction layout;  // of the slots, where it differs from that of `out`
};

// Like pass(), by the kernel for compute capability 9.0; returns nothing where that kernel does not take the operands.
// up and p are copied if their rows are not aligned to 16 bytes.
std::optional<std::tuple<Sum, std::optional<Sum>>> hopper_pass(const Tensor& dy, const Tensor* up, const Tensor& p,
                                                               bool turned, void* stream) {
  const int64_t M = dy.size(0), N = dy.size(1), R = p.size(1);
  const HopperPassPlan plan = plan_hopper_pass(int32_t(M), int32_t(N), int32_t(R), up);
  if (!plan.tiles || !describable(view(dy), N)) return std::nullopt;
  const Tensor p_rows = on_16_bytes(p), up_rows = up ? on_16_bytes(*up) : p;
  DyPass g;
  g.M = int32_t(M), g.N = int32_t(N), g.R = int32_t(R);
  g.dy = rows(view(dy)), g.p = rows(view(p_rows));
  Sum dup{turned ? empty({N, R}, dy) : empty({R, N}, dy), empty({plan.runs, plan.slot()}, dy, ScalarType::Float)};
  g.dup_slots = dup.slots->mutable_data_ptr();
  dup.layout.ranks = plan.ranks, dup.layout.N = g.N, dup.layout.R = g.R;
  dup.layout.row = int32_t(turned ? 1 : N), dup.layout.col = int32_t(turned ? R : 1);
  std::optional<Sum> dp;
  if (up) {
    // Rows are aligned to 16 bytes, because the kernels that read dp need that.
    g.dp_row = int32_t((R + 7) / 8 * 8);
    Tensor wider = empty({M, g.dp_row}, dy);
    dp = Sum{torch::stable::narrow(wider, 1, 0, R), std::nullopt};
    g.up = rows(view(up_rows)), g.dp_slots = dp->out.mutable_data_ptr();
  }
  launched((dtype_of(dy) == Dtype::bf16 ? hopper_pass_bf16 : hopper_pass_f16)(g, plan, stream));
  return std::make_tuple(dup, dp);
}

// Computes dup = p.T @ dy, stored as [N, R] if `turned` is set, and dp = dy @ up.T if up is given.
std::tuple<Sum, std::optional<Sum>> pass(const Tensor& dy,  // [M, N]
                                         const Tensor* up,  // [R, N], or null
                                         const Tensor& p,   // [M, R]
                                         bool turned, bool hopper, void* stream) {
  if (hopper)
    if (auto done = hopper_pass(dy, up, p, turned, stream)) return *done;
  const int64_t M = dy.size(0), N = dy.size(1), R = p.size(1);
  const int64_t tiles = (M + DY_PASS_ROWS - 1) / DY_PASS_ROWS, split = runs(M, N, R);
  DyPass g;
  g.M = int32_t(M), g.N = int32_t(N), g.R = int32_t(R);
  g.rows = int32_t((tiles + split - 1) / split * DY_PASS_ROWS);  // whole tiles, and no run without rows
  g.dy = rows(view(dy)), g.p = rows(view(p));
  g.dup_row = int32_t(turned ? 1 : N), g.dup_col = int32_t(turned ? R : 1);
  const int64_t count = (M + g.rows - 1) / g.rows, columns = dy_pass_columns(g.R), chunks = (N + columns - 1) / columns;

  Sum dup{turned ? empty({N, R}, dy) : empty({R, N}, dy), std::nullopt};
  if (count > 1) dup.slots = empty({count, R, N}, dy, ScalarType::Float);
  g.dup_slots = (dup.slots ? *dup.slots : dup.out).mutable_data_ptr();
  std::optional<Sum> dp;
  if (up) {
    dp = Sum{empty({M, R}, dy), std::nullopt};
    if (chunks > 1) dp->slots = empty({chunks, M, R}, dy, ScalarType::Float);
    g.up = rows(view(*up)), g.dp_slots = (dp->slots ? *dp->slots : dp->out).mutable_data_ptr();
  }
  launched(dy_pass(dtype_of(dy), g, stream));
  return {dup, dp};
}

// Completes up to two sums in one launch.
void complete(const std::vector<Sum>& sums, void* stream) {
  Reductions all;
  int n = 0;
  for (const Sum& sum : sums) {
    if (!sum.slots) continue;
    Reduction& g = all.of[n++] = sum.layout;
    g.slots = static_cast<const float*>(sum.slots->const_data_ptr()), g.out = sum.out.mutable_data_ptr();
    g.count = int32_t(sum.slots->size(0)), g.size = sum.slots->numel() / g.count;
  }
  if (n) launched(reduce(dtype_of(sums[0].out), all, stream));
}

// p = x @ down        y = x @ weight.T + bias + p @ up
std::tuple<Tensor, Tensor> lowrank_linear(const Tensor& x,                    // [M, K]
                                          const Tensor& weight,               // [N, K]
                                          const std::optional<Tensor>& bias,  // [N]
                                          const Tensor& down,                 // [K, R]
                                          const Tensor& up,                   // [R, N]
                                          bool single_pass, bool hopper, int64_t tile) {
  check_dim("x", x, 2);
  check_dim("up", up, 2);
  const int64_t M = x.size(0), K = x.size(1), R = up.size(0), N = up.size(1);
  check_sizes({K, R, N});
  check("x", x, x, {M, K});
  check("weight", weight, x, {N, K});
  if (bias) check("bias", *bias, x, {N});
  check("down", down, x, {K, R});
  check("up", up, x, {R, N});
  dtype_of(x);
  const Plan plan{single_pass, hopper, tile};
  check_plan(plan, R);
  if (!M) return {empty({0, N}, x), empty({0, R}, x)};
  const Stream stream(x);
  const Tensor p = single_pass ? empty({M, R}, x) : form_p(x, view(down), R, stream);
  const std::optional<Tensor> beside = single_pass ? std::optional<Tensor>(down) : std::nullopt;
  return {linear(x, torch::stable::transpose(weight, 0, 1), bias, beside, up, p, plan, stream), p};
}

// dp = dy @ up.T        dx = dy @ weight + dp @ down.T        ddown = x.T @ dp        dup = p.T @ dy
// Each of dx, ddown and dup is computed if the tensor that only it reads is given: weight, x, p.
std::vector<Tensor> lowrank_linear_backward(const Tensor& dy,                     // [M, N]
                                            const std::optional<Tensor>& x,       // [M, K]
                                            const std::optional<Tensor>& weight,  // [N, K]
                                            const Tensor& down,                   // [K, R]
                                            const Tensor& up,                     // [R, N]
                                            const std::optional<Tensor>& p,       // [M, R]
                                            bool single_pass, bool hopper, int64_t tile) {
  check_dim("dy", dy, 2);
  check_dim("down", down, 2);
  const int64_t M = dy.size(0), N = dy.size(1), K = down.size(0), R = down.size(1);
  check_sizes({N, K, R});
  check("dy", dy, dy, {M, N});
  if (x) check("x", *x, dy, {M, K});
  if (weight) check("weight", *weight, dy, {N, K});
  check("down", down, dy, {K, R});
  check("up", up, dy, {R, N});
  if (p) check("p", *p, dy, {M, R});
  dtype_of(dy);
  const Plan plan{single_pass, hopper, tile};
  check_plan(plan, R);
  std::vector<Tensor> grads;
  if (!M) {
    if (weight) grads.push_back(empty({0, K}, dy));
    if (x) grads.push_back(zeros({K, R}, dy));
    if (p) grads.push_back(zeros({R, N}, dy));
    return grads;
  }
  const Stream stream(dy);
  const bool need_dp = weight || x;
  std::optional<Tensor> dp, dx;
  std::vector<Sum> sums;
  // dx is the forward's matmul with other operands.
  const Tensor up_turned = torch::stable::transpose(up, 0, 1), down_turned = torch::stable::transpose(down, 0, 1);
  const auto form_dx = [&](const std::optional<Tensor>& beside) {
    dx = linear(dy, *weight, std::nullopt, beside, down_turned, *dp, plan, stream);
  };
  if (weight && single_pass) {
    dp = empty({M, R}, dy);
    form_dx(up_turned);
  }
  if (p) {
    // dup, and dp from the same read of dy.
    auto [dup, partial] = pass(dy, need_dp && !dp ? &up : nullptr, *p, false, hopper, stream);
    sums.push_back(dup);
    if (partial) {
      complete({*partial}, stream);
      dp = partial->out;
    }
  } else if (need_dp && !dp) {
    dp = form_p(dy, view(up_turned), R, stream);
  }
  if (weight && !dx) form_dx(std::nullopt);
  if (x) sums.insert(sums.begin(), std::get<0>(pass(*x, nullptr, *dp, true, hopper, stream)));  // (dp.T @ x).T
  complete(sums, stream);
  if (dx) grads.push_back(*dx);
  for (const Sum& sum : sums) grads.push_back(sum.out);
  return grads;
}

// Computes p = x @ down.
Tensor lowrank_p(const Tensor& x,       // [M, K]
                 const Tensor& down) {  // [K, R]
  check_dim("x", x, 2);
  check_dim("down", down, 2);
  check("x", x, x, {x.size(0), x.size(1)});
  check("down", down, x, {x.size(1), down.size(1)});
  check_sizes({down.size(0), down.size(1)});
  dtype_of(x);
  return x.size(0) ? form_p(x, view(down), down.size(1), Stream(x)) : empty({0, down.size(1)}, x);
}

// up[s] = scale * sigma[s] @ v, as [P, S, N]
Tensor group_update(const Tensor& sigma,  // [S, P, Q]
                    const Tensor& v,      // [Q, N]
                    double scale) {
  check_dim("sigma", sigma, 3);
  check_dim("v", v, 2);
  const int64_t S = sigma.size(0), P = sigma.size(1), Q = sigma.size(2), N = v.size(1);
  check_sizes({S, P, Q, N});
  check("sigma", sigma, sigma, {S, P, Q});
  check("v", v, sigma, {Q, N});
  Tensor up = empty({P, S, N}, v);
  Product g = product(by_rows(rows_by_p(sigma)), either(transposed(view(v))), up, P * S, N, Q, scale);
  launched(products(dtype_of(v), &g, 1, Stream(v)));
  return up;
}

// dsigma[s] = scale * dup[s] @ v.T        dv = sum_s scale * sigma[s].T @ dup[s]
std::vector<Tensor> group_update_backward(const Tensor& dup,    // [S, P, N]
                                          const Tensor& sigma,  // [S, P, Q]
                                          const Tensor& v,      // [Q, N]
                                          double scale, bool need_sigma, bool need_v) {
  check_dim("sigma", sigma, 3);
  check_dim("v", v, 2);
  const int64_t S = sigma.size(0), P = sigma.size(1), Q = sigma.size(2), N = v.size(1);
  check_sizes({S, P, Q, N});
  check("sigma", sigma, sigma, {S, P, Q});
  check("dup", dup, sigma, {S, P, N});
  check("v", v, sigma, {Q, N});
  std::vector<Product> list;
  std::vector<Tensor> grads;
  if (need_sigma) {
    grads.push_back(empty({S, P, Q}, v));
    list.push_back(product(by_rows(rows_by_s(dup)), either(view(v)), grads.back(), S * P, Q, N, scale));
  }
  if (need_v) {
    grads.push_back(empty({Q, N}, v));
    list.push_back(product(by_terms(rows_by_s(sigma)), by_terms(rows_by_s(dup)), grads.back(), Q, N, S * P, scale));
  }
  launched(products(dtype_of(v), list.data(), int32_t(list.size()), Stream(v)));
  return grads;
}

// weight += (down @ up).T, in place
void merge_(const std::vector<Tensor>& weights,  // each [N, K]
            const std::vector<Tensor>& downs,    // each [K, R]
            const std::vector<Tensor>& ups) {    // each [R, N]
  STD_TORCH_CHECK(weights.size() == downs.size() && weights.size() == ups.size(), "the lists must be of equal length");
  STD_TORCH_CHECK(!weights.empty(), "the lists must not be empty");
  std::vector<Product> list;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor &weight = weights[i], &down = downs[i], &up = ups[i];
    check_dim("weight", weight, 2);
    check_dim("down", down, 2);
    check_dim("up", up, 2);
    const int64_t N = weight.size(0), K = weight.size(1), R = down.size(1);
    check_sizes({N, K, R});
    check("weight", weight, weights[0], {N, K});
    check("down", down, weights[0], {K, R});
    check("up", up, weights[0], {R, N});
    list.push_back(product(either(transposed(view(up))), either(view(down)), weight, N, K, R, 1));
    list.back().c_row = int32_t(weight.stride(0)), list.back().c_col = int32_t(weight.stride(1));
    list.back().adds = true;
  }
  const Stream stream(weights[0]);
  launched(products(dtype_of(weights[0]), list.data(), int32_t(list.size()), stream));
}

}  // namespace
}  // namespace efft::cuda

STABLE_TORCH_LIBRARY(EFFT_LIBRARY, m) {
  m.def(
      "lowrank_linear(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up, bool single_pass, bool hopper, "
      "int tile)"
      " -> (Tensor, Tensor)");
  m.def(
      "lowrank_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor down, Tensor up, Tensor? p, "
      "bool single_pass, bool hopper, int tile) -> Tensor[]");
  m.def("lowrank_p(Tensor x, Tensor down) -> Tensor");
  m.def("group_update(Tensor sigma, Tensor v, float scale) -> Tensor");
  m.def(
      "group_update_backward(Tensor dup, Tensor sigma, Tensor v, float scale, bool need_sigma, bool need_v) -> "
      "Tensor[]");
  m.def("merge_(Tensor(a!)[] weights, Tensor[] downs, Tensor[] ups) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(EFFT_LIBRARY, EFFT_DEVICE, m) {
  m.impl("lowrank_linear", TORCH_BOX(&efft::cuda::lowrank_linear));
  m.impl("lowrank_linear_backward", TORCH_BOX(&efft::cuda::lowrank_linear_backward));
  m.impl("lowrank_p", TORCH_BOX(&efft::cuda::lowrank_p));
  m.impl("group_update", TORCH_BOX(&efft::cuda::group_update));
  m.impl("group_update_backward", TORCH_BOX(&efft::cuda::group_update_backward));
  m.impl("merge_", TORCH_BOX(&efft::cuda::merge_));
}
