// Pairs of bfloat16 in the lanes of a vector, for instructions that multiply and add both. Included by the kernels'
// headers, under the rules of simd.h.
#pragma once

#include "packed.h"

namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE {
namespace {

// A pair is in the bits of a float. There is no arithmetic with that float.

/// Pairs of the lanes of a and b, rounded.
inline Vector<float> pair_of(Vector<float> a, Vector<float> b) {
  return (Vector<float>)(upper_halves(a) | upper_halves(b) << 16);
}

inline Vector<float> first_of_pair(Vector<float> pairs) { return (Vector<float>)((Simd<float>::Integers)pairs << 16); }

/// A channel block of a bfloat16 map, packed with a border of zeros: at each position that one, and the one `distance`
/// positions to the right of it. Arguments as of Packed::pack.
inline void pack_pairs(const Packed<float>& packed, int64_t distance, const BFloat16* image, int64_t height,
                       int64_t columns, int64_t channels, const ChannelBlock& block, int64_t first, int64_t lines,
                       int64_t border) {
  float* to = packed.data;
  for (int64_t y = first - border; y < first + lines + border; ++y) {
    const BFloat16* const line = y >= 0 && y < height ? image + y * columns * channels : nullptr;
    const auto position = [&](int64_t x) OVERLOCK_MM_INLINE_LAMBDA {
      return line && x >= 0 && x < columns ? load_block(line + x * channels, block) : Vector<float>{};
    };
    for (int64_t x = -border; x < columns + border; ++x, to += Simd<float>::lanes) {
      const auto own = (Simd<float>::Integers)position(x), next = (Simd<float>::Integers)position(x + distance);
      store(to, (Vector<float>)(own >> 16 | next));
    }
  }
}

template <int n>
OVERLOCK_MM_NOINLINE void convolve_pairs_tile(const float* in, const int64_t* offsets, int64_t pairs, int64_t singles,
                                              const float* weights, Vector<float>* sums) {
  constexpr int64_t lanes = Simd<float>::lanes;
  Vector<float> acc[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) acc[i] = sums[i];
  for (int64_t t = 0; t < pairs; ++t, weights += lanes) {
    const Vector<float> w = load(weights);
    const float* const from = in + *offsets++;
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) acc[i] = add_products(acc[i], load(from + i * lanes), w);
  }
  for (int64_t t = 0; t < singles; ++t, weights += lanes) {
    const Vector<float> w = load(weights);
    const float* const from = in + *offsets++;
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) acc[i] += w * first_of_pair(load(from + i * lanes));
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) sums[i] = acc[i];
}

/// The kernel of a channel block for maps that are packed as pairs. Taps of a line that are as far apart as the
/// positions of a pair are multiplied two by two, in bfloat16. A last tap of a line, and all taps of another dilation,
/// are by themselves, in float.
class KernelOfPairs {
 public:
  KernelOfPairs() = default;
  /// `offsets`, `weights`: memory for a number, and for a vector, of each tap.
  KernelOfPairs(int64_t kernel_size, int64_t dilation, int64_t distance, int64_t packed_width, int64_t* offsets,
                float* weights)
      : kernel_size_(kernel_size),
        pairs_of_line_(dilation == distance ? kernel_size / 2 : 0),
        offsets_(offsets),
        weights_(weights) {
    int64_t* single = offsets + pairs();
    for (int64_t ky = 0; ky < kernel_size; ++ky) {
      for (int64_t kx = 0; kx < kernel_size; ++kx) {
        const int64_t at = (ky * packed_width + kx) * dilation * lanes;
        if (kx >= 2 * pairs_of_line_) {
          *single++ = at;
        } else if (kx % 2 == 0) {
          *offsets++ = at;
        }
      }
    }
  }

  /// Take the weights of a block, (k * k, lanes).
  void pack(const float* taps) const {
    float *pair = weights_, *single = weights_ + pairs() * lanes;
    for (int64_t ky = 0; ky < kernel_size_; ++ky) {
      for (int64_t kx = 0; kx < kernel_size_; ++kx, taps += lanes) {
        if (kx >= 2 * pairs_of_line_) {
          store(single, load(taps));
          single += lanes;
        } else if (kx % 2 == 0) {
          store(pair, pair_of(load(taps), load(taps + lanes)));
          pair += lanes;
        }
      }
    }
  }

  /// Add to the sums of n <= kColumns positions, of which the first reads its first tap at `in`.
  void convolve(int64_t n, const float* in, Vector<float>* sums) const {
    using Function = void (*)(const float*, const int64_t*, int64_t, int64_t, const float*, Vector<float>*);
    static constexpr Function functions[kColumns] = {
        &convolve_pairs_tile<1>, &convolve_pairs_tile<2>,  &convolve_pairs_tile<3>,  &convolve_pairs_tile<4>,
        &convolve_pairs_tile<5>, &convolve_pairs_tile<6>,  &convolve_pairs_tile<7>,  &convolve_pairs_tile<8>,
        &convolve_pairs_tile<9>, &convolve_pairs_tile<10>, &convolve_pairs_tile<11>, &convolve_pairs_tile<12>};
    functions[n - 1](in, offsets_, pairs(), kernel_size_ * kernel_size_ - 2 * pairs(), weights_, sums);
  }

 private:
  static constexpr int64_t lanes = Simd<float>::lanes;
  int64_t pairs() const { return kernel_size_ * pairs_of_line_; }

  int64_t kernel_size_ = 0, pairs_of_line_ = 0;
  const int64_t* offsets_ = nullptr;
  float* weights_ = nullptr;
};

}  // namespace
}  // namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE
