// the register tiles of all matmuls.
//
// a block of rows (of a, x or p) is stored as cells in chunks of up to KC columns with a row pitch of PITCH, so that
// the offsets between rows are constants in the instructions. the other operand is in panels, one or two vectors wide.
//
// a cell is what one step of the inner loop reads of a row: one number in the accumulation type or, where the
// processor has a bfloat16 dot product, two adjacent numbers.

template <class T>
constexpr bool dots = EFFT_DOT && std::is_same_v<T, Bf16>;

template <class T>
using Cell = std::conditional_t<dots<T>, uint32_t, Sum<T>>;

// panels hold cells, except for bfloat16 without a dot product: it is widened when it is loaded into registers, which
// halves the memory traffic
template <class T>
using Panel = std::conditional_t<std::is_same_v<T, Bf16> && !dots<T>, Bf16, Cell<T>>;

template <class T>
struct Shape {
  using S = Sum<T>;
  static constexpr int VL = VB / sizeof(S);          // accumulators, or cells, in a vector
  static constexpr int NR = 2 * VL;                  // columns of a wide panel: two vectors
  static constexpr int PER = dots<T> ? 2 : 1;        // numbers in a cell
  static constexpr int KC = 1024 / sizeof(S);        // a panel of KC steps and MR rows of a chunk fit into L1 together
  static constexpr int PITCH = KC + 64 / sizeof(S);  // a cache line more: otherwise all rows map to the same sets
  static constexpr int RT = std::min(VB == 64 ? 8 : 4, VL);  // rows of a tile of sums_tile()
};

// how many cells hold n numbers
template <class T>
EFFT_INLINE constexpr int64_t cells(int64_t n) {
  return (n + Shape<T>::PER - 1) / Shape<T>::PER;
}

// position of column j in a panel's row: in a wide bfloat16 panel, a 32-bit lane holds column j in its low half and
// column j + VL in its high half
template <class T, int VECS>
EFFT_INLINE int panel_column(int j) {
  constexpr int VL = Shape<T>::VL;
  return std::is_same_v<Panel<T>, Bf16> && VECS == 2 ? (j < VL ? 2 * j : 2 * (j - VL) + 1) : j;
}

// one row of a panel, in registers
template <class T, int VECS>
struct PanelRow {
  using V = std::conditional_t<dots<T>, U32, Vec<Sum<T>>>;
  V v[VECS];

  EFFT_INLINE explicit PanelRow(const Panel<T>* b) {
    if constexpr (std::is_same_v<Panel<T>, Bf16> && VECS == 2) {
      const U32 pairs = load<U32>(b);
      v[0] = bit_cast<V>(pairs << 16);
      v[1] = bit_cast<V>(pairs & 0xffff0000u);
    } else if constexpr (std::is_same_v<Panel<T>, Bf16>) {
      v[0] = load_sum(b);
    } else {
      for (int i = 0; i < VECS; ++i) v[i] = load<V>(b + i * Shape<T>::VL);
    }
  }
};

// sum + cell * v, lane by lane
template <class T, class V>
EFFT_INLINE void multiply_add(Vec<Sum<T>>& sum, Cell<T> cell, const V& v) {
  if constexpr (dots<T>) {
    sum = dot(sum, U32{} + cell, v);
  } else {
    sum += cell * v;
  }
}

// steps of the inner dimension: rows of `a` with pitch PITCH, and a panel `b`
template <class T>
struct Steps {
  const Cell<T>* a = nullptr;   // [ROWS, count]
  const Panel<T>* b = nullptr;  // [count, VECS * VL]
  int64_t count = 0;
};

// cache lines to prefetch, `step` bytes apart
struct Ahead {
  const char* at;
  int64_t lines = 1, step = 64;
};

// out[i, :] = in[i, :] + sum_k a[i, k] * b[k, :]     i < ROWS, over the steps of `first`, then of `then`
//
// `ahead` is memory that will be read soon: per four steps, `lines` cache lines of it are prefetched.
template <class T, int VECS, int ROWS>
EFFT_NOINLINE void tile(const Steps<T>& first, const Steps<T>& then, const Sum<T>* in, int64_t in_row, Sum<T>* out,
                        int64_t out_row, const Ahead& ahead) {
  using V = Vec<Sum<T>>;
  constexpr int VL = Shape<T>::VL, W = VECS * VL, PITCH = Shape<T>::PITCH;
  // a narrow tile has too few accumulators to hide the FMA latency, and registers for a second set: one for even steps,
  // one for odd. the shorter chains of roundings make p as accurate as plain torch's
  constexpr int SETS = VECS == 1 ? 2 : 1;
  V sum[SETS][ROWS][VECS] = {};
  const char* line = ahead.at;
  const auto run = [&](const Steps<T>& steps) EFFT_INLINE_LAMBDA {
    const Cell<T>* a = steps.a;
    const Panel<T>* b = steps.b;
    const auto step = [&](int k, int set) EFFT_INLINE_LAMBDA {
      const PanelRow<T, VECS> row(b + k * W);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        const Cell<T> s = a[i * PITCH + k];
        for (int j = 0; j < VECS; ++j) multiply_add<T>(sum[set][i][j], s, row.v[j]);
      }
    };
    int64_t k = steps.count;
    for (; k >= 4; k -= 4, a += 4, b += 4 * W) {
      for (const char* end = line + ahead.step * ahead.lines; line < end; line += ahead.step) {
        __builtin_prefetch(line, 0, 2);
      }
// not unrolled, because compilers move the accumulators between registers from copy to copy, which costs 7 %
#pragma GCC unroll 1
      for (int j = 0; j < 4; j += SETS) {
        for (int set = 0; set < SETS; ++set) step(j + set, set);
      }
    }
    for (; k > 0; --k, ++a, b += W) step(0, 0);
  };
  run(first);
  run(then);
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    for (int j = 0; j < VECS; ++j) {
      // `in` is added last, so that no chain of roundings is longer than a chunk
      if constexpr (SETS == 2) sum[0][i][j] += sum[1][i][j];
      store(out + i * out_row + j * VL, load<V>(in + i * in_row + j * VL) + sum[0][i][j]);
    }
  }
}

