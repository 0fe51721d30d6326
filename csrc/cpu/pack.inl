// packing into the two layouts that tile() reads: chunks of rows and panels of columns.

template <class T>
const T* row_of(const View& v, int64_t i) {
  return static_cast<const T*>(v.data) + (i / v.group) * v.outer + (i % v.group) * v.row;
}

// chunk[i, k] = a[row0 + i, k0 + k]      i < rows, k < columns; the rest of a row's last cell and the rows up to the
// next multiple of MR are zeros
template <class T>
EFFT_NOINLINE void pack_chunk(const View& a, int64_t row0, int64_t rows, int64_t k0, int64_t columns, Cell<T>* chunk) {
  constexpr int PITCH = Shape<T>::PITCH, PER = Shape<T>::PER;
  using E = std::conditional_t<dots<T>, T, Sum<T>>;  // type of a number in a chunk
  constexpr int VL = dots<T> ? VB / sizeof(T) : Shape<T>::VL;
  const auto at = [&](int64_t i) { return reinterpret_cast<E*>(chunk + i * PITCH); };
  const int64_t k_step = std::abs(a.col) > std::abs(a.row) ? 1 : columns;  // iterate along the smaller stride
  for (int64_t from = 0; from < columns; from += k_step) {
    for (int64_t i = 0; i < rows; ++i) {
      const T* src = row_of<T>(a, row0 + i) + k0 * a.col;
      E* dst = at(i);
      int64_t k = from;
      const int64_t end = std::min(columns, from + k_step);
      if constexpr (dots<T>) {
        if (a.col == 1) {
          std::memcpy(dst + k, src + k, (end - k) * sizeof(T));
          k = end;
        }
        for (; k < end; ++k) dst[k] = src[k * a.col];
      } else {
        if (a.col == 1) {
          for (; k + VL <= end; k += VL) store(dst + k, load_sum(src + k));
        }
        for (; k < end; ++k) dst[k] = load_one(src + k * a.col);
      }
    }
  }
  for (int64_t k = columns; k % PER; ++k) {
    for (int64_t i = 0; i < rows; ++i) at(i)[k] = E{};
  }
  for (int64_t i = rows; i % MR; ++i) std::fill_n(chunk + i * PITCH, PITCH, Cell<T>{0});
}

// converts sums to cells: a copy, or two adjacent columns per cell
template <class T>
void pack_sums(const Sum<T>* sums, int64_t count, Cell<T>* to) {
  if constexpr (dots<T>) {
    for (int64_t j = 0; j < count; j += Shape<T>::VL)
      store_sum(reinterpret_cast<T*>(to) + j, load<Vec<float>>(sums + j));
  } else {
    std::copy_n(sums, count, to);
  }
}

// converts one element to a panel's type; not for dot products
template <class T>
Panel<T> panel_element(const T* p) {
  if constexpr (std::is_same_v<T, Panel<T>>) {
    return *p;
  } else {
    return load_one(p);
  }
}

// packs W elements of a row, with dot products together with those of the next row if `left` > 1 rows remain
template <class T, int W>
EFFT_INLINE void pack_row(const T* src, int64_t row, int64_t left, Panel<T>* panel) {
  for (int j = 0; j < W; j += Shape<T>::VL) {
    const auto bits = [&](const T* p) { return __builtin_convertvector(load<U16>(p + j), U32); };
    if constexpr (dots<T>) {
      store(panel + j, left > 1 ? bits(src) | bits(src + row) << 16 : bits(src));
    } else if constexpr (std::is_same_v<Panel<T>, Bf16> && W == 2 * Shape<T>::VL) {
      if (j == 0) store(panel, bits(src) | bits(src + W / 2) << 16);  // see panel_column()
    } else if constexpr (std::is_same_v<T, Panel<T>>) {
      std::memcpy(panel + j, src + j, Shape<T>::VL * sizeof(T));
    } else {
      store(panel + j, load_sum(src + j));
    }
  }
}

// panel[k, j] = b[k, column0 + j]      k < K, j < VECS * VL; columns from N on are zeros
template <class T, int VECS>
EFFT_NOINLINE void pack_panel(const View& b, int64_t K, int64_t N, int64_t column0, Panel<T>* panel) {
  constexpr int W = VECS * Shape<T>::VL, PER = Shape<T>::PER;
  const int columns = int(std::min<int64_t>(W, N - column0));
  if (b.col == 1 && columns == W) {
    const T* src = static_cast<const T*>(b.data) + column0;
    for (int64_t k = 0; k < K; k += PER) pack_row<T, W>(src + k * b.row, b.row, K - k, panel + k / PER * W);
    return;
  }
  constexpr int64_t STEP = 16 * PER;  // rows at a time: one cache line if the source is contiguous along k
  for (int64_t k0 = 0; k0 < K; k0 += STEP) {
    const int64_t end = std::min(K, k0 + STEP);
    for (int j = 0; j < W; ++j) {
      Panel<T>* dst = panel + panel_column<T, VECS>(j);
      if (j >= columns) {
        for (int64_t k = k0; k < end; k += PER) dst[k / PER * W] = Panel<T>{};
        continue;
      }
      const T* src = static_cast<const T*>(b.data) + (column0 + j) * b.col;
      if constexpr (dots<T>) {
        int64_t k = k0;
        for (; b.row == 1 && k + 2 <= end; k += 2) std::memcpy(dst + k / 2 * W, src + k, sizeof *dst);
        for (; k < end; k += 2) {
          const uint32_t second = k + 1 < end ? src[(k + 1) * b.row].bits : 0;
          dst[k / 2 * W] = src[k * b.row].bits | second << 16;
        }
      } else {
        for (int64_t k = k0; k < end; ++k) dst[k * W] = panel_element(src + k * b.row);
      }
    }
  }
}

template <class T>
int64_t panels_of(int64_t columns) {
  return (columns + Shape<T>::NR - 1) / Shape<T>::NR;
}

// elements of one panel [cells(K), NR]; a packed b [K, N] is panels_of(N) of them in a row
template <class T>
int64_t panel_size(int64_t K) {
  return cells<T>(K) * Shape<T>::NR;
}
