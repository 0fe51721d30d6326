// the two register tiles everything is made of.
//
// a block of rows (of a, of x, of p) is kept as sums in chunks of up to KC columns, rows PITCH apart, so that the
// distance between rows is a constant of the instruction. the other operand comes in panels of NR columns.

template <class T>
struct Shape {
  using S = Sum<T>;
  static constexpr int VL = VB / sizeof(S);  // sums in a vector
  static constexpr int NR = 2 * VL;          // columns of a tile: two vectors
  static constexpr int KC = 1024 / sizeof(S);  // a panel of KC steps and MR rows of a chunk fit the L1 cache together
  static constexpr int PITCH = KC + 64 / sizeof(S);  // a line more, or every row would land in the same cache sets
};

// panels hold sums, but for bfloat16, which is widened on the way into the registers: half the memory traffic
template <class T>
using Panel = std::conditional_t<std::is_same_v<T, Bf16>, Bf16, Sum<T>>;

// where column j of a panel's row lies: with bfloat16 one 32-bit lane holds column j below column j + VL
template <class T>
EFFT_INLINE int panel_column(int j) {
  constexpr int VL = Shape<T>::VL;
  return std::is_same_v<T, Bf16> ? (j < VL ? 2 * j : 2 * (j - VL) + 1) : j;
}

template <class T>
EFFT_INLINE void load_panel(const Panel<T>* b, Vec<Sum<T>>& b0, Vec<Sum<T>>& b1) {
  if constexpr (std::is_same_v<T, Bf16>) {
    const U32 pairs = load<U32>(b);
    b0 = bit_cast<Vec<float>>(pairs << 16);
    b1 = bit_cast<Vec<float>>(pairs & 0xffff0000u);
  } else {
    b0 = load<Vec<Sum<T>>>(b);
    b1 = load<Vec<Sum<T>>>(b + Shape<T>::VL);
  }
}

// steps of the inner dimension: `a` MR rows PITCH apart, `b` a panel
template <class T>
struct Steps {
  const Sum<T>* a = nullptr;  // [MR, count]
  const Panel<T>* b = nullptr;  // [count, NR]
  int64_t count = 0;
};

// out[i, :] = in[i, :] + sum_k a[i, k] * b[k, :]     i < MR, over the steps of `first`, then of `then`
//
// `ahead` is memory that will be read soon; it is fetched a line per four steps, while the multipliers are busy.
template <class T>
EFFT_NOINLINE void tile(const Steps<T>& first, const Steps<T>& then, const Sum<T>* in, int64_t in_row, Sum<T>* out,
                        int64_t out_row, const void* ahead) {
  using V = Vec<Sum<T>>;
  constexpr int VL = Shape<T>::VL, NR = Shape<T>::NR, PITCH = Shape<T>::PITCH;
  V sum[MR][2] = {};
  const char* line = static_cast<const char*>(ahead);
  const auto run = [&](const Steps<T>& steps) EFFT_INLINE_LAMBDA {
    const Sum<T>* a = steps.a;
    const Panel<T>* b = steps.b;
    const auto step = [&](int k) EFFT_INLINE_LAMBDA {
      V b0, b1;
      load_panel<T>(b + k * NR, b0, b1);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const Sum<T> s = a[i * PITCH + k];
        sum[i][0] += s * b0;
        sum[i][1] += s * b1;
      }
    };
    int64_t k = steps.count;
    for (; k >= 4; k -= 4, a += 4, b += 4 * NR, line += 64) {
      __builtin_prefetch(line, 0, 2);
// not unrolled: compilers shuffle the sums among registers between the copies, at 7 % of the speed
#pragma GCC unroll 1
      for (int j = 0; j < 4; ++j) step(j);
    }
    for (; k > 0; --k, ++a, b += NR) step(0);
  };
  run(first);
  run(then);
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    // added last: a chain of roundings is no longer than a chunk
    store(out + i * out_row, load<V>(in + i * in_row) + sum[i][0]);
    store(out + i * out_row + VL, load<V>(in + i * in_row + VL) + sum[i][1]);
  }
}

// g[k, :] (+)= sum_m a[m, k] * q[m, :]     k < columns, over all rows m of a chunk
//
// a [rows, columns], rows PITCH apart; q [rows, NR] sums; g [columns, NR], rows g_row apart
template <class T>
EFFT_NOINLINE void transposed_tiles(const Sum<T>* a, const Sum<T>* q, int64_t rows, int64_t columns, Sum<T>* g,
                                    int64_t g_row, bool adds) {
  using V = Vec<Sum<T>>;
  constexpr int VL = Shape<T>::VL, NR = Shape<T>::NR, PITCH = Shape<T>::PITCH;
  for (int64_t k0 = 0; k0 < columns; k0 += MR) {
    V sum[MR][2] = {};
    // columns past the chunk's end lie inside the pitch: read, summed, not stored
    for (int64_t m = 0; m < rows; ++m) {
      const V q0 = load<V>(q + m * NR), q1 = load<V>(q + m * NR + VL);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const Sum<T> s = a[m * PITCH + k0 + i];
        sum[i][0] += s * q0;
        sum[i][1] += s * q1;
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      if (k0 + i >= columns) break;
      Sum<T>* row = g + (k0 + i) * g_row;
      store(row, adds ? load<V>(row) + sum[i][0] : sum[i][0]);
      store(row + VL, adds ? load<V>(row + VL) + sum[i][1] : sum[i][1]);
    }
  }
}
