// memory -> the two forms that tile() reads: chunks of rows, and panels of columns.

template <class T>
const T* row_of(const View& v, int64_t i) {
  return static_cast<const T*>(v.data) + (i / v.group) * v.outer + (i % v.group) * v.row;
}

// chunk[i, k] = a[row0 + i, k0 + k]      i < rows, k < columns; zeros in the rows up to the next multiple of MR
template <class T>
EFFT_NOINLINE void pack_chunk(const View& a, int64_t row0, int64_t rows, int64_t k0, int64_t columns, Sum<T>* chunk) {
  constexpr int VL = Shape<T>::VL, PITCH = Shape<T>::PITCH;
  const int64_t k_step = std::abs(a.col) > std::abs(a.row) ? 1 : columns;  // walk along the smaller stride
  for (int64_t from = 0; from < columns; from += k_step) {
    for (int64_t i = 0; i < rows; ++i) {
      const T* src = row_of<T>(a, row0 + i) + k0 * a.col;
      int64_t k = from;
      const int64_t end = std::min(columns, from + k_step);
      if (a.col == 1) {
        for (; k + VL <= end; k += VL) store(chunk + i * PITCH + k, load_sum(src + k));
      }
      for (; k < end; ++k) chunk[i * PITCH + k] = load_one(src + k * a.col);
    }
  }
  for (int64_t i = rows; i % MR; ++i) std::fill_n(chunk + i * PITCH, PITCH, Sum<T>{0});
}

template <class T>
Panel<T> panel_element(const T* p) {
  if constexpr (std::is_same_v<T, Panel<T>>) {
    return *p;
  } else {
    return load_one(p);
  }
}

// panel[k, j] = b[k, column0 + j]      k < K, j < NR; zeros in the columns from N on
template <class T>
EFFT_NOINLINE void pack_panel(const View& b, int64_t K, int64_t N, int64_t column0, Panel<T>* panel) {
  constexpr int NR = Shape<T>::NR;
  const int columns = int(std::min<int64_t>(NR, N - column0));
  constexpr int64_t STEP = 16;  // rows at a time: a cache line of a source that is contiguous along k
  for (int64_t k0 = 0; k0 < K; k0 += STEP) {
    const int64_t end = std::min(K, k0 + STEP);
    for (int j = 0; j < NR; ++j) {
      Panel<T>* dst = panel + panel_column<T>(j);
      if (j >= columns) {
        for (int64_t k = k0; k < end; ++k) dst[k * NR] = Panel<T>{};
        continue;
      }
      const T* src = static_cast<const T*>(b.data) + (column0 + j) * b.col;
      for (int64_t k = k0; k < end; ++k) dst[k * NR] = panel_element(src + k * b.row);
    }
  }
}

template <class T>
int64_t panels_of(int64_t columns) {
  return (columns + Shape<T>::NR - 1) / Shape<T>::NR;
}

// b [K, N] -> its panels one after the other, each [K, NR]
template <class T>
void pack_panels(const View& b, int64_t K, int64_t N, Panel<T>* panels) {
  constexpr int NR = Shape<T>::NR;
  for (int64_t j = 0; j < panels_of<T>(N); ++j) pack_panel<T>(b, K, N, j * NR, panels + j * K * NR);
}
