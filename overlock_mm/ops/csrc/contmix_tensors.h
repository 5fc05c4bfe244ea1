// ContMix's operators for tensors: the internal ones as C++ functions, and how tensors become a kernel's parameters.
#pragma once

#include "contmix.h"
#include "tensors.h"

namespace overlock_mm {

/// Gradients of value, query, keys, bias, rpb_small, rpb_large. One that is not wanted is an empty tensor.
using ContMixGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline Tensor call_contmix_keys(const Tensor& key, const Tensor& proj_weight, int64_t num_groups, double scale) {
  static const auto op = operator_named<decltype(call_contmix_keys)>("overlock_mm::_contmix_keys");
  return op.call(key, proj_weight, num_groups, scale);
}

inline std::tuple<Tensor, Tensor> call_contmix_keys_backward(const Tensor& grad_keys, const Tensor& key,
                                                             const Tensor& proj_weight, double scale,
                                                             std::array<bool, 2> output_mask) {
  static const auto op = operator_named<decltype(call_contmix_keys_backward)>("overlock_mm::_contmix_keys_backward");
  return op.call(grad_keys, key, proj_weight, scale, output_mask);
}

inline std::tuple<Tensor, Tensor> call_contmix(const Tensor& value, const Tensor& query, const Tensor& keys,
                                               const OptionalTensor& bias, const OptionalTensor& rpb_small,
                                               const OptionalTensor& rpb_large, int64_t small_kernel_size,
                                               int64_t large_kernel_size) {
  static const auto op = operator_named<decltype(call_contmix)>("overlock_mm::_contmix");
  return op.call(value, query, keys, bias, rpb_small, rpb_large, small_kernel_size, large_kernel_size);
}

inline ContMixGradients call_contmix_backward(const Tensor& grad_output, const Tensor& value, const Tensor& query,
                                              const Tensor& keys, const OptionalTensor& bias,
                                              const OptionalTensor& rpb_small, const OptionalTensor& rpb_large,
                                              const Tensor& output, const Tensor& logsumexp, int64_t small_kernel_size,
                                              int64_t large_kernel_size, std::array<bool, 6> output_mask) {
  static const auto op = operator_named<decltype(call_contmix_backward)>("overlock_mm::_contmix_backward");
  return op.call(grad_output, value, query, keys, bias, rpb_small, rpb_large, output, logsumexp, small_kernel_size,
                 large_kernel_size, output_mask);
}

/// A map that a kernel reads. (A copy-on-write tensor stays one.)
Map map_to_read(const Tensor& tensor);
Map map_to_write(const Tensor& tensor);

/// The arguments of `_contmix`, already checked, as the kernels need them: keys and biases are contiguous.
struct ContMixInputs {
  Tensor value, query, keys, bias, rpb[2];
  int64_t kernel_size[2];

  ContMixInputs(const Tensor& value, const Tensor& query, const Tensor& keys, const OptionalTensor& bias,
                const OptionalTensor& rpb_small, const OptionalTensor& rpb_large, int64_t small_kernel_size,
                int64_t large_kernel_size);

  ContMixParams params() const;
};

struct ContMixOutputs {
  Tensor output, logsumexp;

  /// Not initialised.
  explicit ContMixOutputs(const ContMixInputs& inputs);
  void add_to(ContMixParams& params) const;
};

/// Gradients of maps, and the partial sums of those of keys and biases, each over a part of the map.
struct ContMixGradientBuffers {
  int64_t partials;
  std::array<bool, 6> wanted;
  at::TensorOptions options;
  Tensor grad_value, grad_query;
  Tensor partial_keys, partial_bias, partial_rpb[2];

  ContMixGradientBuffers(const ContMixInputs& inputs, int64_t partials, std::array<bool, 6> wanted);
  void add_to(ContMixParams& params) const;
  /// That of the keys is laid out as (B, L, G, Cq/G), for _contmix_keys_backward.
  ContMixGradients sums() const;
};

}  // namespace overlock_mm
