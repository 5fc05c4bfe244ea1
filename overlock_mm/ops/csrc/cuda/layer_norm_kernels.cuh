// The CUDA kernels of layer norms. layer_norm_launch.h has the shapes.
//
// kLanes neighbouring threads have a position: as many as its channels fill with 16 bytes each, at most a warp. They
// read the position two or three times, the later ones from the first-level cache. Memory bounds them.
#pragma once

#include "layer_norm_launch.h"
#include "numbers.cuh"

namespace overlock_mm {
namespace layer_norm_kernels {

constexpr int kThreads = 256;

/// Calls body(c, count) for the parts of C channels that a lane has, of up to kSize channels from c on.
template <int kSize, int kLanes, typename Body>
__device__ __forceinline__ void for_parts(int64_t channels, int lane, const Body& body) {
  for (int64_t c = static_cast<int64_t>(lane) * kSize; c < channels; c += kLanes * kSize) {
    body(c, static_cast<int>(min(channels - c, static_cast<int64_t>(kSize))));
  }
}

/// Neighbouring numbers, at once where they are whole vectors; 0 beyond `count`.
template <typename T, typename A, int kSize>
__device__ __forceinline__ void load_part(const T* at, int count, bool aligned, A (&out)[kSize]) {
  if (aligned) {
    const Channels<T> vector = load_vector(reinterpret_cast<const Channels<T>*>(at));
#pragma unroll
    for (int i = 0; i < kSize; ++i) out[i] = widen(vector.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) out[i] = i < count ? load(at + i) : A(0);
  }
}

template <typename T, typename A, int kSize>
__device__ __forceinline__ void store_part(T* at, int count, bool aligned, const A (&numbers)[kSize]) {
  if (aligned) {
    Channels<T> vector;
#pragma unroll
    for (int i = 0; i < kSize; ++i) store(&vector.at[i], numbers[i]);
    *reinterpret_cast<Channels<T>*>(at) = vector;
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i < count) store(at + i, numbers[i]);
    }
  }
}

/// The sum over kLanes neighbours, the same in all of them. The whole warp takes part.
template <int kLanes, typename A>
__device__ __forceinline__ A sum_over_lanes(A number) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) number += __shfl_xor_sync(0xffffffffu, number, mask);
  return number;
}

__device__ __forceinline__ float inverse_root(float x) { return 1 / sqrtf(x); }
__device__ __forceinline__ double inverse_root(double x) { return 1 / sqrt(x); }

template <typename T>
__device__ __forceinline__ bool is_aligned(const void* map, int64_t channels) {
  return channels % Channels<T>::kSize == 0 && reinterpret_cast<uint64_t>(map) % 16 == 0;
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads) layer_norm_forward_kernel(LayerNormParams p) {
  using A = typename Accumulator<T>::type;
  constexpr int kSize = Channels<T>::kSize, kGroups = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int64_t position = static_cast<int64_t>(blockIdx.x) * kGroups + threadIdx.x / kLanes;
  const bool works = position < p.positions;  // all take part in shuffles
  const int64_t channels = works ? p.channels : 0;
  const T* const input = static_cast<const T*>(p.input) + (works ? position * p.channels : 0);
  const bool aligned = is_aligned<T>(p.input, p.channels);

  A sum = 0;
  for_parts<kSize, kLanes>(channels, lane, [&](int64_t c, int count) {
    A numbers[kSize];
    load_part(input + c, count, aligned, numbers);
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum += numbers[i];
  });
  const A mean = sum_over_lanes<kLanes>(sum) / static_cast<A>(p.channels);

  A squares = 0;
  for_parts<kSize, kLanes>(channels, lane, [&](int64_t c, int count) {
    A numbers[kSize];
    load_part(input + c, count, aligned, numbers);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const A distance = i < count ? numbers[i] - mean : A(0);
      squares += distance * distance;
    }
  });
  const A variance = sum_over_lanes<kLanes>(squares) / static_cast<A>(p.channels);
  const A rstd = inverse_root(variance + static_cast<A>(p.eps));

  const A *const weights = static_cast<const A*>(p.weight), *const biases = static_cast<const A*>(p.bias);
  T* const output = static_cast<T*>(p.output) + (works ? position * p.channels : 0);
  for_parts<kSize, kLanes>(channels, lane, [&](int64_t c, int count) {
    A numbers[kSize];
    load_part(input + c, count, aligned, numbers);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i < count) numbers[i] = (numbers[i] - mean) * rstd * load(weights + c + i) + load(biases + c + i);
    }
    store_part(output + c, count, aligned, numbers);
  });
  if (works && lane == 0 && p.mean) {
    static_cast<A*>(p.mean)[position] = mean;
    static_cast<A*>(p.rstd)[position] = rstd;
  }
}

