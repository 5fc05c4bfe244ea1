// Vectors of one instruction set, and operations on them. Included by the kernels' headers, once for each instruction
// set, by a file (kernels_*.cpp) that has defined
//   OVERLOCK_MM_NAMESPACE     the namespace of the instruction set,
//   OVERLOCK_MM_VECTOR_BYTES  the width of its vectors,
//   OVERLOCK_MM_BFLOAT16      if it has AVX-512's instructions for bfloat16,
// has included the standard headers that are used here, <immintrin.h> among them for those instructions, and has
// switched the compiler to the instruction set.
//
// Rule for all headers that are included like this: they include one another and nothing else. A function of another
// header would be compiled for AVX-512 too, and the linker could keep that copy for all processors.
#pragma once

#define OVERLOCK_MM_INLINE inline __attribute__((always_inline))
/// For functions with an inner loop. Their alignment keeps its speed from depending on the code before it.
#define OVERLOCK_MM_NOINLINE __attribute__((noinline, aligned(64)))
#define OVERLOCK_MM_INLINE_LAMBDA __attribute__((always_inline))

namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE {
namespace {

constexpr int kVectorBytes = OVERLOCK_MM_VECTOR_BYTES;
#if defined(OVERLOCK_MM_BFLOAT16)
constexpr bool kMultipliesBFloat16 = true;
#else
constexpr bool kMultipliesBFloat16 = false;
#endif

template <typename T>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int lanes = kVectorBytes / sizeof(float);
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Integers __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(float)), may_alias));
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2), aligned(sizeof(uint16_t)), may_alias));
  static constexpr float rounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves a float's integral part in its low bits
  static constexpr int mantissa_bits = 23;
  static constexpr uint32_t one = 0x3F800000;
  static constexpr float smallest_exponent = -126.0f;
  static constexpr float largest = __FLT_MAX__;
  // 2^r - 1 over r on [-0.5, 0.5], minimax: relative error 2e-9.
  static constexpr int terms = 6;
  static constexpr float polynomial[terms] = {0.6931471824645996f,  0.24022647738456726f,   0.055503323674201965f,
                                              0.00961843691766262f, 0.0013398875016719103f, 0.00015353360504377633f};
};

template <>
struct Simd<double> {
  static constexpr int lanes = kVectorBytes / sizeof(double);
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Integers __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(double)), may_alias));
  static constexpr double rounder = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int mantissa_bits = 52;
  static constexpr uint64_t one = 0x3FF0000000000000;
  static constexpr double smallest_exponent = -1022.0;
  static constexpr double largest = __DBL_MAX__;
  // Taylor: relative error 4e-18.
  static constexpr int terms = 13;
  static constexpr double polynomial[terms] = {0.6931471805599453,     0.2402265069591007,     0.055504108664821576,
                                               0.009618129107628477,   0.0013333558146428441,  0.00015403530393381606,
                                               1.5252733804059838e-05, 1.3215486790144305e-06, 1.0178086009239696e-07,
                                               7.054911620801121e-09,  4.44553827187081e-10,   2.5678435993488196e-11,
                                               1.3691488853904124e-12};
};

template <typename T>
using Vector = typename Simd<T>::Vector;

constexpr double kLog2E = 1.4426950408889634;

template <typename T>
inline Vector<T> load(const T* from) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(from);
}

template <typename T>
inline void store(T* to, Vector<T> x) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(to) = x;
}

/// x, in a register. GCC would load it again for each instruction of AVX-512 that uses it.
template <typename V>
OVERLOCK_MM_INLINE V in_register(V x) {
#if OVERLOCK_MM_VECTOR_BYTES == 64
  asm("" : "+v"(x));
#endif
  return x;
}

/// A bfloat16 in memory: the upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

/// The type that computations with numbers of a type in memory use.
template <typename E>
struct ComputedIn {
  using type = E;
};
template <>
struct ComputedIn<BFloat16> {
  using type = float;
};
template <typename E>
using Computed = typename ComputedIn<E>::type;

inline Vector<float> load(const BFloat16* from) {
  const auto halves = *reinterpret_cast<const Simd<float>::Halves*>(from);
  return (Vector<float>)(__builtin_convertvector(halves, Simd<float>::Integers) << 16);
}

/// The upper half of each lane, rounded to nearest, half to even.
inline Simd<float>::Integers upper_halves(Vector<float> x) {
  typedef Simd<float>::Integers Integers;
  const Integers bits = (Integers)x;
  const Integers rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return x == x ? rounded : Integers{} + 0x7FC0;
}

#if defined(OVERLOCK_MM_BFLOAT16)

inline void store(BFloat16* to, Vector<float> x) {
  typedef Simd<float>::Halves Halves;
  constexpr int denormal = 0x20;
  // The instruction makes zeros of denormals.
  const bool rare = _mm512_fpclass_ps_mask((__m512)x, denormal) != 0;
  *reinterpret_cast<Halves*>(to) = __builtin_expect(rare, 0) ? __builtin_convertvector(upper_halves(x), Halves)
                                                             : (Halves)_mm512_cvtneps_pbh((__m512)x);
}