// the tile for `rows` rows, of that many or one more, so that the last tile of a block computes no further padding
template <class T, int... HALVES>
EFFT_INLINE auto tile_of_halves(int64_t rows, std::integer_sequence<int, HALVES...>) {
  static constexpr decltype(&tile<T, 2, MR>) heights[] = {tile<T, 2, 2 * HALVES + 2>...};
  return heights[(rows - 1) / 2];
}
template <class T>
EFFT_INLINE auto tile_of(int64_t rows) {
  return tile_of_halves<T>(std::min<int64_t>(rows, MR), std::make_integer_sequence<int, MR / 2>{});
}

// position of column k in sums over rows: with dot products, even and odd columns are in separate vectors
template <class T>
EFFT_INLINE int64_t sums_column(int64_t k) {
  constexpr int VL = Shape<T>::VL, NR = Shape<T>::NR;
  return dots<T> ? k / NR * NR + k % 2 * VL + k % NR / 2 : k;
}

// g[r, k] (+)= sum_m q[m, r] * a[m, k]     r < RT, k < VECS * VL, over all rows m of a chunk
template <class T, int VECS>
EFFT_INLINE void sums_tile(const Cell<T>* a, const Cell<T>* q, int64_t q_row, int64_t rows, Sum<T>* g, int64_t g_row,
                           bool adds) {
  using V = Vec<Sum<T>>;
  constexpr int VL = Shape<T>::VL, PER = Shape<T>::PER, PITCH = Shape<T>::PITCH, RT = Shape<T>::RT;
  V sum[RT][VECS] = {};
  for (int64_t m = 0; m < rows; m += PER, a += PER * PITCH, q += q_row) {
    std::conditional_t<dots<T>, U32, V> v[VECS];
    if constexpr (dots<T>) {  // a lane gets the numbers of two rows: v[0] of even columns, v[1] of odd
      const U32 first = load<U32>(a), second = load<U32>(a + PITCH);
      v[0] = (first & 0xffff) | second << 16;
      v[1] = first >> 16 | (second & 0xffff0000u);
    } else {
      for (int j = 0; j < VECS; ++j) v[j] = load<V>(a + j * VL);
    }
#pragma GCC unroll 16
    for (int i = 0; i < RT; ++i) {
      for (int j = 0; j < VECS; ++j) multiply_add<T>(sum[i][j], q[i], v[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < RT; ++i) {
    for (int j = 0; j < VECS; ++j) {
      Sum<T>* at = g + i * g_row + j * VL;
      store(at, adds ? load<V>(at) + sum[i][j] : sum[i][j]);
    }
  }
}

// sums_tile() for all r < R, k < columns
//
// a [rows, columns] is a chunk; q is [rows, q_row] cells, with dot products [rows / 2, q_row] cells of two rows each;
// g has row stride g_row, its rows rounded up to RT and its columns to NR, in the order of sums_column()
template <class T>
EFFT_NOINLINE void transposed_tiles(const Cell<T>* a, const Cell<T>* q, int64_t q_row, int64_t rows, int64_t columns,
                                    int64_t R, Sum<T>* g, int64_t g_row, bool adds) {
  constexpr int VL = Shape<T>::VL, NR = Shape<T>::NR, PER = Shape<T>::PER, RT = Shape<T>::RT;
  const int64_t end = (columns + NR - 1) / NR * NR;  // columns past the chunk's end are still within the pitch
  int64_t k = 0;
  if constexpr (RT == 4 && !dots<T>) {  // 12 accumulators: 8 do not hide the FMA latency
    for (; k + 3 * VL <= end; k += 3 * VL) {
      for (int64_t r = 0; r < R; r += RT) sums_tile<T, 3>(a + k, q + r, q_row, rows, g + r * g_row + k, g_row, adds);
    }
  }
  for (; k + NR <= end; k += NR) {
    for (int64_t r = 0; r < R; r += RT)
      sums_tile<T, 2>(a + k / PER, q + r, q_row, rows, g + r * g_row + k, g_row, adds);
  }
  if constexpr (RT == 4 && !dots<T>) {
    for (; k < end; k += VL) {
      for (int64_t r = 0; r < R; r += RT) sums_tile<T, 1>(a + k, q + r, q_row, rows, g + r * g_row + k, g_row, adds);
    }
  }
}
