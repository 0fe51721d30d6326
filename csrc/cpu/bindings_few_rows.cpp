// the torch operators of few rows. they run where the host's time counts, so they check in place of their caller: what
// does not fit together gets an empty list, and the caller takes the general way, which names the argument
#include <torch/csrc/stable/library.h>

#include <optional>

#include "tensors.h"

namespace efft {
namespace {

bool strided(const Tensor& t) {
  int32_t layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
  return layout == aoti_torch_layout_strided();
}

// x [..., K], with sigma [P, Q] or [S, P, Q] as [S, P, Q]
struct FewRows {
  const Tensor& sigma;
  int64_t M = 0, K = 0, N = 0, S = 1, P = 0, Q = 0;
  bool fits = false;

  FewRows(const Tensor& rows, bool backward, const Tensor& weight, const Tensor& u, const Tensor& sigma,
          const Tensor& v)
      : sigma(sigma) {
    for (const Tensor* t : {&rows, &weight, &u, &sigma, &v}) {
      if (!t->is_cpu() || t->scalar_type() != rows.scalar_type() || !strided(*t)) return;
      if (t->numel() < 1 || t->numel() > INT32_MAX) return;  // an expanded tensor can have any sizes
    }
    const int64_t dim = rows.dim(), cores = sigma.dim() - 2;
    if (!dim || (dim > 2 && !rows.is_contiguous()) || weight.dim() != 2 || u.dim() != 2 || v.dim() != 2) return;
    if (cores != 0 && cores != 1) return;
    K = u.size(0), P = u.size(1), Q = v.size(0), N = v.size(1);
    if (cores) S = sigma.size(0);
    const int64_t features = rows.size(dim - 1);
    if (sigma.size(cores) != P || sigma.size(cores + 1) != Q || weight.size(1) != K) return;
    if (weight.size(0) % N || weight.size(0) / N != S || features != (backward ? weight.size(0) : K)) return;
    M = rows.numel() / features;
    check_memory(backward ? "dy" : "x", rows), check_memory("weight", weight), check_memory("u", u);
    check_memory("sigma", sigma), check_memory("v", v);
    fits = true;
  }

  View core(int64_t s) const {
    const int64_t cores = sigma.dim() - 2;
    return columns({sigma.const_data_ptr(), sigma.stride(cores), sigma.stride(cores + 1)},
                   cores ? s * sigma.stride(0) : 0);
  }

  // what the products of a pass hand on, p and q, dp and dq: of float16 in float32, whose range they may need
  Tensor between(int64_t columns) const {
    std::vector<int64_t> shape{M, columns};
    const ScalarType type = sigma.scalar_type();
    return torch::stable::empty({shape.data(), 2}, type == ScalarType::Half ? ScalarType::Float : type);
  }
  View view_between(const Tensor& t) const {
    View v = view(t);
    v.wide = t.scalar_type() != sigma.scalar_type();
    return v;
  }

