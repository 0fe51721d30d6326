// The CUDA operators that torch sees: checks, allocation, the order of launches, registration. Like
// ../cpu/bindings.cpp, but in a separate library: the CPU kernels must load where a GPU, its driver or the compiler of
// this file is missing.
//
// The caller chooses the tiles and whether p is computed inside the matmul (efft_kernels/kernels/cuda.py).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
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

template <class Sizes>
std::string joined(const Sizes& sizes) {
  std::string text;
  for (int64_t s : sizes) text += (text.empty() ? "" : ", ") + std::to_string(s);
  return text;
}

// Checks that all entries of t are inside its storage, which may have been freed or resized since t was made.
void check_memory(const char* name, const Tensor& t) {
  int64_t bytes = 0, end = t.storage_offset() + 1;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (!sizes[i]) return;
    end += (sizes[i] - 1) * strides[i];  // at most 2^60, as sizes and strides are limited
  }
  STD_TORCH_CHECK(end <= bytes / int64_t(t.element_size()), name,
                  " must have memory for all of its entries, but its storage has ", bytes,
                  " bytes: it was freed or resized");
}

// Checks that t has the dtype and device of `like`, sizes and strides that fit the kernels' 32 bits, and its memory.
void check_size(const char* name, const Tensor& t, const Tensor& like) {
#ifdef EFFT_SIM
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
#else
  const bool there = t.is_cuda() && t.get_device_index() == like.get_device_index();
  STD_TORCH_CHECK(there, name, " must be on the GPU of the others");
#endif
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of the other tensors");
  const auto sizes = t.sizes(), strides = t.strides();
  constexpr int64_t most = int64_t(1) << 30;
  for (size_t i = 0; i < sizes.size(); ++i)
    STD_TORCH_CHECK(sizes[i] <= most && strides[i] <= most, name, " must have sizes and strides up to ", most);
  check_memory(name, t);
}

// Checks the shape as well.
void check(const char* name, const Tensor& t, const Tensor& like, std::initializer_list<int64_t> shape) {
  check_size(name, t, like);
  const auto sizes = t.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()))
    STD_TORCH_CHECK(false, name, " must be [", joined(shape), "], got [", joined(sizes), "]");
}

void check_dim(const char* name, const Tensor& t, int64_t dim) {
  STD_TORCH_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions, got ", t.dim());
}

void check_sizes(std::initializer_list<int64_t> sizes) {
  for (int64_t s : sizes) STD_TORCH_CHECK(s >= 1, "every dimension but the rows of x must be at least 1");
}

// Returns uninitialised memory. torch::stable::new_empty would look its operator up by name at each call, which takes
// longer than the allocation.
Tensor empty(const std::vector<int64_t>& shape, const Tensor& like, bool float32 = false) {
  int32_t type, device, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  if (float32) type = aoti_torch_dtype_float32();
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), type, device, index, &made));
  Tensor t(made);
#ifdef EFFT_SIM
  memset(t.mutable_data_ptr(), 0xff, t.numel() * t.element_size());  // nan, to show what no kernel writes
#endif
  return t;
}

Tensor zeros(std::vector<int64_t> shape, const Tensor& like) {
  return torch::stable::new_zeros(like, {shape.data(), shape.size()});
}

void launched(const char* error) {
  STD_TORCH_CHECK(!error, "a CUDA kernel could not be launched: ", error ? error : "");
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
    // torch makes no context for a device that is current anyway, and tensor maps cannot be made without one
    launched(use_device(t.get_device_index()));
  }
#endif
  operator void*() const { return stream_; }

 private:
#ifndef EFFT_SIM
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

// A matrix in memory. Element (i, j) is at (i / group) * outer + (i % group) * row + j * col.
struct View {
  const void* data;
  int64_t row, col, group = UNGROUPED, outer = 0;
};

