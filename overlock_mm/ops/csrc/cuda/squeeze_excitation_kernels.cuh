// The CUDA kernels of squeeze-excitations. squeeze_excitation_launch.h has the shapes.
//
// In the two small layers a block has an image: its numbers are in shared memory, and the weights are read once,
// neighbouring threads neighbouring numbers. Threads have channels of the maps as those of scales and shifts do.
#pragma once

#include "gelu.cuh"
#include "numbers.cuh"
#include "scale_and_shift_kernels.cuh"
#include "squeeze_excitation_launch.h"

namespace overlock_mm {
namespace squeeze_excitation_kernels {

using namespace scale_and_shift_kernels;

constexpr int kGateThreads = 512;

__device__ __forceinline__ float sigmoid(float x) {
  return fast_inverse(1.f + fast_power_of_2(x * -1.4426950408889634f));  // 1 / log 2
}
__device__ __forceinline__ double sigmoid(double x) { return 1 / (1 + exp(-x)); }

/// body(row, sum over columns of matrix[row, column] * vector[column]), for all rows: a warp for each.
template <typename A, typename Body>
__device__ __forceinline__ void for_rows(const A* matrix, int64_t rows, int64_t columns, const A* vector,
                                         const Body& body) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t row = threadIdx.x / kWarp; row < rows; row += kGateThreads / kWarp) {
    A sum = 0;
#pragma unroll 4
    for (int64_t column = lane; column < columns; column += kWarp) {
      sum += load(matrix + row * columns + column) * vector[column];
    }
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    if (lane == 0) body(row, sum);
  }
}

/// body(column, sum over rows of matrix[row, column] * factor(row)), for all columns. A line of the matrix has `pitch`
/// numbers. Threads with the same column have some of its rows. `shared` has a number for each thread.
template <typename A, typename Factor, typename Body>
__device__ __forceinline__ void for_columns(const A* matrix, int64_t pitch, int64_t rows, int64_t columns, A* shared,
                                            const Factor& factor, const Body& body) {
  for (int64_t first = 0; first < columns; first += kGateThreads) {
    const int width = static_cast<int>(min(columns - first, static_cast<int64_t>(kGateThreads)));
    const int parts = kGateThreads / width, part = threadIdx.x / width, column = threadIdx.x % width;
    A sum = 0;
    if (part < parts) {
#pragma unroll 4
      for (int64_t row = part; row < rows; row += parts)
        sum += load(matrix + row * pitch + first + column) * factor(row);
    }
    __syncthreads();  // what was in `shared` has been read
    shared[threadIdx.x] = sum;
    __syncthreads();
    if (part > 0) continue;
    for (int other = 1; other < parts; ++other) sum += shared[other * width + column];
    body(first + column, sum);
  }
}

/// Shared memory: a number for each thread, for each channel, and for each hidden channel.
template <typename A>
__global__ void __launch_bounds__(kGateThreads) gates_kernel(SqueezeExcitationParams p) {
  OVERLOCK_MM_SHARED(A, shared);
  const int64_t image = blockIdx.x;
  A *const means = shared + kGateThreads, *const activated = means + p.channels;
  const A inverse = A(1) / static_cast<A>(p.positions);
  for_columns(
      static_cast<const A*>(p.partial_sums) + image * p.channels, p.batch * p.channels, p.strips, p.channels, shared,
      [](int64_t) { return A(1); },
      [&](int64_t c, A sum) { static_cast<A*>(p.mean)[image * p.channels + c] = means[c] = sum * inverse; });
  __syncthreads();
  for_rows(static_cast<const A*>(p.reduce_weight), p.hidden, p.channels, means, [&](int64_t r, A sum) {
    const A squeezed = sum + load(static_cast<const A*>(p.reduce_bias) + r);
    static_cast<A*>(p.squeezed)[image * p.hidden + r] = squeezed;
    activated[r] = gelu(squeezed);
  });
  __syncthreads();
  for_rows(static_cast<const A*>(p.expand_weight), p.channels, p.hidden, activated, [&](int64_t c, A sum) {
    static_cast<A*>(p.gate)[image * p.channels + c] = sigmoid(sum + load(static_cast<const A*>(p.expand_bias) + c));
  });
}

/// Shared memory as of gates_kernel.
template <typename A>
__global__ void __launch_bounds__(kGateThreads) gate_gradients_kernel(SqueezeExcitationParams p) {
  OVERLOCK_MM_SHARED(A, shared);
  const int64_t image = blockIdx.x, of_channels = image * p.channels, of_hidden = image * p.hidden;
  A *const expanded = shared + kGateThreads, *const squeezed = expanded + p.channels;
  for_columns(
      static_cast<const A*>(p.partial_sums) + of_channels, p.batch * p.channels, p.strips, p.channels, shared,
      [](int64_t) { return A(1); },
      [&](int64_t c, A sum) {
        const A gate = load(static_cast<const A*>(p.gate) + of_channels + c);
        static_cast<A*>(p.grad_expanded)[of_channels + c] = expanded[c] = sum * gate * (1 - gate);
      });
  __syncthreads();
  for_columns(
      static_cast<const A*>(p.expand_weight), p.hidden, p.channels, p.hidden, shared,
      [&](int64_t c) { return expanded[c]; },
      [&](int64_t r, A sum) {
        A derivative;
        gelu(load(static_cast<const A*>(p.squeezed) + of_hidden + r), &derivative);
        static_cast<A*>(p.grad_squeezed)[of_hidden + r] = squeezed[r] = sum * derivative;
      });
  __syncthreads();
  const A inverse = A(1) / static_cast<A>(p.positions);
  for_columns(
      static_cast<const A*>(p.reduce_weight), p.channels, p.hidden, p.channels, shared,
      [&](int64_t r) { return squeezed[r]; },
      [&](int64_t c, A sum) { static_cast<A*>(p.grad_mean)[of_channels + c] = sum * inverse; });
}

/// The sum over images of left[image, row] * right(image, column).
template <typename A, typename Right>
__device__ __forceinline__ A sum_over_images(const void* left, int64_t row, int64_t rows, int64_t batch,
                                             const Right& right) {
  A sum = 0;
  for (int64_t image = 0; image < batch; ++image) {
    sum += load(static_cast<const A*>(left) + image * rows + row) * right(image);
  }
  return sum;
}

/// A thread for each parameter: the weights of both layers, then their biases.
template <typename A>
__global__ void __launch_bounds__(kGateThreads) weight_gradients_kernel(SqueezeExcitationParams p) {
  const int64_t weights = p.channels * p.hidden;
  int64_t index = static_cast<int64_t>(blockIdx.x) * kGateThreads + threadIdx.x;
  const auto one = [](int64_t) { return A(1); };
  if (index < weights) {
    const int64_t row = index / p.channels, column = index % p.channels;
    static_cast<A*>(p.grad_reduce_weight)[index] = sum_over_images<A>(
        p.grad_squeezed, row, p.hidden, p.batch,
        [&](int64_t image) { return load(static_cast<const A*>(p.mean) + image * p.channels + column); });
    return;
  }
  index -= weights;
  if (index < weights) {
    const int64_t row = index / p.hidden, column = index % p.hidden;
    static_cast<A*>(p.grad_expand_weight)[index] = sum_over_images<A>(
        p.grad_expanded, row, p.channels, p.batch,
        [&](int64_t image) { return gelu(load(static_cast<const A*>(p.squeezed) + image * p.hidden + column)); });
    return;
  }
  index -= weights;
  if (index < p.hidden) {
    static_cast<A*>(p.grad_reduce_bias)[index] = sum_over_images<A>(p.grad_squeezed, index, p.hidden, p.batch, one);
  } else if (index < p.hidden + p.channels) {
    index -= p.hidden;
    static_cast<A*>(p.grad_expand_bias)[index] = sum_over_images<A>(p.grad_expanded, index, p.channels, p.batch, one);
  }
}

