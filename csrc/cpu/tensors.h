// checks and views of tensors for the torch operators. the bindings alone include torch headers (the stable ABI's).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace efft {

// the kernels in use
const Kernels& kernels();

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, "the dtype must be float32, bfloat16, float16 or float64");
  }
}

// all entries of t must be inside its storage: it may have been freed or resized (FSDP, offloading) since t was made
inline void check_memory(const char* name, const Tensor& t) {
  int64_t bytes = 0, end = t.storage_offset() + 1;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  bool inside = true;
  for (int64_t i = 0, step; i < t.dim(); ++i) {
    if (t.size(i) == 0) return;
    inside = inside && !__builtin_mul_overflow(t.size(i) - 1, t.stride(i), &step) &&
             !__builtin_add_overflow(end, step, &end);
  }
  STD_TORCH_CHECK(inside && end <= bytes / int64_t(t.element_size()), name,
                  " must have memory for all of its entries, but its storage has ", bytes,
                  " bytes: it was freed or resized");
}

inline void check(const char* name, const Tensor& t, const Tensor& like, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of the other tensors");
  const auto sizes = t.sizes();
  bool good = sizes.size() == shape.size();
  std::string wanted, got;
  for (size_t i = 0; i < sizes.size(); ++i) got += (i ? ", " : "") + std::to_string(sizes[i]);
  size_t i = 0;
  for (int64_t s : shape) {
    good = good && sizes[i] == s;
    wanted += (i++ ? ", " : "") + std::to_string(s);
  }
  STD_TORCH_CHECK(good, name, " must be [", wanted, "], got [", got, "]");
  check_memory(name, t);
}

// to be called before the tensor's sizes are read
inline void check_dim(const char* name, const Tensor& t, int64_t dim) {
  STD_TORCH_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions, got ", t.dim());
}

inline void check_sizes(std::initializer_list<int64_t> sizes) {
  for (int64_t s : sizes) STD_TORCH_CHECK(s >= 1, "every dimension but the rows of x must be at least 1");
}

// the bytes of a copy with these sizes, padded to whole tiles, must be an int64. an expanded tensor can have any sizes
inline void check_product(const char* name, std::initializer_list<int64_t> sizes) {
  int64_t bytes = 64;
  bool small = true;
  std::string got;
  for (int64_t s : sizes) {
    small = small && s < INT64_MAX - 512 && !__builtin_mul_overflow(bytes, s + 512, &bytes);
    got += (got.empty() ? "" : ", ") + std::to_string(s);
  }
  STD_TORCH_CHECK(small, name, " must fit into memory, got sizes [", got, "]");
}

inline Tensor empty(std::vector<int64_t> shape, const Tensor& like) {
  return torch::stable::empty({shape.data(), shape.size()}, like.scalar_type());
}

inline View view(const Tensor& t) {
  return t.dim() == 2 ? View{t.const_data_ptr(), t.stride(0), t.stride(1)} : View{t.const_data_ptr(), 0, t.stride(0)};
}

inline View transposed(View v) {
  std::swap(v.row, v.col);
  return v;
}

}  // namespace efft
