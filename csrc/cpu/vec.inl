// vectors of VB bytes as the compiler's vector extension, and conversions between the dtypes and the accumulation type.
// included once per instruction set, inside its target pragma and an anonymous namespace.

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// the accumulation type
template <class T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <class T>
using Sum = typename SumOf<T>::type;

template <class E, int BYTES>
struct VecOf {
  typedef E type __attribute__((vector_size(BYTES)));
};
template <class E>
using Vec = typename VecOf<E, VB>::type;
using U32 = Vec<uint32_t>;
typedef uint16_t U16 __attribute__((vector_size(VB / 2)));

template <class V>
EFFT_INLINE V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
EFFT_INLINE void store(void* p, const V& v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class To, class From>
EFFT_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// widen, narrow: between float and 16-bit floats, whose bits are in the lower halves of 32-bit lanes

EFFT_INLINE Vec<float> widen(Bf16, U32 h) { return bit_cast<Vec<float>>(h << 16); }

EFFT_INLINE Vec<float> widen(Half, U32 h) {
  // exponent and mantissa shifted to their positions in a float are the value times 2^-112, also for subnormals
  const U32 magnitude = (h & 0x7fff) << 13;
  U32 bits = bit_cast<U32>(bit_cast<Vec<float>>(magnitude) * 0x1p112f);
  bits |= (magnitude >= 0x0f800000) & 0x7f800000;  // infinity and nan keep the largest exponent
  return bit_cast<Vec<float>>(bits | (h & 0x8000) << 16);
}

EFFT_INLINE U32 narrow(Bf16, Vec<float> f) {
  const U32 u = bit_cast<U32>(f);
  const U32 nan = bit_cast<U32>(f != f);
  const U32 rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  return (rounded & ~nan) | (0x7fc0 & nan);
}

EFFT_INLINE U32 narrow(Half, Vec<float> f) {
  const U32 u = bit_cast<U32>(f), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  const U32 normal = (a - (112u << 23) + 0xfff + (a >> 13 & 1)) >> 13;
  // adding 0.5 rounds the value to multiples of 2^-24, the spacing of subnormals, and leaves it in the low bits
  const U32 subnormal = bit_cast<U32>(bit_cast<Vec<float>>(a) + 0.5f) - 0x3f000000;
  const U32 tiny = a < 0x38800000, huge = a >= 0x477ff000, nan = a > 0x7f800000;
  U32 h = (subnormal & tiny) | (normal & ~tiny);
  h = (h & ~huge) | (0x7c00 & huge);
  h = (h & ~nan) | (0x7e00 & nan);
  return h | sign;
}

// load_sum: VL adjacent elements in the accumulation type;  store_sum: the reverse, rounded to nearest even

template <class T>
EFFT_INLINE Vec<Sum<T>> load_sum(const T* p) {
  if constexpr (std::is_same_v<T, Sum<T>>) {
    return load<Vec<T>>(p);
  } else {
    return widen(T{}, __builtin_convertvector(load<U16>(p), U32));
  }
}
template <class T>
EFFT_INLINE void store_sum(T* p, const Vec<Sum<T>>& v) {
  if constexpr (std::is_same_v<T, Sum<T>>) {
    store(p, v);
  } else {
    store(p, __builtin_convertvector(narrow(T{}, v), U16));
  }
}

template <class T>
EFFT_INLINE Sum<T> load_one(const T* p) {
  if constexpr (std::is_same_v<T, Sum<T>>) {
    return *p;
  } else {
    return widen(T{}, U32{} + p->bits)[0];
  }
}
template <class T>
EFFT_INLINE void store_one(T* p, Sum<T> s) {
  if constexpr (std::is_same_v<T, Sum<T>>) {
    *p = s;
  } else {
    p->bits = uint16_t(narrow(T{}, Vec<float>{} + s)[0]);
  }
}

#if EFFT_DOT
// sum[i] + a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1]; each lane of a and b holds two bfloat16
EFFT_INLINE Vec<float> dot(const Vec<float>& sum, const U32& a, const U32& b) {
#ifdef EFFT_DOT_EMULATED
  const U32 upper = U32{} + 0xffff0000u;
  return sum + bit_cast<Vec<float>>(a << 16) * bit_cast<Vec<float>>(b << 16) +
         bit_cast<Vec<float>>(a & upper) * bit_cast<Vec<float>>(b & upper);
#elif defined(__aarch64__)
  return bit_cast<Vec<float>>(
      vbfdotq_f32(bit_cast<float32x4_t>(sum), bit_cast<bfloat16x8_t>(a), bit_cast<bfloat16x8_t>(b)));
#else
  return bit_cast<Vec<float>>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
#endif
}
#else
EFFT_INLINE Vec<float> dot(const Vec<float>& sum, const U32&, const U32&) { return sum; }  // never called
#endif
