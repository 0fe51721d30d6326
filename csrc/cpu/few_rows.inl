// c = a @ b_rows + scale * q @ u + bias (kernels.h) for so few rows that packing b or u would cost more than the
// product.

template <class T>
class FewRowsPass {
  using S = Sum<T>;
  template <int I>
  using Int = std::integral_constant<int, I>;
  static constexpr int VL = Shape<T>::VL;
  static constexpr int ROWS = VB == 64 ? 8 : 4;    // of a tile of add_contiguous()
  static constexpr int64_t SHARED_WORK = 1 << 17;  // multiplications from which on threads pay

 public:
  explicit FewRowsPass(const LowRank& g) : g_(g) {}

  void run() {
    const int64_t R = g_.q.data ? g_.R : 0;
    thread_local Scratch kept(64);
    S* const a = static_cast<S*>(kept.at_least(size_t(g_.M * (g_.K + R)) * sizeof(S)));
    S* const q = a + g_.M * g_.K;
    with_type_of(g_.a, [&](auto e) { copy<decltype(e)>(g_.a, g_.K, R ? S{1} : S(g_.scale), a); });
    if (R) with_type_of(g_.q, [&](auto e) { copy<decltype(e)>(g_.q, R, S(g_.scale), q); });
    int64_t shares = 1;
    if (g_.M * g_.K * g_.N >= SHARED_WORK) shares = std::min(thread_count(), (g_.N + 63) / 64);
    const int64_t width = ((g_.N + shares - 1) / shares + 63) / 64 * 64;
    const auto share = [&](int64_t i) {
      if (i * width < g_.N) columns(i * width, std::min(width, g_.N - i * width), a, q, R);
    };
    if (shares == 1) return share(0);
    parallel_for(shares, share);
  }

 private:
  template <class F>
  static void with_type_of(const View& v, F f) {
    if constexpr (std::is_same_v<T, Half>) {
      if (v.wide) return f(S{});
    }
    f(T{});
  }

  // rows [M, K] of the accumulation type
  template <class E>
  void copy(const View& from, int64_t K, S scale, S* to) const {
    for (int64_t i = 0; i < g_.M; ++i) {
      const E* row = row_of<E>(from, i);
      int64_t k = 0;
      if (from.col == 1) {
        for (; k + VL <= K; k += VL) store(to + i * K + k, load_sum(row + k) * scale);
      }
      for (; k < K; ++k) to[i * K + k] = load_one(row + k * from.col) * scale;
    }
  }

  void columns(int64_t n0, int64_t N, const S* a, const S* q, int64_t R) const {
    thread_local Scratch kept(64);
    S* const sums = static_cast<S*>(kept.at_least(size_t(g_.M * N) * sizeof(S)));
    std::fill_n(sums, g_.M * N, S{0});
    if (const T* bias = static_cast<const T*>(g_.bias.data)) {
      for (int64_t n = 0; n < N; ++n) sums[n] = load_one(bias + (n0 + n) * g_.bias.col);
      for (int64_t m = 1; m < g_.M; ++m) std::copy_n(sums, N, sums + m * N);
    }
    with_type_of(g_.b_rows, [&](auto e) { add<decltype(e)>(a, g_.K, g_.b_rows, n0, N, sums); });
    if (R) add<T>(q, R, g_.u, n0, N, sums);
    with_type_of(g_.c, [&](auto e) { store_rows<decltype(e)>(sums, n0, N); });
  }

  template <class E>
  void store_rows(const S* sums, int64_t n0, int64_t N) const {
    for (int64_t m = 0; m < g_.M; ++m) {
      E* c = static_cast<E*>(const_cast<void*>(g_.c.data)) + m * g_.c.row + n0;
      int64_t n = 0;
      for (; n + VL <= N; n += VL) store_sum(c + n, load<Vec<S>>(sums + m * N + n));
      for (; n < N; ++n) store_one(c + n, sums[m * N + n]);
    }
  }

