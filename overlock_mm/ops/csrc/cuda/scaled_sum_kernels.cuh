// The CUDA kernels of scaled sums, as those of scales and shifts: scaled_sum_launch.h has the shapes.
#pragma once

#include "scale_and_shift_kernels.cuh"
#include "scaled_sum_launch.h"

namespace overlock_mm {
namespace scaled_sum_kernels {

using namespace scale_and_shift_kernels;

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) scaled_sum_forward_kernel(ScaledSumParams p) {
  using A = typename Accumulator<T>::type;
  const Part<kSize> part(p);
  if (part.channel >= p.channels) return;
  A scale[kSize], shift[kSize], other_scale[kSize], other_shift[kSize];
  load_parameters(p.scale, part.channel, scale);
  load_parameters(p.shift, part.channel, shift);
  load_parameters(p.other_scale, part.channel, other_scale);
  load_parameters(p.other_shift, part.channel, other_shift);
  const int64_t first = part.image * p.positions;
  const T* const input = static_cast<const T*>(p.input) + first * p.input_step + part.channel;
  const T* const other = static_cast<const T*>(p.other) + first * p.channels + part.channel;
  T* const output = static_cast<T*>(p.output) + first * p.channels + part.channel;
#pragma unroll 4
  for (int64_t i = part.first_position; i < part.end; i += kThreads / kLanes) {
    A numbers[kSize], others[kSize];
    load_part(input + i * p.input_step, numbers);
    load_part(other + i * p.channels, others);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      numbers[j] = (numbers[j] * scale[j] + shift[j]) + (others[j] * other_scale[j] + other_shift[j]);
    }
    store_part(output + i * p.channels, numbers);
  }
}

/// Two blocks of a multiprocessor: where more have to fit, threads spill their sums.
template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads, 2) scaled_sum_backward_kernel(ScaledSumParams p) {
  using A = typename Accumulator<T>::type;
  OVERLOCK_MM_SHARED(A, shared);
  const Part<kSize> part(p);
  const bool works = part.channel < p.channels;
  A products[kSize] = {}, other_products[kSize] = {}, sums[kSize] = {};
  if (works) {
    A scale[kSize], other_scale[kSize];
    load_parameters(p.scale, part.channel, scale);
    load_parameters(p.other_scale, part.channel, other_scale);
    const int64_t first_position = part.image * p.positions;
    const int64_t first = first_position * p.channels + part.channel;
    const T* const input = static_cast<const T*>(p.input) + first_position * p.input_step + part.channel;
    const T *const other = static_cast<const T*>(p.other) + first, *const grad_output =
                                                                       static_cast<const T*>(p.grad_output) + first;
    T *const grad_input = static_cast<T*>(p.grad_input) + first, *const grad_other =
                                                                     static_cast<T*>(p.grad_other) + first;
#pragma unroll 2
    for (int64_t i = part.first_position; i < part.end; i += kThreads / kLanes) {
      A numbers[kSize], grads[kSize];
      load_part(grad_output + i * p.channels, grads);
      load_part(input + i * p.input_step, numbers);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        products[j] += grads[j] * numbers[j];
        sums[j] += grads[j];
        numbers[j] = grads[j] * scale[j];
      }
      store_part(grad_input + i * p.channels, numbers);
      load_part(other + i * p.channels, numbers);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        other_products[j] += grads[j] * numbers[j];
        grads[j] *= other_scale[j];
      }
      store_part(grad_other + i * p.channels, grads);
    }
  }
  A* const partial_sums =
      static_cast<A*>(p.partial_sums) + (part.strip * p.batch + part.image) * 3 * p.channels + part.channel;
  const auto store_sums = [&](A(&numbers)[kSize], int row) {
    sum_over_positions(numbers, shared);
    if (threadIdx.x >= kLanes || !works) return;
#pragma unroll
    for (int j = 0; j < kSize; ++j) partial_sums[row * p.channels + j] = numbers[j];
  };
  store_sums(products, 0);
  store_sums(other_products, 1);
  store_sums(sums, 2);
}

/// Calls body with an integral constant: the channels of a thread.
template <typename T, typename Body>
cudaError_t with_size_of_both(const ScaledSumParams& params, const Body& body) {
  const bool other_is_aligned = reinterpret_cast<uint64_t>(params.grad_other) % 16 == 0;
  if (params.input_step % Channels<T>::kSize == 0 && other_is_aligned) return with_size<T>(params, body);
  return body(std::integral_constant<int, 1>{});
}

}  // namespace scaled_sum_kernels
}  // namespace overlock_mm
