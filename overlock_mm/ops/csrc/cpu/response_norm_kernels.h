// Response norms of channels_last maps on the CPU. Included once for each instruction set, under the rules of simd.h.

#include "channel_blocks.h"

namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE {
namespace {

constexpr int kSumBlocks = kVectorBytes == 64 ? 8 : 4;  // vectors of channels that are summed in registers

/// Sums over positions of maps of E, in memory. The computation is in T.
template <typename T, typename E, int n>
OVERLOCK_MM_INLINE void sum_channels(const E* a, const E* b, int64_t stride, int64_t positions, T* products, T* plain) {
  Vector<T> product[n] = {}, sum[n] = {};
  for (int64_t i = 0; i < positions; ++i, a += stride, b += stride) {
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) {
      const Vector<T> x = load(b + j * Simd<T>::lanes);
      product[j] += load(a + j * Simd<T>::lanes) * x;
      if (plain) sum[j] += x;
    }
  }
  for (int j = 0; j < n; ++j) {
    store(products + j * Simd<T>::lanes, product[j]);
    if (plain) store(plain + j * Simd<T>::lanes, sum[j]);
  }
}

template <typename T, typename E>
void sum_maps(const ResponseNormParams& p, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<T>::lanes;
  for (int64_t item = begin; item < end; ++item) {
    const Lines part(p.positions, p.strips, item % p.strips);
    const int64_t first = (item / p.strips * p.positions + part.begin) * p.channels;
    const E* const a = const_data<E>(p.input) + first;
    const E* const b = p.other ? const_data<E>(p.other) + first : a;
    T* const products = static_cast<T*>(p.sums) + item * p.channels;
    T* const plain = p.plain_sums ? static_cast<T*>(p.plain_sums) + item * p.channels : nullptr;
    int64_t c = 0;
    for (; c + kSumBlocks * lanes <= p.channels; c += kSumBlocks * lanes) {
      sum_channels<T, E, kSumBlocks>(a + c, b + c, p.channels, part.count(), products + c, plain ? plain + c : nullptr);
    }
    for (; c + lanes <= p.channels; c += lanes) {
      sum_channels<T, E, 1>(a + c, b + c, p.channels, part.count(), products + c, plain ? plain + c : nullptr);
    }
    for (; c < p.channels; ++c) {
      T product = 0, sum = 0;
      for (int64_t i = 0; i < part.count(); ++i) {
        const T x = load_one(b + i * p.channels + c);
        product += load_one(a + i * p.channels + c) * x;
        sum += x;
      }
      products[c] = product;
      if (plain) plain[c] = sum;
    }
  }
}

template <typename T>
void channel_sums(const ResponseNormParams& p, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (p.bfloat16) return sum_maps<T, BFloat16>(p, begin, end);
  }
  sum_maps<T, T>(p, begin, end);
}

template <typename T, typename E>
void scale_and_shift_maps(const ResponseNormParams& p, int64_t begin, int64_t end) {
  const int64_t blocks = number_of_blocks<T>(p.channels);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.strips;
    const Lines part(p.positions, p.strips, item % p.strips);
    const int64_t first = (image * p.positions + part.begin) * p.channels;
    const E* a = const_data<E>(p.input) + first;
    const E* b = p.other ? const_data<E>(p.other) + first : nullptr;
    E* to = static_cast<E*>(p.output) + first;
    const T* const scale = const_data<T>(p.scale) + image * p.channels;
    const T* const other_scale = p.other ? const_data<T>(p.other_scale) + image * p.channels : nullptr;
    for (int64_t i = 0; i < part.count(); ++i) {
      for (int64_t j = 0; j < blocks; ++j) {
        const ChannelBlock block = block_of<T>(p.channels, j);
        Vector<T> out = load_block(a, block) * load_block(scale, block);
        if (b) out += load_block(b, block) * load_block(other_scale, block);
        if (p.shift) out += load_block(const_data<T>(p.shift), block);
        store_block(to, block, out);  // no channel twice: the output may be the input
      }
      a += p.channels;
      to += p.channels;
      if (b) b += p.channels;
    }
  }
}

template <typename T>
void scale_and_shift(const ResponseNormParams& p, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (p.bfloat16) return scale_and_shift_maps<T, BFloat16>(p, begin, end);
  }
  scale_and_shift_maps<T, T>(p, begin, end);
}

template <typename T>
constexpr ResponseNormKernels<T> kResponseNormKernels = {&channel_sums<T>, &scale_and_shift<T>};

}  // namespace

template <>
const ResponseNormKernels<float>& table() {
  return kResponseNormKernels<float>;
}
template <>
const ResponseNormKernels<double>& table() {
  return kResponseNormKernels<double>;
}

}  // namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE
