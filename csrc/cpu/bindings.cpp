// the torch operators: arguments, allocation, registration. those of few rows are in bindings_few_rows.cpp
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>

#include "tensors.h"

namespace efft {

// torch splits the range statically; a shared counter balances the load between threads
void parallel_for(int64_t count, const std::function<void(int64_t)>& task) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min(count, thread_count());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next++) < count;) task(i);
  });
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

namespace {

std::atomic<const Kernels*> chosen{available_kernels()[0]};

}  // namespace

const Kernels& kernels() { return *chosen.load(); }

namespace {

std::string isa() { return kernels().name; }

std::string isas() {
  std::string names;
  for (auto k = available_kernels(); *k; ++k) names += (names.empty() ? "" : " ") + std::string((*k)->name);
  return names;
}

void set_isa(std::string name) {
  for (auto k = available_kernels(); *k; ++k) {
    if (name == (*k)->name) {
      chosen = *k;
      return;
    }
  }
  STD_TORCH_CHECK(false, "isa must be one of ", isas(), ", got ", name);
}

// packs weight [N, K]: panels of weight.T [K, N], or of weight itself for the backward
Tensor pack(const Tensor& weight, bool for_backward) {
  check_dim("weight", weight, 2);
  check_sizes({weight.size(0), weight.size(1)});
  check_product("weight", {weight.size(0), weight.size(1)});
  STD_TORCH_CHECK(weight.is_cpu(), "weight must be on the CPU");
  check_memory("weight", weight);
  const Dtype dtype = dtype_of(weight);
  const View b = for_backward ? view(weight) : transposed(view(weight));
  const int64_t K = weight.size(for_backward ? 0 : 1), N = weight.size(for_backward ? 1 : 0);
  const int64_t size[] = {kernels().packed_bytes(dtype, K, N)};
  Tensor packed = torch::stable::empty({size, 1}, ScalarType::Byte);
  kernels().pack(dtype, b, K, N, packed.mutable_data_ptr());
  return packed;
}

void check_packed(const Tensor& packed, Dtype dtype, int64_t K, int64_t N) {
  check_product("weight", {K, N});
  const bool plain = packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous();
  STD_TORCH_CHECK(plain && packed.numel() == kernels().packed_bytes(dtype, K, N),
                  "packed must be pack()'s result for this weight");
  check_memory("packed", packed);
}

// a hash that changes with the values: FNV-1a over wrapped diagonals, which visit every row and every column
int64_t fingerprint(const Tensor& t) {
  check_dim("weight", t, 2);
  check_memory("weight", t);
  dtype_of(t);
  const View v = view(t);
  const int64_t rows = t.size(0), columns = t.size(1), bytes = int64_t(t.element_size());
  const int64_t samples = rows && columns ? std::max(rows, columns) : 0;
  uint64_t hash = 14695981039346656037ull;
  for (int64_t i = 0, row = 0, column = 0; i < samples; ++i) {
    uint64_t bits = 0;
    const int64_t offset = row * v.row + column * v.col;
    row = row + 1 < rows ? row + 1 : 0;
    column = column + 1 < columns ? column + 1 : 0;
    __builtin_memcpy(&bits, static_cast<const char*>(v.data) + offset * bytes, bytes);
    hash = (hash ^ bits) * 1099511628211ull;
  }
  return int64_t(hash);
}

// the weight of a backward: as packed, or its rows, which the pass then packs for each block of rows of dy
void set_weight(LowRank& g, const Tensor& weight, Dtype dtype) {
  if (weight.scalar_type() == ScalarType::Byte) {
    check_packed(weight, dtype, g.K, g.N);
    g.b = weight.const_data_ptr();
  } else {
    STD_TORCH_CHECK(weight.is_cpu() && dtype_of(weight) == dtype, "weight must be packed, or have the dtype of dy");
    check_dim("weight", weight, 2);
    check("weight", weight, weight, {g.K, g.N});
    g.b_rows = view(weight);
  }
}

// the matrix down or up; of a stack the first adapter's
View factor(const Tensor& t) { return t.dim() == 3 ? View{t.const_data_ptr(), t.stride(1), t.stride(2)} : view(t); }

// from one adapter's matrix to the next in a stack
int64_t step(const Tensor& t) { return t.dim() == 3 ? t.stride(0) : 0; }

// y and p of a forward whose sizes and adapters are in g
std::tuple<Tensor, Tensor> results(LowRank& g, const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                                   const Tensor& down, const Tensor& up) {
  if (bias) check("bias", *bias, x, {g.N}), g.bias = view(*bias);
  check_packed(packed, dtype_of(x), g.K, g.N);
  Tensor y = empty({g.M, g.N}, x), p = empty({g.M, g.R}, x);
  g.a = view(x), g.b = packed.const_data_ptr(), g.d = factor(down), g.u = factor(up);
  g.d_adapter = step(down), g.u_adapter = step(up);
  g.c = view(y), g.p = p.mutable_data_ptr();
  kernels().lowrank(dtype_of(x), g);
  return {y, p};
}

// p = x @ down        y = x @ weight.T + bias + p @ up
std::tuple<Tensor, Tensor> lowrank_linear(const Tensor& x,                    // [M, K]
                                          const Tensor& packed,               // weight.T [K, N]
                                          const std::optional<Tensor>& bias,  // [N]
                                          const Tensor& down,                 // [K, R]
                                          const Tensor& up) {                 // [R, N]
  check_dim("x", x, 2);
  check_dim("up", up, 2);
  LowRank g;
  g.M = x.size(0), g.K = x.size(1), g.R = up.size(0), g.N = up.size(1);
  check_sizes({g.K, g.R, g.N});
  check_product("down", {g.K, g.R}), check_product("up", {g.R, g.N});
  check("x", x, x, {g.M, g.K});
  check("down", down, x, {g.K, g.R});
  check("up", up, x, {g.R, g.N});
  return results(g, x, packed, bias, down, up);
}

// the gradients of a backward whose sizes and adapters are in g: dx, ddown and dup where weight, x and p are given.
// overwrite_x: dx may be in the place of x. the schema does not say that: nothing reads it between here and ops/, which
// asks for it where nobody else knows x
std::vector<Tensor> gradients(LowRank& g, const Tensor& dy, const std::optional<Tensor>& weight,
                              const std::optional<Tensor>& x, const Tensor& down, const Tensor& up,
                              const std::optional<Tensor>& p, bool overwrite_x) {
  const auto like = [&](const Tensor& t) { return empty({t.sizes().begin(), t.sizes().end()}, dy); };
  std::vector<Tensor> grads;
  g.a = view(dy);
  if (weight || x) g.d = transposed(factor(up)), g.d_adapter = step(up);
  if (x) {
    check("x", *x, dy, {g.M, g.N});
    grads.push_back(like(down));
    g.x = view(*x), g.xp = grads.back().mutable_data_ptr();
  }
  if (p) {
    check("p", *p, dy, {g.M, g.R});
    grads.push_back(like(up));
    g.q = view(*p), g.qa = grads.back().mutable_data_ptr();
  }
  if (weight) {
    set_weight(g, *weight, dtype_of(dy));
    g.u = transposed(factor(down)), g.u_adapter = step(down);
    const bool over = overwrite_x && x && x->is_contiguous() && kernels().overwrites_x(dtype_of(dy), g);
    grads.insert(grads.begin(), over ? *x : empty({g.M, g.N}, dy));
    g.c = view(grads.front());
  }
  kernels().lowrank(dtype_of(dy), g);
  return grads;
}

// dp = dy @ up.T        dx = dy @ weight + dp @ down.T        ddown = x.T @ dp        dup = p.T @ dy
// see gradients
std::vector<Tensor> lowrank_linear_backward(const Tensor& dy,                     // [M, N]
                                            const std::optional<Tensor>& weight,  // [N, K], packed or not
                                            const std::optional<Tensor>& x,       // [M, K]
                                            const Tensor& down,                   // [K, R]
                                            const Tensor& up,                     // [R, N]
                                            const std::optional<Tensor>& p,       // [M, R]
                                            bool overwrite_x) {
  check_dim("dy", dy, 2);
  check_dim("down", down, 2);
  const int64_t M = dy.size(0), N = dy.size(1), K = down.size(0), R = down.size(1);
  check_sizes({N, K, R});
  check_product("down", {K, R}), check_product("up", {R, N});
  check("dy", dy, dy, {M, N});
  check("down", down, dy, {K, R});
  check("up", up, dy, {R, N});
  LowRank g;
  g.M = M, g.K = N, g.N = K, g.R = R;
  return gradients(g, dy, weight, x, down, up, p, overwrite_x);
}

void set_adapters(LowRank& g, const Tensor& ids, int64_t A) {
  check_dim("ids", ids, 1);
  STD_TORCH_CHECK(ids.is_cpu() && ids.scalar_type() == ScalarType::Long && ids.is_contiguous(),
                  "ids must be contiguous int64 on the CPU");
  check_memory("ids", ids);
  g.A = A, g.B = ids.size(0), g.ids = static_cast<const int64_t*>(ids.const_data_ptr());
  STD_TORCH_CHECK(g.B ? g.M % g.B == 0 : g.M == 0, "the rows must be a multiple of the ", g.B, " ids, got ", g.M);
  check_product("the factors of the ids", {g.B, g.K, g.R}), check_product("the factors of the ids", {g.B, g.R, g.N});
  for (int64_t i = 0; i < g.B; ++i) STD_TORCH_CHECK(g.ids[i] < A, "ids must be below ", A, ", got ", g.ids[i]);
}

// lowrank_linear where the M / B rows of each sample use the down and up of its id
std::tuple<Tensor, Tensor> mixed_linear(const Tensor& x,                    // [M, K]
                                        const Tensor& packed,               // weight.T [K, N]
                                        const std::optional<Tensor>& bias,  // [N]
                                        const Tensor& down,                 // [A, K, R]
                                        const Tensor& up,                   // [A, R, N]
                                        const Tensor& ids) {                // [B]
  check_dim("x", x, 2);
  check_dim("up", up, 3);
  LowRank g;
  g.M = x.size(0), g.K = x.size(1), g.R = up.size(1), g.N = up.size(2);
  const int64_t A = up.size(0);
  check_sizes({A, g.K, g.R, g.N});
  check("x", x, x, {g.M, g.K});
  check("down", down, x, {A, g.K, g.R});
  check("up", up, x, {A, g.R, g.N});
  set_adapters(g, ids, A);
  return results(g, x, packed, bias, down, up);
}

// see lowrank_linear_backward
std::vector<Tensor> mixed_linear_backward(const Tensor& dy,                     // [M, N]
                                          const std::optional<Tensor>& weight,  // [N, K], packed or not
                                          const std::optional<Tensor>& x,       // [M, K]
                                          const Tensor& down,                   // [A, K, R]
                                          const Tensor& up,                     // [A, R, N]
                                          const std::optional<Tensor>& p,       // [M, R]
                                          const Tensor& ids,                    // [B]
                                          bool overwrite_x) {
  check_dim("dy", dy, 2);
  check_dim("down", down, 3);
  const int64_t M = dy.size(0), N = dy.size(1), A = down.size(0), K = down.size(1), R = down.size(2);
  check_sizes({A, N, K, R});
  check("dy", dy, dy, {M, N});
  check("down", down, dy, {A, K, R});
  check("up", up, dy, {A, R, N});
  LowRank g;
  g.M = M, g.K = N, g.N = K, g.R = R;
  set_adapters(g, ids, A);
  return gradients(g, dy, weight, x, down, up, p, overwrite_x);
}

// sigma [S, P, Q] or dup [S, P, N] as a matrix: row p * S + s, or row s * P + p
View rows_by_p(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(2), t.size(0), t.stride(1)}; }
View rows_by_s(const Tensor& t) { return {t.const_data_ptr(), t.stride(1), t.stride(2), t.size(1), t.stride(0)}; }