/// sum + a * b of both bfloat16 in the bits of each lane of a and b. Sums are in float. Denormals count as zeros.
OVERLOCK_MM_INLINE Vector<float> add_products(Vector<float> sum, Vector<float> a, Vector<float> b) {
  return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

#else

inline void store(BFloat16* to, Vector<float> x) {
  *reinterpret_cast<Simd<float>::Halves*>(to) = __builtin_convertvector(upper_halves(x), Simd<float>::Halves);
}

OVERLOCK_MM_INLINE Vector<float> add_products(Vector<float> sum, Vector<float> a, Vector<float> b) {
  typedef Simd<float>::Integers Integers;
  const Integers second = Integers{} + 0xFFFF0000;
  sum += (Vector<float>)((Integers)a & second) * (Vector<float>)((Integers)b & second);
  return sum + (Vector<float>)((Integers)a << 16) * (Vector<float>)((Integers)b << 16);
}

#endif

/// One number from memory.
template <typename T>
inline T load_one(const T* from) {
  return *from;
}
inline float load_one(const BFloat16* from) {
  const uint32_t bits = uint32_t(from->bits) << 16;
  float out;
  __builtin_memcpy(&out, &bits, sizeof(out));
  return out;
}
/// The first `count` lanes.
template <typename T>
inline void store_lanes(T* to, Vector<T> x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = x[i];
}
inline void store_lanes(BFloat16* to, Vector<float> x, int64_t count) {
  BFloat16 all[Simd<float>::lanes];
  store(all, x);
  for (int64_t i = 0; i < count; ++i) to[i] = all[i];
}

/// 2^x for x up to 1. NaN stays NaN; a result that would be denormal is 0.
template <typename T>
inline Vector<T> exp2(Vector<T> x) {
  using S = Simd<T>;
  typedef typename S::Integers Integers;
  const Vector<T> shifted = x + S::rounder;
  const Vector<T> r = x - (shifted - S::rounder);
  Vector<T> p = r * S::polynomial[S::terms - 1] + S::polynomial[S::terms - 2];
#pragma GCC unroll 16
  for (int i = S::terms - 3; i >= 0; --i) p = p * r + S::polynomial[i];
  p = p * r + T(1);
  const Vector<T> power = (Vector<T>)(((Integers)shifted << S::mantissa_bits) + S::one);
  return x < S::smallest_exponent ? Vector<T>{} : p * power;
}

/// Lane i is lane indices[i] of a and b laid end to end.
template <typename T>
OVERLOCK_MM_INLINE Vector<T> shuffle(Vector<T> a, Vector<T> b, typename Simd<T>::Integers indices) {
#if defined(__clang__)
  Vector<T> out;
  for (int i = 0; i < Simd<T>::lanes; ++i)
    out[i] = indices[i] < Simd<T>::lanes ? a[indices[i]] : b[indices[i] - Simd<T>::lanes];
  return out;
#else
  return __builtin_shuffle(a, b, indices);
#endif
}

/// Transpose a square of vectors: swap blocks of 1, 2, 4, ... lanes across the diagonals of squares twice their size.
template <typename T, int size = 1>
OVERLOCK_MM_INLINE void transpose_square(Vector<T> (&rows)[Simd<T>::lanes]) {
  constexpr int lanes = Simd<T>::lanes;
  if constexpr (size < lanes) {
    typename Simd<T>::Integers upper, lower;
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      upper[i] = i & size ? lanes + i - size : i;
      lower[i] = i & size ? lanes + i : i + size;
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if (i & size) continue;
      const Vector<T> a = rows[i], b = rows[i + size];
      rows[i] = shuffle<T>(a, b, upper);
      rows[i + size] = shuffle<T>(a, b, lower);
    }
    transpose_square<T, 2 * size>(rows);
  }
}

/// Lanes first, first + 1, ... of a and b laid end to end.
template <int first, typename T>
OVERLOCK_MM_INLINE Vector<T> lanes_from(Vector<T> a, Vector<T> b) {
  typename Simd<T>::Integers indices;
#pragma GCC unroll 16
  for (int i = 0; i < Simd<T>::lanes; ++i) indices[i] = first + i;
  return shuffle<T>(a, b, indices);
}

struct Add {
  template <typename V>
  OVERLOCK_MM_INLINE V operator()(V a, V b) const {
    return a + b;
  }
};

struct Largest {
  template <typename V>
  OVERLOCK_MM_INLINE V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};

/// Add or Largest of all lanes of x, by halves.
template <typename Reduce, typename T, int n = Simd<T>::lanes>
OVERLOCK_MM_INLINE T reduce_lanes(Vector<T> x) {
  if constexpr (n == 1) {
    return x[0];
  } else {
    return reduce_lanes<Reduce, T, n / 2>(Reduce{}(x, lanes_from<n / 2, T>(x, x)));
  }
}

template <typename T>
inline int64_t round_up(int64_t n) {
  return (n + Simd<T>::lanes - 1) / Simd<T>::lanes * Simd<T>::lanes;
}

template <typename T>
inline const T* const_data(const void* data) {
  return static_cast<const T*>(data);
}

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

/// Memory for one thread.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t elements)
      : data_(static_cast<T*>(::operator new(elements * sizeof(T), kAlignment))), next_(data_) {}
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* take(int64_t elements) {
    T* taken = next_;
    next_ += elements;
    return taken;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
  T* next_;
};

}  // namespace
}  // namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE
