// Every function of cpu/simd.h against plain scalar code, for the instruction set that this is compiled for.
// test_simd.py compiles and runs it.
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <utility>
#include <vector>

#if defined(OVERLOCK_MM_BFLOAT16)
#include <immintrin.h>
#endif

#include "simd.h"

namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE {
namespace {

int failures = 0;

void check(bool holds, const char* what, double got, double expected) {
  if (holds) return;
  if (++failures <= 20) std::printf("%s: got %.17g, expected %.17g\n", what, got, expected);
}

std::mt19937_64 generator(0);

uint64_t random_bits() { return generator(); }

template <typename T>
T random_number(T low, T high) {
  return std::uniform_real_distribution<T>(low, high)(generator);
}

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

template <typename T>
bool same(T a, T b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

template <typename T>
constexpr int lanes = Simd<T>::lanes;

/// Numbers of all magnitudes, special ones among them.
template <typename T>
std::vector<T> numbers(int size) {
  using Limits = std::numeric_limits<T>;
  const T special[] = {T(0),
                       -T(0),
                       T(1),
                       -T(1),
                       Limits::infinity(),
                       -Limits::infinity(),
                       Limits::quiet_NaN(),
                       Limits::denorm_min(),
                       -Limits::denorm_min(),
                       Limits::min(),
                       Limits::max(),
                       Limits::lowest()};
  std::vector<T> out(special, special + sizeof(special) / sizeof(T));
  while (int(out.size()) < size) out.push_back(std::ldexp(random_number<T>(-1, 1), int(random_bits() % 100) - 50));
  return out;
}

template <typename T>
Vector<T> random_vector() {
  Vector<T> out;
  for (int i = 0; i < lanes<T>; ++i) out[i] = random_number<T>(-10, 10);
  return out;
}

template <typename T>
void check_loads_and_stores() {
  const std::vector<T> from = numbers<T>(8 * lanes<T>);
  for (int first = 0; first + lanes<T> <= int(from.size()); ++first) {  // most are not aligned
    const Vector<T> x = load(from.data() + first);
    const Vector<T> kept = in_register(x);
    for (int i = 0; i < lanes<T>; ++i) {
      check(same<T>(x[i], from[first + i]), "load", x[i], from[first + i]);
      check(same<T>(kept[i], x[i]), "in_register", kept[i], x[i]);
    }
    check(same(load_one(from.data() + first), from[first]), "load_one", load_one(from.data() + first), from[first]);
    std::vector<T> to(lanes<T> + 2, T(7));
    store(to.data() + 1, x);
    for (int i = 0; i < lanes<T>; ++i) check(same<T>(to[i + 1], from[first + i]), "store", to[i + 1], from[first + i]);
    check(to.front() == T(7) && to.back() == T(7), "store beyond its lanes", to.back(), 7);
    for (int count = 0; count <= lanes<T>; ++count) {
      std::vector<T> part(lanes<T>, T(7));
      store_lanes(part.data(), x, count);
      for (int i = 0; i < lanes<T>; ++i) {
        const T expected = i < count ? from[first + i] : T(7);
        check(same<T>(part[i], expected), "store_lanes", part[i], expected);
      }
    }
  }
}

/// To nearest, and to the even one of two that are as near.
uint16_t rounded_to_bfloat16(float x) {
  const uint32_t bits = bits_of(x), upper = bits >> 16, rest = bits & 0xFFFF;
  if (std::isnan(x)) return 0x7FC0;
  const bool up = rest > 0x8000 || (rest == 0x8000 && upper % 2 == 1);
  return uint16_t(up ? upper + 1 : upper);
}

/// Whether store() makes this of a number. Its instruction keeps bits of a NaN.
bool is_stored(uint16_t got, float x) {
  if (kMultipliesBFloat16 && std::isnan(x)) return (got & 0x7FC0) == 0x7FC0;
  return got == rounded_to_bfloat16(x);
}

void check_bfloat16() {
  // All upper halves (numbers, denormals, infinities, NaN) with lower ones around the ties and at the ends.
  const uint32_t lower[] = {0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, uint32_t(random_bits() & 0xFFFF)};
  for (const uint32_t low : lower) {
    for (uint32_t upper = 0; upper < 0x10000; upper += lanes<float>) {
      Vector<float> x;
      for (int i = 0; i < lanes<float>; ++i) x[i] = float_of((upper + i) << 16 | low);
      const auto halves = upper_halves(x);
      BFloat16 to[lanes<float> + 2] = {}, part[lanes<float>] = {};
      store(to + 1, x);
      store_lanes(part, x, lanes<float> - 1);
      for (int i = 0; i < lanes<float>; ++i) {
        const uint16_t expected = rounded_to_bfloat16(x[i]);
        check(halves[i] == expected, "upper_halves", halves[i], expected);
        check(is_stored(to[i + 1].bits, x[i]), "store to bfloat16", to[i + 1].bits, expected);
        const bool in_part = i < lanes<float> - 1 ? is_stored(part[i].bits, x[i]) : part[i].bits == 0;
        check(in_part, "store_lanes to bfloat16", part[i].bits, expected);
      }
      check(to[0].bits == 0 && to[lanes<float> + 1].bits == 0, "store to bfloat16 beyond its lanes", to[0].bits, 0);
    }
  }
  for (uint32_t upper = 0; upper < 0x10000; upper += lanes<float>) {
    BFloat16 from[lanes<float> + 1];
    for (int i = 0; i < lanes<float>; ++i) from[i + 1].bits = uint16_t(upper + i);
    const Vector<float> x = load(from + 1);
    for (int i = 0; i < lanes<float>; ++i) {
      const float expected = float_of((upper + i) << 16), one = load_one(from + 1 + i), lane = x[i];
      check(bits_of(lane) == bits_of(expected), "load from bfloat16", lane, expected);
      check(bits_of(one) == bits_of(expected), "load_one from bfloat16", one, expected);
    }
  }
}

void check_products() {
  for (int round = 0; round < 1000; ++round) {
    Vector<float> a, b;
    const Vector<float> start = random_vector<float>();
    double expected[lanes<float>], size[lanes<float>];
    for (int i = 0; i < lanes<float>; ++i) {
      expected[i] = size[i] = 0;
      uint32_t bits[2] = {0, 0};
      for (int half = 0; half < 2; ++half) {
        double product = 1;
        for (uint32_t& of : bits) {
          const uint32_t upper = bits_of(random_number<float>(-10, 10)) >> 16;
          of |= upper << (16 * half);
          product *= float_of(upper << 16);
        }
        expected[i] += product;
        size[i] += std::abs(product);
      }
      expected[i] += start[i];
      size[i] += std::abs(start[i]);
      a[i] = float_of(bits[0]);
      b[i] = float_of(bits[1]);
    }
    const Vector<float> got = add_products(start, a, b);
    for (int i = 0; i < lanes<float>; ++i)
      check(std::abs(got[i] - expected[i]) <= 2e-7 * size[i], "add_products", got[i], expected[i]);
  }
}

template <typename T>
void check_exp2(double tolerance) {
  using Limits = std::numeric_limits<T>;
  const T smallest = Simd<T>::smallest_exponent;
  std::vector<T> inputs = {T(0),
                           -T(0),
                           T(1),
                           -T(1),
                           T(-0.5),
                           T(0.5),
                           smallest,
                           std::nextafter(smallest, T(0)),
                           Limits::denorm_min(),
                           -Limits::denorm_min(),
                           -Limits::min(),
                           T(-1e-30)};
  for (int i = 0; i < 100000; ++i) inputs.push_back(random_number<T>(i % 2 ? smallest : T(-30), T(1)));
  while (inputs.size() % lanes<T>) inputs.push_back(T(-3));
  for (size_t first = 0; first < inputs.size(); first += lanes<T>) {
    const Vector<T> got = exp2<T>(load(inputs.data() + first));
    for (int i = 0; i < lanes<T>; ++i) {
      const long double expected = std::exp2((long double)inputs[first + i]);
      check(std::abs((got[i] - expected) / expected) < tolerance, "exp2", got[i], double(expected));
    }
  }
  for (int exponent = int(smallest); exponent <= 1; ++exponent) {  // whole numbers are exact
    const Vector<T> got = exp2<T>(Vector<T>{} + T(exponent));
    check(got[0] == std::ldexp(T(1), exponent), "exp2 of a whole number", got[0], std::ldexp(1.0, exponent));
  }
  const T below[] = {std::nextafter(smallest, Limits::lowest()), smallest - T(0.5), smallest - T(1000),
                     Limits::lowest(), -Limits::infinity()};
  for (const T x : below) {
    const Vector<T> got = exp2<T>(Vector<T>{} + x);
    check(same<T>(got[0], T(0)), "exp2 of what would be denormal", got[0], 0);
  }
  const Vector<T> nan = exp2<T>(Vector<T>{} + Limits::quiet_NaN());
  check(std::isnan(nan[0]), "exp2 of NaN", nan[0], Limits::quiet_NaN());
}

template <typename T, int... first>
void check_lanes_from(std::integer_sequence<int, first...>) {
  const Vector<T> a = random_vector<T>(), b = random_vector<T>();
  const auto check_one = [&](int start, Vector<T> got) {
    for (int i = 0; i < lanes<T>; ++i) {
      const T expected = start + i < lanes<T> ? a[start + i] : b[start + i - lanes<T>];
      check(got[i] == expected, "lanes_from", got[i], expected);
    }
  };
  (check_one(first, lanes_from<first, T>(a, b)), ...);
}

template <typename T>
void check_shuffles() {
  for (int trial = 0; trial < 1000; ++trial) {
    const Vector<T> a = random_vector<T>(), b = random_vector<T>();
    typename Simd<T>::Integers indices;
    for (int i = 0; i < lanes<T>; ++i) indices[i] = random_bits() % (2 * lanes<T>);
    const Vector<T> got = shuffle<T>(a, b, indices);
    for (int i = 0; i < lanes<T>; ++i) {
      const int index = int(indices[i]);
      const T expected = index < lanes<T> ? a[index] : b[index - lanes<T>];
      check(got[i] == expected, "shuffle", got[i], expected);
    }
  }
  check_lanes_from<T>(std::make_integer_sequence<int, lanes<T> + 1>{});
  Vector<T> rows[lanes<T>];
  for (int y = 0; y < lanes<T>; ++y) {
    for (int x = 0; x < lanes<T>; ++x) rows[y][x] = T(y * lanes<T> + x);
  }
  transpose_square<T>(rows);
  for (int y = 0; y < lanes<T>; ++y) {
    for (int x = 0; x < lanes<T>; ++x)
      check(rows[y][x] == T(x * lanes<T> + y), "transpose_square", rows[y][x], x * lanes<T> + y);
  }
}

/// The upper half to the lower one, until one number is left.
template <typename T, typename Reduce>
T reduced_by_halves(Vector<T> x, Reduce reduce) {
  T numbers[lanes<T>];
  for (int i = 0; i < lanes<T>; ++i) numbers[i] = x[i];
  for (int n = lanes<T> / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) numbers[i] = reduce(numbers[i], numbers[i + n]);
  }
  return numbers[0];
}

template <typename T>
void check_reductions() {
  for (int trial = 0; trial < 1000; ++trial) {
    Vector<T> x = random_vector<T>();
    if (trial % 4 == 1) x[trial % lanes<T>] = std::numeric_limits<T>::infinity();
    if (trial % 4 == 2) x[trial % lanes<T>] = -std::numeric_limits<T>::infinity();
    const T sum = reduce_lanes<Add, T>(x), expected_sum = reduced_by_halves<T>(x, [](T a, T b) { return a + b; });
    check(same(sum, expected_sum), "reduce_lanes of Add", sum, expected_sum);
    T expected = x[0];
    for (int i = 1; i < lanes<T>; ++i) expected = std::fmax(expected, x[i]);
    const T largest = reduce_lanes<Largest, T>(x);
    check(largest == expected, "reduce_lanes of Largest", largest, expected);
  }
}

template <typename T>
void check_sizes() {
  for (int64_t n = 0; n < 100; ++n) {
    int64_t expected = 0;
    while (expected < n) expected += lanes<T>;
    check(round_up<T>(n) == expected, "round_up", double(round_up<T>(n)), double(expected));
  }
  check(min(-3, 5) == -3 && min(5, -3) == -3 && min(4, 4) == 4, "min", double(min(-3, 5)), -3);
  const T number = 3;
  check(*const_data<T>(&number) == number, "const_data", *const_data<T>(&number), number);
  Scratch<T> scratch(5 * lanes<T>);
  T *const first = scratch.take(2 * lanes<T>), *const second = scratch.take(3 * lanes<T>);
  check(second == first + 2 * lanes<T>, "Scratch", double(second - first), 2 * lanes<T>);
  check(reinterpret_cast<uintptr_t>(first) % 64 == 0, "Scratch's alignment",
        double(reinterpret_cast<uintptr_t>(first) % 64), 0);
  for (int i = 0; i < 5 * lanes<T>; ++i) first[i] = T(i);
}

template <typename T>
void check_all(double tolerance_of_exp2) {
  static_assert(lanes<T> * sizeof(T) == kVectorBytes && sizeof(Vector<T>) == kVectorBytes, "lanes fill a vector");
  check_loads_and_stores<T>();
  check_exp2<T>(tolerance_of_exp2);
  check_shuffles<T>();
  check_reductions<T>();
  check_sizes<T>();
}

}  // namespace
}  // namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE

int main() {
  using namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE;
  check_all<float>(2e-7);
  check_all<double>(4e-16);
  check_bfloat16();
  check_products();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