// up[s] = scale * sigma[s] @ v, as [P, S, N]
Tensor group_update(const Tensor& sigma,  // [S, P, Q]
                    const Tensor& v,      // [Q, N]
                    double scale) {
  check_dim("sigma", sigma, 3);
  check_dim("v", v, 2);
  const int64_t S = sigma.size(0), P = sigma.size(1), Q = sigma.size(2), N = v.size(1);
  check_sizes({S, P, Q, N});
  check("sigma", sigma, v, {S, P, Q});
  check("v", v, sigma, {Q, N});
  LowRank g;
  g.M = S * P, g.K = Q, g.N = N, g.scale = scale;
  const Tensor panels = pack(v, true);
  Tensor up = empty({P, S, N}, v);
  g.a = rows_by_p(sigma), g.b = panels.const_data_ptr(), g.c = {up.mutable_data_ptr(), N, 1};
  kernels().lowrank(dtype_of(v), g);
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
  check_product("v", {Q, N});
  check("dup", dup, v, {S, P, N});
  check("sigma", sigma, v, {S, P, Q});
  check("v", v, v, {Q, N});
  LowRank g;
  g.M = S * P, g.K = N, g.R = Q, g.scale = scale;
  g.a = rows_by_s(dup);
  std::vector<Tensor> grads;
  if (need_sigma) {
    grads.push_back(empty({S, P, Q}, v));
    g.d = transposed(view(v)), g.p = grads.back().mutable_data_ptr();
  }
  if (need_v) {
    grads.push_back(empty({Q, N}, v));
    g.q = rows_by_s(sigma), g.qa = grads.back().mutable_data_ptr();
  }
  kernels().lowrank(dtype_of(v), g);
  return grads;
}

// weight += (down @ up).T, in place
void merge_(const std::vector<Tensor>& weights,  // each [N, K]
            const std::vector<Tensor>& downs,    // each [K, R]
            const std::vector<Tensor>& ups) {    // each [R, N]
  STD_TORCH_CHECK(weights.size() == downs.size() && weights.size() == ups.size(), "the lists must be of equal length");
  for (size_t i = 0; i < weights.size(); ++i) {
    check_dim("weight", weights[i], 2);
    check_dim("down", downs[i], 2);
    check_dim("up", ups[i], 2);
    check_sizes({weights[i].size(0), weights[i].size(1), downs[i].size(1)});
    check("weight", weights[i], weights[0], {ups[i].size(1), downs[i].size(0)});
    check("down", downs[i], weights[0], {weights[i].size(1), ups[i].size(0)});
    check("up", ups[i], weights[0], {downs[i].size(1), weights[i].size(0)});
  }
  for (size_t i = 0; i < weights.size(); ++i) {
    LowRank g;
    g.M = weights[i].size(0), g.K = downs[i].size(1), g.N = weights[i].size(1);
    const Tensor panels = pack(downs[i], false);
    g.a = transposed(view(ups[i])), g.b = panels.const_data_ptr(), g.c = view(weights[i]), g.c_adds = true;
    kernels().lowrank(dtype_of(weights[i]), g);
  }
}

}  // namespace
}  // namespace efft

STABLE_TORCH_LIBRARY(efft_cpu, m) {
  m.def("isa() -> str");
  m.def("isas() -> str");
  m.def("set_isa(str name) -> ()");
  m.def("pack(Tensor weight, bool for_backward) -> Tensor");
  m.def("fingerprint(Tensor weight) -> int");
  m.def("lowrank_linear(Tensor x, Tensor packed, Tensor? bias, Tensor down, Tensor up) -> (Tensor, Tensor)");
  m.def(
      "lowrank_linear_backward(Tensor dy, Tensor? weight, Tensor? x, Tensor down, Tensor up, Tensor? p, "
      "bool overwrite_x=False) -> Tensor[]");
  m.def("mixed_linear(Tensor x, Tensor packed, Tensor? bias, Tensor down, Tensor up, Tensor ids) -> (Tensor, Tensor)");
  m.def(
      "mixed_linear_backward(Tensor dy, Tensor? weight, Tensor? x, Tensor down, Tensor up, Tensor? p, Tensor ids, "
      "bool overwrite_x=False) -> Tensor[]");
  m.def("group_update(Tensor sigma, Tensor v, float scale) -> Tensor");
  m.def(
      "group_update_backward(Tensor dup, Tensor sigma, Tensor v, float scale, bool need_sigma, bool need_v) -> "
      "Tensor[]");
  m.def("merge_(Tensor(a!)[] weights, Tensor[] downs, Tensor[] ups) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(efft_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&efft::isa));
  m.impl("isas", TORCH_BOX(&efft::isas));
  m.impl("set_isa", TORCH_BOX(&efft::set_isa));
}

STABLE_TORCH_LIBRARY_IMPL(efft_cpu, CPU, m) {
  m.impl("pack", TORCH_BOX(&efft::pack));
  m.impl("fingerprint", TORCH_BOX(&efft::fingerprint));
  m.impl("lowrank_linear", TORCH_BOX(&efft::lowrank_linear));
  m.impl("lowrank_linear_backward", TORCH_BOX(&efft::lowrank_linear_backward));
  m.impl("mixed_linear", TORCH_BOX(&efft::mixed_linear));
  m.impl("mixed_linear_backward", TORCH_BOX(&efft::mixed_linear_backward));
  m.impl("group_update", TORCH_BOX(&efft::group_update));
  m.impl("group_update_backward", TORCH_BOX(&efft::group_update_backward));
  m.impl("merge_", TORCH_BOX(&efft::merge_));
}