  // sums[m, n] += a[m] @ b[:, n0 + n], along whichever dimension of b is contiguous
  template <class E>
  void add(const S* a, int64_t K, const View& b, int64_t n0, int64_t N, S* sums) const {
    if (b.row == 1 && b.col != 1 && b.group >= K) {
      const E* first = static_cast<const E*>(b.data) + n0 * b.col;
      int64_t n = 0;
      for (; n + 8 <= N; n += 8) add_dots<8>(a, K, first + n * b.col, b.col, N, sums + n);
      for (; n < N; ++n) add_dots<1>(a, K, first + n * b.col, b.col, N, sums + n);
    } else {
      int64_t k = 0;
      for (; k + 16 <= K; k += 16) add_rows<16, E>(a + k, K, b, k, n0, N, sums);
      for (; k + 8 <= K; k += 8) add_rows<8, E>(a + k, K, b, k, n0, N, sums);
      for (; k < K; ++k) add_rows<1, E>(a + k, K, b, k, n0, N, sums);
    }
  }

  // COUNT rows of b, whose products are summed before they are added: a chain of roundings is a sixteenth of K
  template <int COUNT, class E>
  void add_rows(const S* a, int64_t K, const View& b, int64_t k, int64_t n0, int64_t N, S* sums) const {
    if (b.col == 1) {
      const E* rows[COUNT];
      for (int i = 0; i < COUNT; ++i) rows[i] = row_of<E>(b, k + i) + n0;
      return add_contiguous<COUNT>(a, K, rows, N, sums);
    }
    thread_local Scratch kept(64);
    S* const copied = static_cast<S*>(kept.at_least(size_t(COUNT * N) * sizeof(S)));
    const S* rows[COUNT];
    for (int i = 0; i < COUNT; ++i) {
      const E* row = row_of<E>(b, k + i) + n0 * b.col;
      for (int64_t n = 0; n < N; ++n) copied[i * N + n] = load_one(row + n * b.col);
      rows[i] = copied + i * N;
    }
    add_contiguous<COUNT>(a, K, rows, N, sums);
  }

  template <int COUNT, class E>
  EFFT_NOINLINE void add_contiguous(const S* a, int64_t K, const E* const* rows, int64_t N, S* sums) const {
    int64_t n = 0;
    for (; n + 2 * VL <= N; n += 2 * VL) {
      int64_t m = 0;
      for (; m + ROWS <= g_.M; m += ROWS) add_tile<COUNT, ROWS, 2>(a + m * K, K, rows, n, N, sums + m * N + n);
      for (; m + 4 <= g_.M; m += 4) add_tile<COUNT, 4, 2>(a + m * K, K, rows, n, N, sums + m * N + n);
      for (; m + 2 <= g_.M; m += 2) add_tile<COUNT, 2, 2>(a + m * K, K, rows, n, N, sums + m * N + n);
      if (m < g_.M) add_tile<COUNT, 1, 2>(a + m * K, K, rows, n, N, sums + m * N + n);
    }
    for (; n + VL <= N; n += VL) {
      int64_t m = 0;
      for (; m + ROWS <= g_.M; m += ROWS) add_tile<COUNT, ROWS, 1>(a + m * K, K, rows, n, N, sums + m * N + n);
      for (; m < g_.M; ++m) add_tile<COUNT, 1, 1>(a + m * K, K, rows, n, N, sums + m * N + n);
    }
    for (; n < N; ++n) {
      for (int64_t m = 0; m < g_.M; ++m) {
        S sum = 0;
        for (int i = 0; i < COUNT; ++i) sum += a[m * K + i] * load_one(rows[i] + n);
        sums[m * N + n] += sum;
      }
    }
  }

  // sums[m, n] += a[m] @ rows[:, n], for VECS vectors of columns
  template <int COUNT, int M, int VECS, class E>
  static EFFT_INLINE void add_tile(const S* a, int64_t K, const E* const* rows, int64_t n, int64_t N, S* sums) {
    Vec<S> tile[M][VECS] = {};
    for (int i = 0; i < COUNT; ++i) {
      Vec<S> b[VECS];
      for (int j = 0; j < VECS; ++j) b[j] = load_sum(rows[i] + n + j * VL);
      for (int m = 0; m < M; ++m) {
        for (int j = 0; j < VECS; ++j) tile[m][j] += a[m * K + i] * b[j];
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int j = 0; j < VECS; ++j) {
        S* const sum = sums + m * N + j * VL;
        store(sum, load<Vec<S>>(sum) + tile[m][j]);
      }
    }
  }

  // COUNT columns of b, each contiguous
  template <int COUNT, class E>
  void add_dots(const S* a, int64_t K, const E* b, int64_t next, int64_t N, S* sums) const {
    const auto tiles = [&](int64_t m, auto rows, auto columns) {
      constexpr int M = decltype(rows)::value, COLUMNS = std::min(COUNT, decltype(columns)::value);
      for (int n = 0; n < COUNT; n += COLUMNS) {
        dot_tile<M, COLUMNS>(a + m * K, K, b + n * next, next, N, sums + m * N + n);
      }
    };
    // of about as many rows each: up to 6 with the registers of AVX-512, else 2, 3 or a single 4
    const int64_t parts = VB == 64 ? (g_.M + 5) / 6 : std::max<int64_t>(1, (g_.M + 1) / 3);
    for (int64_t i = 0, m = 0; i < parts; ++i) {
      const int64_t rows = (g_.M - m) / (parts - i);
      if (rows == 1) {
        tiles(m, Int<1>{}, Int<8>{});
      } else if (rows == 2) {
        tiles(m, Int<2>{}, Int<4>{});
      } else if (rows == 3) {
        tiles(m, Int<3>{}, Int<4>{});
      } else if (rows == 4) {
        tiles(m, Int<4>{}, Int<VB == 64 ? 4 : 2>{});
      } else if constexpr (VB == 64) {
        rows == 5 ? tiles(m, Int<5>{}, Int<4>{}) : tiles(m, Int<6>{}, Int<4>{});
      }
      m += rows;
    }
  }

  // to[m, n] += a[m] @ b[n] with all sums in registers
  template <int ROWS, int COLUMNS, class E>
  static EFFT_NOINLINE void dot_tile(const S* a, int64_t K, const E* b, int64_t next, int64_t N, S* to) {
    Vec<S> sums[ROWS][COLUMNS];
    for (auto& row : sums) {
      for (auto& sum : row) sum = Vec<S>{};
    }
    int64_t k = 0;
    for (; k + VL <= K; k += VL) {
      Vec<S> row[ROWS];
      for (int m = 0; m < ROWS; ++m) row[m] = load<Vec<S>>(a + m * K + k);
      for (int n = 0; n < COLUMNS; ++n) {
        const Vec<S> column = load_sum(b + n * next + k);
        for (int m = 0; m < ROWS; ++m) sums[m][n] += row[m] * column;
      }
    }
    for (int m = 0; m < ROWS; ++m) {
      for (int n = 0; n < COLUMNS; ++n) to[m * N + n] += total(sums[m][n]);
    }
    for (; k < K; ++k) {
      for (int n = 0; n < COLUMNS; ++n) {
        const S column = load_one(b + n * next + k);
        for (int m = 0; m < ROWS; ++m) to[m * N + n] += a[m * K + k] * column;
      }
    }
  }

  // the sum of the lanes, by halves
  template <class V>
  static EFFT_INLINE S total(const V& v) {
    if constexpr (sizeof(V) > 16) {
      struct Halves {
        typename VecOf<S, sizeof(V) / 2>::type low, high;
      } const halves = bit_cast<Halves>(v);
      return total(halves.low + halves.high);
    } else {
      S sum = v[0];
      for (size_t i = 1; i < sizeof(V) / sizeof(S); ++i) sum += v[i];
      return sum;
    }
  }

  const LowRank& g_;
};