  // the matrix that begins `entries` further on
  View columns(View v, int64_t entries) const {
    v.data =
        static_cast<const char*>(v.data) + entries * (v.wide ? int64_t(sizeof(float)) : int64_t(sigma.element_size()));
    return v;
  }
};

// [..., K] as rows
View rows_of(const Tensor& t) {
  const int64_t dim = t.dim();
  return {t.const_data_ptr(), dim == 1 ? 0 : dim == 2 ? t.stride(0) : t.size(dim - 1), t.stride(dim - 1)};
}

// c [M, N] = scale * a [M, K] @ b [K, N]
void product(Dtype dtype, int64_t M, int64_t K, int64_t N, View a, View b, View c, double scale = 1.0) {
  LowRank g;
  g.M = M, g.K = K, g.N = N, g.a = a, g.b_rows = b, g.c = c, g.scale = scale;
  kernels().few_rows(dtype, g);
}

Tensor like_rows(const Tensor& rows, int64_t features) {
  const auto sizes = rows.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = features;
  return empty(shape, rows);
}

// y = x @ weight.T + bias + scale * q @ v        p = x @ u        q[s] = p @ sigma[s], beside each other
std::vector<Tensor> few_rows(const Tensor& x,                    // [..., K]
                             const Tensor& weight,               // [S * N, K]
                             const std::optional<Tensor>& bias,  // [S * N]
                             const Tensor& u,                    // [K, P]
                             const Tensor& sigma,                // [P, Q] or [S, P, Q]
                             const Tensor& v,                    // [Q, N]
                             double scale) {
  const FewRows f(x, false, weight, u, sigma, v);
  if (!f.fits) return {};
  if (bias) {
    if (!bias->is_cpu() || bias->scalar_type() != x.scalar_type() || !strided(*bias)) return {};
    if (bias->dim() != 1 || bias->size(0) != weight.size(0)) return {};
    check_memory("bias", *bias);
  }
  const Dtype dtype = dtype_of(x);
  const int64_t all = f.S * f.N;
  Tensor y = like_rows(x, all), p = f.between(f.P), q = f.between(f.S * f.Q);
  const View x_rows = rows_of(x), y_rows{y.mutable_data_ptr(), all, 1};
  const View p_rows = f.view_between(p), q_rows = f.view_between(q);
  product(dtype, f.M, f.K, f.P, x_rows, view(u), p_rows);
  for (int64_t s = 0; s < f.S; ++s) {
    product(dtype, f.M, f.P, f.Q, p_rows, f.core(s), f.columns(q_rows, s * f.Q));
  }
  for (int64_t s = 0; s < f.S; ++s) {
    LowRank g;
    g.M = f.M, g.K = f.K, g.N = f.N, g.R = f.Q, g.scale = scale;
    g.a = x_rows, g.b_rows = transposed(f.columns(view(weight), s * f.N * weight.stride(0)));
    g.q = f.columns(q_rows, s * f.Q), g.u = view(v), g.c = f.columns(y_rows, s * f.N);
    if (bias) g.bias = f.columns(view(*bias), s * f.N * bias->stride(0));
    kernels().few_rows(dtype, g);
  }
  return {y, p, q};
}

// dq[s] = scale * dy[s] @ v.T        dp = sum_s dq[s] @ sigma[s].T        dx = dy @ weight + dp @ u.T
// dv = scale * sum_s q[s].T @ dy[s]        dsigma[s] = p.T @ dq[s]        du = x.T @ dp
std::vector<Tensor> few_rows_backward(const Tensor& dy,      // [..., S * N]
                                      const Tensor& x,       // [..., K]
                                      const Tensor& weight,  // [S * N, K]
                                      const Tensor& u, const Tensor& sigma, const Tensor& v,
                                      const Tensor& p,  // [M, P]
                                      const Tensor& q,  // [M, S * Q]
                                      double scale, bool need_x, bool need_u, bool need_sigma, bool need_v) {
  const FewRows f(dy, true, weight, u, sigma, v);
  STD_TORCH_CHECK(f.fits, "dy must be a strided tensor like y");
  const int64_t M = f.M, S = f.S, width = S * f.Q;
  Tensor dq = f.between(width), dp = f.between(f.P);
  check("p", p, dp, {M, f.P});
  check("q", q, dq, {M, width});
  STD_TORCH_CHECK(x.scalar_type() == dy.scalar_type() && x.dim() && x.numel() == f.M * f.K,
                  "x must be that of forward");
  check_memory("x", x);
  const Dtype dtype = dtype_of(dy);
  const View dy_rows = rows_of(dy);
  // row m * S + s: the columns of slice s in row m
  const View slices{dy_rows.data, dy_rows.col * f.N, dy_rows.col, S, dy_rows.row};
  std::vector<Tensor> grads;
  const View p_rows = f.view_between(p), q_rows = f.view_between(q);
  const View dp_rows = f.view_between(dp), dq_rows = f.view_between(dq);
  // row m * S + s of an [M, S * Q]
  const auto of_slices = [&](View v) { return v.row = f.Q, v; };
  if (need_x || need_u || need_sigma) {
    product(dtype, M * S, f.N, f.Q, slices, transposed(view(v)), of_slices(dq_rows), scale);
  }
  // the sum over slices is one product, with the cores on top of each other
  const View cores{sigma.const_data_ptr(), f.core(0).col, f.core(0).row, f.Q, sigma.dim() == 3 ? sigma.stride(0) : 0};
  if (need_x || need_u) product(dtype, M, width, f.P, dq_rows, cores, dp_rows);
  if (need_x) {
    grads.push_back(like_rows(dy, f.K));
    LowRank g;
    g.M = M, g.K = S * f.N, g.N = f.K, g.R = f.P;
    g.a = dy_rows, g.b_rows = view(weight), g.q = dp_rows, g.u = transposed(view(u));
    g.c = {grads.back().mutable_data_ptr(), f.K, 1};
    kernels().few_rows(dtype, g);
  }
  if (need_u) {
    grads.push_back(empty({f.K, f.P}, dy));
    product(dtype, f.K, M, f.P, transposed(rows_of(x)), dp_rows, view(grads.back()));
  }
  if (need_sigma) {
    const auto shape = sigma.sizes();
    grads.push_back(empty({shape.begin(), shape.end()}, dy));
    const View out{grads.back().mutable_data_ptr(), f.Q, 1};
    for (int64_t s = 0; s < S; ++s) {
      product(dtype, f.P, M, f.Q, transposed(p_rows), f.columns(dq_rows, s * f.Q), f.columns(out, s * f.P * f.Q));
    }
  }
  if (need_v) {
    grads.push_back(empty({f.Q, f.N}, dy));
    product(dtype, f.Q, M * S, f.N, transposed(of_slices(q_rows)), slices, view(grads.back()), scale);
  }
  return grads;
}

}  // namespace
}  // namespace efft

STABLE_TORCH_LIBRARY_FRAGMENT(efft_cpu, m) {
  m.def("few_rows(Tensor x, Tensor weight, Tensor? bias, Tensor u, Tensor sigma, Tensor v, float scale) -> Tensor[]");
  m.def(
      "few_rows_backward(Tensor dy, Tensor x, Tensor weight, Tensor u, Tensor sigma, Tensor v, Tensor p, Tensor q, "
      "float scale, bool need_x, bool need_u, bool need_sigma, bool need_v) -> Tensor[]");
}

// for every kind of tensor, because the operators themselves leave other kinds than plain ones to their caller
STABLE_TORCH_LIBRARY_IMPL(efft_cpu, CompositeExplicitAutograd, m) {
  m.impl("few_rows", TORCH_BOX(&efft::few_rows));
  m.impl("few_rows_backward", TORCH_BOX(&efft::few_rows_backward));
}
