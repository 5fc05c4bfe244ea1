// GELU, residual depth-wise convolution and response norm in one, for tensors on the CPU: one kernel after the other,
// in the memory of one map. The backward makes the maps between them again.
#include <torch/library.h>

#include "../checks.h"
#include "launch.h"

namespace overlock_mm {
namespace {

using namespace cpu;

using Conv = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, int64_t, bool);
using ConvBackward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, int64_t, bool,
                                                        std::array<bool, 3>);
using NormBackward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                        double);

std::tuple<Tensor, Tensor, Tensor> gelu_norm_with_response_cpu(const Tensor& x, const Tensor& weight,
                                                               const OptionalTensor& bias, const Tensor& gamma,
                                                               const Tensor& beta, double eps) {
  check_residual_depthwise_norm(x, weight, bias, gamma, beta);
  const Tensor map = launch_gelu(as_map(x), Tensor());
  const auto [response, scale] = launch_residual_depthwise_norm(map, weight, bias, gamma, beta, eps, map);
  return {as_output(map, x), scale, response};
}

std::tuple<Tensor, Tensor> gelu_norm_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                         const Tensor& gamma, const Tensor& beta, double eps) {
  const auto [output, scale, response] = gelu_norm_with_response_cpu(x, weight, bias, gamma, beta, eps);
  return {output, scale};
}

Tensor gelu_normed_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& scale,
                       const Tensor& beta) {
  check_residual_depthwise_normed(x, weight, bias, scale, beta);
  const Tensor map = launch_gelu(as_map(x), Tensor());
  launch_residual_depthwise_normed(map, weight, bias, scale, beta, map);
  return as_output(map, x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gelu_norm_backward_cpu(const Tensor& grad_output, const Tensor& x,
                                                                          const Tensor& weight,
                                                                          const OptionalTensor& bias,
                                                                          const Tensor& gamma, const Tensor& response,
                                                                          double eps) {
  check_gelu_residual_depthwise_norm_backward(grad_output, x, weight, bias, gamma, response);
  static const auto conv = operator_named<Conv>("overlock_mm::depthwise_conv2d");
  static const auto conv_backward = operator_named<ConvBackward>("overlock_mm::_depthwise_conv2d_backward");
  static const auto norm_backward = operator_named<NormBackward>("overlock_mm::_response_norm_backward");
  const Tensor input = as_map(x), grad = grad_output.to(input.scalar_type());
  const Tensor v = launch_gelu(input, Tensor()), kernel = as_parameter(weight, x);
  const OptionalTensor shift = bias ? OptionalTensor(as_parameter(*bias, x)) : bias;
  Tensor map = conv.call(v, kernel, shift, /*dilation=*/1, /*residual=*/true);
  Tensor grad_weight, grad_bias, grad_gamma, grad_beta;
  std::tie(map, grad_gamma, grad_beta) = norm_backward.call(grad, map, as_parameter(gamma, x), response, eps);
  std::tie(map, grad_weight, grad_bias) =
      conv_backward.call(map, v, kernel, /*dilation=*/1, /*residual=*/true, {true, true, true});
  return {as_output(launch_gelu(input, map), x), grad_weight, grad_bias, grad_gamma, grad_beta};
}

}  // namespace

TORCH_LIBRARY_IMPL(overlock_mm, CPU, m) {
  m.impl("gelu_residual_depthwise_norm", &gelu_norm_cpu);
  m.impl("_gelu_residual_depthwise_normed", &gelu_normed_cpu);
  m.impl("_gelu_residual_depthwise_norm", &gelu_norm_with_response_cpu);
  m.impl("_gelu_residual_depthwise_norm_backward", &gelu_norm_backward_cpu);
}

}  // namespace overlock_mm