// Maps that are multiplied with silu(other), too.

template <typename A>
__device__ __forceinline__ A silu(A x) {
  return x * sigmoid(x);
}

template <typename A>
__device__ __forceinline__ A silu(A x, A* derivative) {
  const A below = sigmoid(x);
  *derivative = below * (1 + x * (1 - below));
  return x * below;
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) gated_forward_kernel(GatedMapParams p) {
  using A = typename Accumulator<T>::type;
  const Part<kSize> part(p);
  if (part.channel >= p.channels) return;
  A scale[kSize];
  load_parameters(p.scale, part.image * p.channels + part.channel, scale);
  const int64_t first = part.image * p.positions * p.channels + part.channel;
  const T *const input = static_cast<const T*>(p.input) + first, *const other = static_cast<const T*>(p.other) + first;
  T* const output = static_cast<T*>(p.output) + first;
#pragma unroll 2
  for (int64_t i = part.first_position; i < part.end; i += kThreads / kLanes) {
    A numbers[kSize], others[kSize];
    load_part(input + i * p.channels, numbers);
    load_part(other + i * p.channels, others);
#pragma unroll
    for (int j = 0; j < kSize; ++j) numbers[j] *= scale[j] * silu(others[j]);
    store_part(output + i * p.channels, numbers);
  }
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) gated_sums_kernel(GatedMapParams p) {
  using A = typename Accumulator<T>::type;
  OVERLOCK_MM_SHARED(A, shared);
  const Part<kSize> part(p);
  A sums[kSize] = {};
  if (part.channel < p.channels) {
    const int64_t first = part.image * p.positions * p.channels + part.channel;
    const T *const input = static_cast<const T*>(p.input) + first, *const other =
                                                                       static_cast<const T*>(p.other) + first;
    const T* const grad_output = static_cast<const T*>(p.grad_output) + first;
#pragma unroll 1
    for (int64_t i = part.first_position; i < part.end; i += kThreads / kLanes) {
      A numbers[kSize], others[kSize], grads[kSize];
      load_part(input + i * p.channels, numbers);
      load_part(other + i * p.channels, others);
      load_part(grad_output + i * p.channels, grads);
#pragma unroll
      for (int j = 0; j < kSize; ++j) sums[j] += grads[j] * numbers[j] * silu(others[j]);
    }
  }
  store_sums(p, part, sums, shared);
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) gated_gradients_kernel(GatedMapParams p) {
  using A = typename Accumulator<T>::type;
  const Part<kSize> part(p);
  if (part.channel >= p.channels) return;
  A scale[kSize], shift[kSize];
  load_parameters(p.scale, part.image * p.channels + part.channel, scale);
  load_parameters(p.shift, part.image * p.channels + part.channel, shift);
  const int64_t first = part.image * p.positions * p.channels + part.channel;
  const T *const input = static_cast<const T*>(p.input) + first, *const other = static_cast<const T*>(p.other) + first;
  const T* const grad_output = static_cast<const T*>(p.grad_output) + first;
  T *const grad_input = static_cast<T*>(p.grad_input) + first, *const grad_other =
                                                                   static_cast<T*>(p.grad_other) + first;
#pragma unroll 1
  for (int64_t i = part.first_position; i < part.end; i += kThreads / kLanes) {
    A numbers[kSize], others[kSize], grads[kSize];
    load_part(input + i * p.channels, numbers);
    load_part(other + i * p.channels, others);
    load_part(grad_output + i * p.channels, grads);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      A derivative;
      const A activated = silu(others[j], &derivative), scaled = grads[j] * scale[j];
      others[j] = scaled * numbers[j] * derivative;
      numbers[j] = scaled * activated + shift[j];
    }
    store_part(grad_input + i * p.channels, numbers);
    store_part(grad_other + i * p.channels, others);
  }
}

}  // namespace squeeze_excitation_kernels
}  // namespace overlock_mm
