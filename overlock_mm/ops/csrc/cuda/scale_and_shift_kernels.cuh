// The CUDA kernels of scales and shifts. scale_and_shift_launch.h has the shapes.
//
// A thread has 16 bytes of channels, or a channel where they are not whole vectors, and walks over positions: its
// scale, its shift and its sums are in registers. The memory is what takes time.
#pragma once

#include <type_traits>

#include "numbers.cuh"
#include "scale_and_shift_launch.h"

namespace overlock_mm {
namespace scale_and_shift_kernels {

constexpr int kThreads = 256;
constexpr int kLanes = 8;  ///< neighbouring threads that have neighbouring channels: 128 bytes of vectors

/// What a thread has: channels from the first on, and positions.
template <int kSize>
struct Part {
  int64_t image, strip, channel, begin, end, first_position;

  /// Blocks of channels are the slowest, then images, then strips.
  __device__ Part(const ScaleAndShiftParams& p) {
    const int64_t strips = p.strips, blocks_of_channels = blockIdx.x / (strips * p.batch);
    strip = blockIdx.x % strips;
    image = blockIdx.x / strips % p.batch;
    channel = (blocks_of_channels * kLanes + threadIdx.x % kLanes) * kSize;
    begin = strip * p.positions / strips;
    end = (strip + 1) * p.positions / strips;
    first_position = begin + threadIdx.x / kLanes;
  }
};

template <typename T, typename A, int kSize>
__device__ __forceinline__ void load_part(const T* at, A (&out)[kSize]) {
  if constexpr (kSize == 1) {
    out[0] = load(at);
  } else {
    const Channels<T> vector = load_vector(reinterpret_cast<const Channels<T>*>(at));
#pragma unroll
    for (int i = 0; i < kSize; ++i) out[i] = widen(vector.at[i]);
  }
}

template <typename T, typename A, int kSize>
__device__ __forceinline__ void store_part(T* at, const A (&numbers)[kSize]) {
  if constexpr (kSize == 1) {
    store(at, numbers[0]);
  } else {
    Channels<T> vector;
#pragma unroll
    for (int i = 0; i < kSize; ++i) store(&vector.at[i], numbers[i]);
    *reinterpret_cast<Channels<T>*>(at) = vector;
  }
}

template <int kSize, typename A>
__device__ __forceinline__ void load_parameters(const void* parameters, int64_t at, A (&out)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) out[i] = parameters ? load(static_cast<const A*>(parameters) + at + i) : A(0);
}

template <typename T, int kSize, bool kOther>
__global__ void __launch_bounds__(kThreads) scale_and_shift_forward_kernel(ScaleAndShiftParams p) {
  using A = typename Accumulator<T>::type;
  const Part<kSize> part(p);
  if (part.channel >= p.channels) return;
  A scale[kSize], shift[kSize];
  const int64_t of_parameters = (p.by_image ? part.image * p.channels : 0) + part.channel;
  load_parameters(p.scale, of_parameters, scale);
  load_parameters(p.shift, of_parameters, shift);
  const int64_t first = part.image * p.positions * p.channels + part.channel;
  const T *const input = static_cast<const T*>(p.input) + first, *const other = static_cast<const T*>(p.other) + first;
  T* const output = static_cast<T*>(p.output) + first;
#pragma unroll 4
  for (int64_t i = part.first_position; i < part.end; i += kThreads / kLanes) {
    A numbers[kSize];
    load_part(input + i * p.channels, numbers);
#pragma unroll
    for (int j = 0; j < kSize; ++j) numbers[j] = numbers[j] * scale[j] + shift[j];
    if (kOther) {
      A added[kSize];
      load_part(other + i * p.channels, added);
#pragma unroll
      for (int j = 0; j < kSize; ++j) numbers[j] += added[j];
    }
    store_part(output + i * p.channels, numbers);
  }
}

/// Adds up over the threads of a block that have the same channels, in their order: for those of the first kLanes.
/// `shared` has kSize numbers for each thread.
template <int kSize, typename A>
__device__ __forceinline__ void sum_over_positions(A (&numbers)[kSize], A* shared) {
  __syncthreads();  // what was in `shared` has been read
#pragma unroll
  for (int j = 0; j < kSize; ++j) shared[j * kThreads + threadIdx.x] = numbers[j];
  __syncthreads();
  if (threadIdx.x >= kLanes) return;
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    for (int thread = static_cast<int>(threadIdx.x) + kLanes; thread < kThreads; thread += kLanes) {
      numbers[j] += shared[j * kThreads + thread];
    }
  }
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) scale_and_shift_backward_kernel(ScaleAndShiftParams p) {
  using A = typename Accumulator<T>::type;
  OVERLOCK_MM_SHARED(A, shared);
  const Part<kSize> part(p);
  const bool works = part.channel < p.channels;
  A products[kSize] = {}, sums[kSize] = {};
  if (works) {
    A scale[kSize];
    load_parameters(p.scale, (p.by_image ? part.image * p.channels : 0) + part.channel, scale);
    const int64_t first = part.image * p.positions * p.channels + part.channel;
    const T *const input = static_cast<const T*>(p.input) + first, *const grad_output =
                                                                       static_cast<const T*>(p.grad_output) + first;
    T* const grad_input = static_cast<T*>(p.grad_input) + first;
#pragma unroll 2
    for (int64_t i = part.first_position; i < part.end; i += kThreads / kLanes) {
      A numbers[kSize], grads[kSize];
      load_part(input + i * p.channels, numbers);
      load_part(grad_output + i * p.channels, grads);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        products[j] += grads[j] * numbers[j];
        sums[j] += grads[j];
        grads[j] *= scale[j];
      }
      store_part(grad_input + i * p.channels, grads);
    }
  }
  sum_over_positions(products, shared);
  if (p.grad_shift) sum_over_positions(sums, shared);
  if (threadIdx.x >= kLanes || !works) return;
  const int64_t row = (part.strip * p.batch + part.image) * (p.grad_shift ? 2 : 1) * p.channels;
  A* const out = static_cast<A*>(p.partial_sums) + row + part.channel;
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    out[j] = products[j];
    if (p.grad_shift) out[p.channels + j] = sums[j];
  }
}