/// A block for each partial sum. Group g of block i has the positions (i + n * partials) * groups + g. It adds up the
/// gradients of the parameters in shared memory of its own, and the block those of its groups, in their order.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads) layer_norm_backward_kernel(LayerNormParams p) {
  using A = typename Accumulator<T>::type;
  constexpr int kSize = Channels<T>::kSize;
  OVERLOCK_MM_SHARED(A, shared);
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes, groups = blockDim.x / kLanes;
  A *const weight_sums = shared + group * 2 * p.channels, *const bias_sums = weight_sums + p.channels;
  for (int64_t c = threadIdx.x; c < groups * 2 * p.channels; c += blockDim.x) shared[c] = 0;
  __syncthreads();

  const A* const weights = static_cast<const A*>(p.weight);
  const bool aligned = is_aligned<T>(p.input, p.channels) && is_aligned<T>(p.grad_output, p.channels) &&
                       is_aligned<T>(p.other_grad, p.channels);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * groups; first < p.positions; first += p.partials * groups) {
    const int64_t position = first + group;
    const bool works = position < p.positions;
    const int64_t channels = works ? p.channels : 0, row = works ? position * p.channels : 0;
    const T *const input = static_cast<const T*>(p.input) + row, *const grad_output =
                                                                     static_cast<const T*>(p.grad_output) + row;
    const A mean = works ? load(static_cast<const A*>(p.mean) + position) : A(0);
    const A rstd = works ? load(static_cast<const A*>(p.rstd) + position) : A(0);

    // Of the gradient g of the normalised numbers: the means of g and of g times them.
    A sum = 0, product = 0;
    for_parts<kSize, kLanes>(channels, lane, [&](int64_t c, int count) {
      A numbers[kSize], grads[kSize];
      load_part(input + c, count, aligned, numbers);
      load_part(grad_output + c, count, aligned, grads);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (i >= count) continue;
        const A normed = (numbers[i] - mean) * rstd, grad = grads[i] * load(weights + c + i);
        sum += grad;
        product += grad * normed;
        weight_sums[c + i] += grads[i] * normed;
        bias_sums[c + i] += grads[i];
      }
    });
    sum = sum_over_lanes<kLanes>(sum) / static_cast<A>(p.channels);
    product = sum_over_lanes<kLanes>(product) / static_cast<A>(p.channels);

    const T* const other_grad = static_cast<const T*>(p.other_grad) + row;
    T* const grad_input = static_cast<T*>(p.grad_input) + row;
    for_parts<kSize, kLanes>(channels, lane, [&](int64_t c, int count) {
      A numbers[kSize], grads[kSize];
      load_part(input + c, count, aligned, numbers);
      load_part(grad_output + c, count, aligned, grads);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (i >= count) continue;
        const A normed = (numbers[i] - mean) * rstd, grad = grads[i] * load(weights + c + i);
        numbers[i] = (grad - sum - normed * product) * rstd;
      }
      if (p.other_grad) {
        load_part(other_grad + c, count, aligned, grads);
#pragma unroll
        for (int i = 0; i < kSize; ++i) numbers[i] += grads[i];
      }
      store_part(grad_input + c, count, aligned, numbers);
    });
  }

  __syncthreads();
  A* const out = static_cast<A*>(p.partial_sums) + blockIdx.x * 2 * p.channels;
  for (int64_t c = threadIdx.x; c < 2 * p.channels; c += blockDim.x) {
    A sum = shared[c];
    for (int other = 1; other < groups; ++other) sum += shared[other * 2 * p.channels + c];
    out[c] = sum;
  }
}

}  // namespace layer_norm_kernels
}  // namespace overlock_mm
