// The internal operators as C++ functions that go through the dispatcher.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include "contmix_tensors.h"

namespace overlock_mm {

inline std::tuple<Tensor, Tensor> call_contmix(const Tensor& value, const Tensor& query, const Tensor& keys,
                                               const OptionalTensor& bias, const OptionalTensor& rpb_small,
                                               const OptionalTensor& rpb_large, int64_t small_kernel_size,
                                               int64_t large_kernel_size) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("overlock_mm::_contmix", "").typed<decltype(call_contmix)>();
  return op.call(value, query, keys, bias, rpb_small, rpb_large, small_kernel_size, large_kernel_size);
}

inline Gradients call_contmix_backward(const Tensor& grad_output, const Tensor& value, const Tensor& query,
                                       const Tensor& keys, const OptionalTensor& bias, const OptionalTensor& rpb_small,
                                       const OptionalTensor& rpb_large, const Tensor& output, const Tensor& logsumexp,
                                       int64_t small_kernel_size, int64_t large_kernel_size,
                                       std::array<bool, 6> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("overlock_mm::_contmix_backward", "")
                             .typed<decltype(call_contmix_backward)>();
  return op.call(grad_output, value, query, keys, bias, rpb_small, rpb_large, output, logsumexp, small_kernel_size,
                 large_kernel_size, output_mask);
}

}  // namespace overlock_mm