/// Adds up over the threads of a block, and writes the partial sums (strips, B, C) of its strip.
template <int kSize, typename A>
__device__ __forceinline__ void store_sums(const ScaleAndShiftParams& p, const Part<kSize>& part, A (&sums)[kSize],
                                           A* shared) {
  sum_over_positions(sums, shared);
  if (threadIdx.x >= kLanes || part.channel >= p.channels) return;
  A* const out = static_cast<A*>(p.partial_sums) + (part.strip * p.batch + part.image) * p.channels + part.channel;
#pragma unroll
  for (int j = 0; j < kSize; ++j) out[j] = sums[j];
}

template <typename T, int kSize, bool kProducts>
__global__ void __launch_bounds__(kThreads) sums_over_positions_kernel(ScaleAndShiftParams p) {
  using A = typename Accumulator<T>::type;
  OVERLOCK_MM_SHARED(A, shared);
  const Part<kSize> part(p);
  A sums[kSize] = {};
  if (part.channel < p.channels) {
    const int64_t first = part.image * p.positions * p.channels + part.channel;
    const T *const input = static_cast<const T*>(p.input) + first, *const grad_output =
                                                                       static_cast<const T*>(p.grad_output) + first;
#pragma unroll 4
    for (int64_t i = part.first_position; i < part.end; i += kThreads / kLanes) {
      A numbers[kSize], grads[kSize];
      load_part(input + i * p.channels, numbers);
      if (kProducts) load_part(grad_output + i * p.channels, grads);
#pragma unroll
      for (int j = 0; j < kSize; ++j) sums[j] += kProducts ? numbers[j] * grads[j] : numbers[j];
    }
  }
  store_sums(p, part, sums, shared);
}

/// Calls body with an integral constant: the channels of a thread.
template <typename T, typename Body>
cudaError_t with_size(const ScaleAndShiftParams& params, const Body& body) {
  const auto is_aligned = [](const void* map) { return reinterpret_cast<uint64_t>(map) % 16 == 0; };
  const bool aligned = params.channels % Channels<T>::kSize == 0 && is_aligned(params.input) &&
                       is_aligned(params.other) && is_aligned(params.output) && is_aligned(params.grad_output) &&
                       is_aligned(params.grad_input);
  if (aligned) return body(std::integral_constant<int, Channels<T>::kSize>{});
  return body(std::integral_constant<int, 1>{});
}

inline bool is_empty(const ScaleAndShiftParams& params) {
  return params.batch == 0 || params.positions == 0 || params.channels == 0;
}

template <int kSize>
int64_t blocks_of(const ScaleAndShiftParams& params) {
  return ceil_div(params.channels, kLanes * kSize) * params.batch * params.strips;
}

}  // namespace scale_and_shift_kernels
}  // namespace overlock_mm
