// The CUDA kernels of response norms.
//
// In a map (B, H, W, C) a warp has 32 neighbouring channels, 64 to 256 bytes, and a thread one of them: it walks over
// positions, and so a channel's sum is in one register. The memory is what takes time.
#pragma once

#include "../response_norm.h"
#include "numbers.cuh"
#include "response_norm_launch.h"
#include "sums.cuh"

namespace overlock_mm {
namespace response_norm_kernels {

constexpr int kWarps = 8;             // of a block, but of response_factors_kernel
constexpr int kFactorThreads = 1024;  // of response_factors_kernel

/// The thread's channel, and the block's strip of the positions of an image.
struct Strip {
  int64_t image, index, begin, end, channel;

  __device__ explicit Strip(const ResponseNormParams& p) {
    const int64_t blocks = ceil_div(p.channels, kWarp), part = blockIdx.x / blocks;
    channel = blockIdx.x % blocks * kWarp + threadIdx.x % kWarp;
    image = part / p.strips;
    index = part % p.strips;
    begin = index * p.positions / p.strips;
    end = (index + 1) * p.positions / p.strips;
  }
};

template <typename T, bool kOther>
__global__ void __launch_bounds__(kWarps* kWarp) channel_sums_kernel(const ResponseNormParams p) {
  using A = typename Accumulator<T>::type;
  OVERLOCK_MM_SHARED(A, shared);
  const Strip strip(p);
  const bool holds = strip.channel < p.channels;
  A product = 0, plain = 0;
  if (holds) {
    const int64_t first = strip.image * p.positions * p.channels + strip.channel;
    const T* const input = static_cast<const T*>(p.input) + first;
    const T* const other = static_cast<const T*>(p.other) + first;
#pragma unroll 8
    for (int64_t i = strip.begin + threadIdx.x / kWarp; i < strip.end; i += kWarps) {
      const A a = load(input + i * p.channels);
      const A b = kOther ? load(other + i * p.channels) : a;
      product += a * b;
      if (kOther) plain += b;
    }
  }
  product = sum_over_warps(product, shared);
  if (kOther) plain = sum_over_warps(plain, shared);
  if (threadIdx.x >= kWarp || !holds) return;
  const int64_t at = (strip.image * p.strips + strip.index) * p.channels + strip.channel;
  static_cast<A*>(p.sums)[at] = product;
  if (kOther) static_cast<A*>(p.plain_sums)[at] = plain;
}

template <typename T, bool kOther>
__device__ __forceinline__ void scale_and_shift(const ResponseNormParams& p) {
  using A = typename Accumulator<T>::type;
  const Strip strip(p);
  if (strip.channel >= p.channels) return;
  const int64_t of_image = strip.image * p.channels + strip.channel;
  const A scale = load(static_cast<const A*>(p.scale) + of_image);
  const A other_scale = kOther ? load(static_cast<const A*>(p.other_scale) + of_image) : A(0);
  const A shift = p.shift ? load(static_cast<const A*>(p.shift) + strip.channel) : A(0);
  const int64_t first = strip.image * p.positions * p.channels + strip.channel;
  const T* const input = static_cast<const T*>(p.input) + first;
  const T* const other = static_cast<const T*>(p.other) + first;
  T* const output = static_cast<T*>(p.output) + first;
#pragma unroll 8
  for (int64_t i = strip.begin + threadIdx.x / kWarp; i < strip.end; i += kWarps) {
    A out = load(input + i * p.channels) * scale + shift;
    if (kOther) out += load(other + i * p.channels) * other_scale;
    store(output + i * p.channels, out);
  }
}

template <typename T>
__global__ void __launch_bounds__(kWarps* kWarp) scale_and_shift_kernel(const ResponseNormParams p) {
  scale_and_shift<T, /*kOther=*/false>(p);
}

/// The blocks for the map, and after them those that sum the gradients of gamma and beta over images: a thread for each
/// number.
template <typename T>
__global__ void __launch_bounds__(kWarps* kWarp) response_norm_gradients_kernel(const ResponseNormGradientsParams p) {
  using A = typename Accumulator<T>::type;
  const int64_t blocks_of_map = p.batch * p.strips * ceil_div(p.channels, kWarp);
  if (blockIdx.x < blocks_of_map) {
    scale_and_shift<T, /*kOther=*/true>(p);
    return;
  }
  const int64_t number = (blockIdx.x - blocks_of_map) * kWarps * kWarp + threadIdx.x, numbers = 2 * p.channels;
  if (number >= numbers) return;
  const A* const grads = static_cast<const A*>(p.grads_of_images) + number;
  A sum = 0;
  for (int64_t image = 0; image < p.batch; ++image) sum += load(grads + image * numbers);
  if (number < p.channels) {
    static_cast<A*>(p.grad_gamma)[number] = sum;
  } else {
    static_cast<A*>(p.grad_beta)[number - p.channels] = sum;
  }
}

/// The channels of a block that has an image, some at a time: `groups` threads have parts of a channel's strips.
struct Channels {
  int at_once, groups;

  __device__ explicit Channels(int64_t channels) : at_once(kWarp) {
    while (at_once < channels && at_once < kFactorThreads) at_once *= 2;
    groups = kFactorThreads / at_once;
  }
};

/// The sum over strips of (strips, C) for a channel of the thread: for the first group of threads. Without such a
/// channel it is 0.
template <typename A>
__device__ __forceinline__ A sum_over_strips(const A* sums, int64_t strips, int64_t channels, int64_t channel,
                                             const Channels& block, A* shared) {
  const int group = static_cast<int>(threadIdx.x) / block.at_once;
  A sum = 0;
  if (channel < channels) {
#pragma unroll 4
    for (int64_t strip = group; strip < strips; strip += block.groups) sum += load(sums + strip * channels + channel);
  }
  __syncthreads();  // what was in `shared` has been read
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (group > 0) return 0;
  for (int other = 1; other < block.groups; ++other) sum += shared[other * block.at_once + threadIdx.x];
  return sum;
}

/// The sum over all threads of a block, for all of them.
template <typename A>
__device__ __forceinline__ A sum_over_block(A number, A* shared) {
  __syncthreads();  // what was in `shared` has been read
  shared[threadIdx.x] = number;
  for (int half = kFactorThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  __syncthreads();
  return shared[0];
}

/// A block for each image.
template <typename A>
__global__ void __launch_bounds__(kFactorThreads, 1) response_factors_kernel(const ResponseFactorsParams p) {
  OVERLOCK_MM_SHARED(A, shared);
  const Channels block(p.channels);
  const int64_t image = blockIdx.x, of_image = image * p.channels, of_sums = of_image * p.strips;
  const A* const gamma = static_cast<const A*>(p.gamma);
  A* const response = static_cast<A*>(p.response) + of_image;
  A* const scale = static_cast<A*>(p.scale) + of_image;
  A total = 0;
  for (int64_t first = 0; first < p.channels; first += block.at_once) {
    const int64_t channel = first + threadIdx.x % block.at_once;
    const A sum =
        sum_over_strips(static_cast<const A*>(p.sums) + of_sums, p.strips, p.channels, channel, block, shared);
    if (static_cast<int>(threadIdx.x) >= block.at_once || channel >= p.channels) continue;
    response[channel] = sqrt(sum);
    total += response[channel];
  }
  const A mean = sum_over_block(total, shared) / A(p.channels) + A(p.eps);
  for (int64_t c = threadIdx.x; c < p.channels; c += kFactorThreads)
    scale[c] = load(gamma + c) * (response[c] / mean) + 1;
}

/// A block for each image.
template <typename A>
__global__ void __launch_bounds__(kFactorThreads, 1) response_gradients_kernel(const ResponseFactorsParams p) {
  OVERLOCK_MM_SHARED(A, shared);
  const Channels block(p.channels);
  const int64_t image = blockIdx.x, of_image = image * p.channels, of_sums = of_image * p.strips;
  const A* const gamma = static_cast<const A*>(p.gamma);
  const A* const response = static_cast<const A*>(p.response) + of_image;
  A* const scale = static_cast<A*>(p.scale) + of_image;
  A* const slope = static_cast<A*>(p.slope) + of_image;
  A* const grad_gamma = static_cast<A*>(p.grads_of_images) + 2 * of_image;
  A* const grad_beta = grad_gamma + p.channels;
  A total = 0, weighted = 0;
  for (int64_t first = 0; first < p.channels; first += block.at_once) {
    const int64_t channel = first + threadIdx.x % block.at_once;
    const A products =
        sum_over_strips(static_cast<const A*>(p.sums) + of_sums, p.strips, p.channels, channel, block, shared);
    const A plain =
        sum_over_strips(static_cast<const A*>(p.plain_sums) + of_sums, p.strips, p.channels, channel, block, shared);
    if (static_cast<int>(threadIdx.x) >= block.at_once || channel >= p.channels) continue;
    slope[channel] = products;  // until all channels have theirs
    grad_beta[channel] = plain;
    const A norm = load(response + channel);
    total += norm;
    weighted += products * load(gamma + channel) * norm;
  }
  const A mean = sum_over_block(total, shared) / A(p.channels) + A(p.eps);
  const A grad_mean = sum_over_block(weighted, shared) / (mean * mean * A(p.channels));
  for (int64_t c = threadIdx.x; c < p.channels; c += kFactorThreads) {
    const A norm = load(response + c), weight = load(gamma + c), normed = norm / mean, products = slope[c];
    grad_gamma[c] = products * normed;
    scale[c] = weight * normed + 1;
    // Through the response itself, and through the mean over channels that divides it. The norm of a map of zeros has
    // no slope.
    slope[c] = norm > 0 ? (products * weight / mean - grad_mean) / norm : A(0);
  }
}

}  // namespace response_norm_kernels
}  // namespace overlock_mm