View view(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

View transposed(const View& v) { return {v.data, v.col, v.row}; }

// A tensor [..., columns], or the transpose of one with two dimensions, as a matrix.
struct Matrix {
  const Tensor* of;
  View view;
  int64_t rows, columns;
  bool turned = false;

  // In torch's form, which only copies need.
  Tensor tensor() const { return turned ? torch::stable::transpose(*of, 0, 1) : *of; }
};

Matrix matrix(const Tensor& t) { return {&t, view(t), t.size(0), t.size(1)}; }

Matrix transposed(const Matrix& m) { return {m.of, transposed(m.view), m.columns, m.rows, !m.turned}; }
Matrix transposed(const Tensor& t) { return {&t, transposed(view(t)), t.size(1), t.size(0), true}; }

// Flattens the leading dimensions.
Matrix flat(const char* name, const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int last = int(sizes.size()) - 1;
  STD_TORCH_CHECK(last >= 1, name, " must have at least 2 dimensions, got ", last + 1);
  int64_t rows = 1, row = sizes[last];
  for (int i = last - 1; i >= 0 && rows; --i) {
    if (sizes[i] == 1) continue;
    if (rows == 1) row = strides[i];
    STD_TORCH_CHECK(!sizes[i] || strides[i] == row * rows, name, " must have one step from row to row");
    rows *= sizes[i];
  }
  return {&t, {t.const_data_ptr(), row, strides[last]}, rows, sizes[last]};
}

// The shape [..., columns] with the leading dimensions of t.
std::vector<int64_t> shape_like(const Tensor& t, int64_t columns) {
  const auto sizes = t.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = columns;
  return shape;
}

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
Tensor form_p(const Matrix& x,     // [M, K]
              const Matrix& down,  // [K, R]
              void* stream) {
  Tensor p = empty({x.rows, down.columns}, *x.of);
  Product g = product(by_rows(x.view), either(transposed(down.view)), p, x.rows, down.columns, x.columns, 1);
  launched(products(dtype_of(p), &g, 1, stream));
  return p;
}

// Whether TMA can address a matrix with this many columns.
bool describable(const View& v, int64_t columns) { return v.row >= columns && rows(v).vector; }

// Returns the view of m [rows, columns], or of a copy of it, kept in `copies`, whose rows are aligned to 16 bytes.
View on_16_bytes(const Matrix& m, std::vector<Tensor>& copies) {
  if (describable(m.view, m.columns)) return m.view;
  Tensor wider = empty({m.rows, (m.columns + 7) / 8 * 8}, *m.of);
  Tensor copy = torch::stable::narrow(wider, 1, 0, m.columns);
  torch::stable::copy_(copy, m.tensor());
  copies.push_back(copy);
  return view(copy);
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
void fit_hopper(Linear& g, const Matrix& x, const Matrix& w, const std::optional<Tensor>& bias, const Matrix* down,
                const Matrix& up, const Matrix& p, std::vector<Tensor>& copies) {
  const bool fits = describable(x.view, g.K) && g.N % 8 == 0 &&
                    (g.w.k_major ? describable(transposed(w.view), g.K) : describable(w.view, g.N));
  STD_TORCH_CHECK(fits, "hopper needs x, w and y with rows on 16 bytes");
  STD_TORCH_CHECK(!down || g.w.k_major, "hopper forms p beside y only where weight has its rows side by side");
  if (down) {
    // weight and down are one operand of the tensor cores, so down is laid out like weight.
    g.down = by_rows(on_16_bytes(transposed(*down), copies));
    g.up = by_terms(on_16_bytes(up, copies));
  } else {
    const bool turned = describable(transposed(up.view), g.R) && !describable(up.view, g.N);
    g.up = turned ? by_rows(transposed(up.view)) : by_terms(on_16_bytes(up, copies));
    const View rows = on_16_bytes(p, copies);
    g.p = const_cast<void*>(rows.data), g.p_row = int32_t(rows.row);  // only read
  }
  if (bias && (g.bias_stride != 1 || reinterpret_cast<uintptr_t>(g.bias) % 4)) {
    Tensor copy = copies.emplace_back(empty({g.N}, *x.of));
    torch::stable::copy_(copy, *bias);
    g.bias = copy.const_data_ptr(), g.bias_stride = 1;
  }
}

// Computes y = [x | p] @ [w ; up] + bias, with p = x @ down, in the leading dimensions of x.
Tensor linear(const Matrix& x,  // [M, K]
              const Matrix& w,  // [K, N]
              const std::optional<Tensor>& bias,
              const Matrix* down,  // [K, R], or null if p is given
              const Matrix& up,    // [R, N]
              Tensor& p,           // [M, R]
              const Plan& plan, void* stream) {
  Tensor y = empty(shape_like(*x.of, up.columns), *x.of);
  Linear g;
  g.M = int32_t(x.rows), g.N = int32_t(up.columns), g.K = int32_t(x.columns), g.R = int32_t(up.rows);
  g.x = by_rows(x.view), g.w = either(transposed(w.view));
  if (bias) g.bias = bias->const_data_ptr(), g.bias_stride = int32_t(bias->stride(0));
  g.p = p.mutable_data_ptr(), g.p_row = int32_t(p.stride(0)), g.y = y.mutable_data_ptr();
  const bool bf16 = dtype_of(y) == Dtype::bf16;
  auto launch = bf16 ? lowrank_linear_bf16 : lowrank_linear_f16;
  std::vector<Tensor> copies;
  if (plan.hopper) {
    fit_hopper(g, x, w, bias, down, up, matrix(p), copies);
    launch = bf16 ? hopper_linear_bf16 : hopper_linear_f16;
  } else {
    g.up = either(transposed(up.view));
    if (down) g.down = either(transposed(down->view));
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
std::optional<std::tuple<Sum, std::optional<Sum>>> hopper_pass(const Matrix& dy, const Matrix* up, const Matrix& p,
                                                               bool turned, void* stream) {
  const int64_t M = dy.rows, N = dy.columns, R = p.columns;
  const HopperPassPlan plan = plan_hopper_pass(int32_t(M), int32_t(N), int32_t(R), up);
  if (!plan.tiles || !describable(dy.view, N)) return std::nullopt;
  std::vector<Tensor> copies;
  const Tensor& like = *dy.of;
  DyPass g;
  g.M = int32_t(M), g.N = int32_t(N), g.R = int32_t(R);
  g.dy = rows(dy.view), g.p = rows(on_16_bytes(p, copies));
  Sum dup{turned ? empty({N, R}, like) : empty({R, N}, like), empty({plan.runs, plan.slot()}, like, true), {}};
  g.dup_slots = dup.slots->mutable_data_ptr();
  dup.layout.ranks = plan.ranks, dup.layout.N = g.N, dup.layout.R = g.R;
  dup.layout.row = int32_t(turned ? 1 : N), dup.layout.col = int32_t(turned ? R : 1);
  std::optional<Sum> dp;
  if (up) {
    // Rows are aligned to 16 bytes, because the kernels that read dp need that.
    g.dp_row = int32_t((R + 7) / 8 * 8);
    Tensor wider = empty({M, g.dp_row}, like);
    dp = Sum{g.dp_row == R ? wider : torch::stable::narrow(wider, 1, 0, R), std::nullopt, {}};
    g.up = rows(on_16_bytes(*up, copies)), g.dp_slots = dp->out.mutable_data_ptr();
  }
  launched((dtype_of(like) == Dtype::bf16 ? hopper_pass_bf16 : hopper_pass_f16)(g, plan, stream));
  return std::make_tuple(dup, dp);
}

// Computes dup = p.T @ dy, stored as [N, R] if `turned` is set, and dp = dy @ up.T if up is given.
std::tuple<Sum, std::optional<Sum>> pass(const Matrix& dy,  // [M, N]
                                         const Matrix* up,  // [R, N], or null
                                         const Matrix& p,   // [M, R]
                                         bool turned, bool hopper, void* stream) {
  if (hopper)
    if (auto done = hopper_pass(dy, up, p, turned, stream)) return *done;
  const int64_t M = dy.rows, N = dy.columns, R = p.columns;
  const int64_t tiles = (M + DY_PASS_ROWS - 1) / DY_PASS_ROWS, split = runs(M, N, R);
  const Tensor& like = *dy.of;
  DyPass g;
  g.M = int32_t(M), g.N = int32_t(N), g.R = int32_t(R);
  g.rows = int32_t((tiles + split - 1) / split * DY_PASS_ROWS);  // whole tiles, and no run without rows
  g.dy = rows(dy.view), g.p = rows(p.view);
  g.dup_row = int32_t(turned ? 1 : N), g.dup_col = int32_t(turned ? R : 1);
  const int64_t count = (M + g.rows - 1) / g.rows, columns = dy_pass_columns(g.R), chunks = (N + columns - 1) / columns;

  Sum dup{turned ? empty({N, R}, like) : empty({R, N}, like), std::nullopt, {}};
  if (count > 1) dup.slots = empty({count, R, N}, like, true);
  g.dup_slots = (dup.slots ? *dup.slots : dup.out).mutable_data_ptr();
  std::optional<Sum> dp;
  if (up) {
    dp = Sum{empty({M, R}, like), std::nullopt, {}};
    if (chunks > 1) dp->slots = empty({chunks, M, R}, like, true);
    g.up = rows(up->view), g.dp_slots = (dp->slots ? *dp->slots : dp->out).mutable_data_ptr();
  }
  launched(dy_pass(dtype_of(like), g, stream));
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
std::tuple<Tensor, Tensor> lowrank_linear(const Tensor& x,                    // [..., K]: M rows
                                          const Tensor& weight,               // [N, K]
                                          const std::optional<Tensor>& bias,  // [N]
                                          const Tensor& down,                 // [K, R]
                                          const Tensor& up,                   // [R, N]
                                          bool single_pass, bool hopper, int64_t tile) {
  const Matrix rows = flat("x", x);
  check_dim("up", up, 2);
  const int64_t M = rows.rows, K = rows.columns, R = up.size(0), N = up.size(1);
  check_sizes({K, R, N});
  check_size("x", x, x);
  check("weight", weight, x, {N, K});
  if (bias) check("bias", *bias, x, {N});
  check("down", down, x, {K, R});
  check("up", up, x, {R, N});
  dtype_of(x);
  const Plan plan{single_pass, hopper, tile};
  check_plan(plan, R);
  if (!M) return {empty(shape_like(x, N), x), empty({0, R}, x)};
  const Stream stream(x);
  const Matrix factor = matrix(down);
  Tensor p = single_pass ? empty({M, R}, x) : form_p(rows, factor, stream);
  Tensor y = linear(rows, transposed(weight), bias, single_pass ? &factor : nullptr, matrix(up), p, plan, stream);
  return {y, p};
}

// dp = dy @ up.T        dx = dy @ weight + dp @ down.T        ddown = x.T @ dp        dup = p.T @ dy
// Each of dx, ddown and dup is computed if the tensor that only it reads is given: weight, x, p.
std::vector<Tensor> lowrank_linear_backward(const Tensor& dy,                     // [..., N]: M rows
                                            const std::optional<Tensor>& x,       // [..., K]
                                            const std::optional<Tensor>& weight,  // [N, K]
                                            const Tensor& down,                   // [K, R]
                                            const Tensor& up,                     // [R, N]
                                            const std::optional<Tensor>& p,       // [M, R]
                                            bool single_pass, bool hopper, int64_t tile) {
  const Matrix rows = flat("dy", dy);
  check_dim("down", down, 2);
  const int64_t M = rows.rows, N = rows.columns, K = down.size(0), R = down.size(1);
  check_sizes({N, K, R});
  check_size("dy", dy, dy);
  std::optional<Matrix> x_rows;
  if (x) {
    x_rows = flat("x", *x);
    check_size("x", *x, dy);
    STD_TORCH_CHECK(x_rows->rows == M && x_rows->columns == K, "x must have ", M, " rows of ", K, ", got ",
                    x_rows->rows, " of ", x_rows->columns);
  }
  if (weight) check("weight", *weight, dy, {N, K});
  check("down", down, dy, {K, R});
  check("up", up, dy, {R, N});
  if (p) check("p", *p, dy, {M, R});
  dtype_of(dy);
  const Plan plan{single_pass, hopper, tile};
  check_plan(plan, R);
  std::vector<Tensor> grads;
  if (!M) {
    if (weight) grads.push_back(empty(shape_like(dy, K), dy));
    if (x) grads.push_back(zeros({K, R}, dy));
    if (p) grads.push_back(zeros({R, N}, dy));
    return grads;
  }
  const Stream stream(dy);
  const bool need_dp = weight || x;
  std::optional<Tensor> dp, dx;
  std::vector<Sum> sums;
  // dx is the forward's matmul with other operands.
  const Matrix factor = matrix(up), up_turned = transposed(up), down_turned = transposed(down);
  const auto form_dx = [&](const Matrix* beside) {
    dx = linear(rows, matrix(*weight), std::nullopt, beside, down_turned, *dp, plan, stream);
  };
  if (weight && single_pass) {
    dp = empty({M, R}, dy);
    form_dx(&up_turned);
  }
  if (p) {
    // dup, and dp from the same read of dy.
    auto [dup, partial] = pass(rows, need_dp && !dp ? &factor : nullptr, matrix(*p), false, hopper, stream);
    sums.push_back(dup);
    if (partial) {
      complete({*partial}, stream);
      dp = partial->out;
    }
  } else if (need_dp && !dp) {
    dp = form_p(rows, up_turned, stream);
  }
  if (weight && !dx) form_dx(nullptr);
  if (x)  // (dp.T @ x).T
    sums.insert(sums.begin(), std::get<0>(pass(*x_rows, nullptr, matrix(*dp), true, hopper, stream)));
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
  return x.size(0) ? form_p(matrix(x), matrix(down), Stream(x)) : empty({0, down.size(1)}, x);
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
