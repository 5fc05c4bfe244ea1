// GELU on the CPU. Included once for each instruction set, under the rules of simd.h.

#include "simd.h"

namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE {
namespace {

/// The cumulative distribution function of the normal distribution.
template <typename T>
OVERLOCK_MM_INLINE Vector<T> normal_below(Vector<T> x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    // erf(z) / z over z², rational, minimax on |z| < 3.95, from where on a float's erf is 1: relative error 2e-8.
    constexpr float limit = 3.95f;
    const Vector<T> z = x * T(0.7071067811865476);
    const Vector<T> inside = z > limit ? Vector<T>{} + limit : (z < -limit ? Vector<T>{} - limit : z);
    const Vector<T> u = inside * inside;
    Vector<T> p = u * 2.0259068455440413e-06f + 0.0002846884509476973f;
    p = p * u + 0.0038081843889094f;
    p = p * u + 0.0528755168876133f;
    p = p * u + 0.1915508156954838f;
    p = p * u + 1.1283791437320914f;
    Vector<T> q = u * 3.783182662903132e-05f + 0.0011707316964231116f;
    q = q * u + 0.015055135052424248f;
    q = q * u + 0.1145598358480844f;
    q = q * u + 0.5030901659239503f;
    q = q * u + 1.0f;
    const Vector<T> erf = inside * p / q;
    const Vector<T> bounded = erf > 1.0f ? Vector<T>{} + 1.0f : (erf < -1.0f ? Vector<T>{} - 1.0f : erf);
    return bounded * 0.5f + 0.5f;
  } else {
    Vector<T> out;
    for (int i = 0; i < Simd<T>::lanes; ++i) out[i] = T(0.5) * std::erfc(x[i] * T(-0.7071067811865476));
    return out;
  }
}

/// gelu(x), or grad * gelu'(x).
template <typename T, bool backward>
OVERLOCK_MM_INLINE Vector<T> gelu_of(Vector<T> x, Vector<T> grad) {
  constexpr double density_at_0 = 0.3989422804014327;  // 1 / sqrt(2 pi)
  const Vector<T> below = normal_below<T>(x);
  if constexpr (!backward) return x * below;
  return grad * (below + x * exp2<T>(x * x * T(-0.5 * kLog2E)) * T(density_at_0));
}

/// Numbers of E, in memory. The computation is in T.
template <typename T, typename E, bool backward>
void gelu_numbers(const GeluParams& p, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<T>::lanes;
  const E *const input = const_data<E>(p.input), *const grads = const_data<E>(p.grad_output);
  E* const output = static_cast<E*>(p.output);
  const int64_t last = min(end * GeluParams::kChunk, p.count);
  int64_t i = begin * GeluParams::kChunk;
  for (; i + lanes <= last; i += lanes) {
    const Vector<T> grad = backward ? load(grads + i) : Vector<T>{};
    store(output + i, gelu_of<T, backward>(load(input + i), grad));
  }
  if (i == last) return;
  Vector<T> x{}, grad{};
  for (int64_t lane = 0; lane < last - i; ++lane) {
    x[lane] = load_one(input + i + lane);
    if (backward) grad[lane] = load_one(grads + i + lane);
  }
  store_lanes(output + i, gelu_of<T, backward>(x, grad), last - i);
}

template <typename T, typename E>
void gelu_in(const GeluParams& p, int64_t begin, int64_t end) {
  if (p.grad_output) return gelu_numbers<T, E, true>(p, begin, end);
  gelu_numbers<T, E, false>(p, begin, end);
}

template <typename T>
void gelu(const GeluParams& p, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (p.bfloat16) return gelu_in<T, BFloat16>(p, begin, end);
  }
  gelu_in<T, T>(p, begin, end);
}

template <typename T>
constexpr GeluKernels<T> kGeluKernels = {&gelu<T>};

}  // namespace

template <>
const GeluKernels<float>& table() {
  return kGeluKernels<float>;
}
template <>
const GeluKernels<double>& table() {
  return kGeluKernels<double>;
}

}  // namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE
