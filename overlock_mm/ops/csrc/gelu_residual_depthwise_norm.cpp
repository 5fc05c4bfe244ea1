// GELU, residual depth-wise convolution and response norm in one: schemas, and shapes for the meta device.
#include <torch/library.h>

#include "checks.h"

namespace overlock_mm {
namespace {

std::tuple<Tensor, Tensor, Tensor> gelu_norm_with_response_meta(const Tensor& x, const Tensor& weight,
                                                                const OptionalTensor& bias, const Tensor& gamma,
                                                                const Tensor& beta, double) {
  check_residual_depthwise_norm(x, weight, bias, gamma, beta);
  const auto of_images = [&] {
    return at::empty_symint({x.sym_size(0), x.sym_size(1)}, x.options().dtype(accumulation_type(x)));
  };
  return {empty_like_map(x), of_images(), of_images()};
}

std::tuple<Tensor, Tensor> gelu_norm_meta(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                          const Tensor& gamma, const Tensor& beta, double eps) {
  const auto [output, scale, response] = gelu_norm_with_response_meta(x, weight, bias, gamma, beta, eps);
  return {output, scale};
}

Tensor gelu_normed_meta(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& scale,
                        const Tensor& beta) {
  check_residual_depthwise_normed(x, weight, bias, scale, beta);
  return empty_like_map(x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gelu_norm_backward_meta(const Tensor& grad_output, const Tensor& x,
                                                                           const Tensor& weight,
                                                                           const OptionalTensor& bias,
                                                                           const Tensor& gamma, const Tensor& response,
                                                                           double) {
  check_gelu_residual_depthwise_norm_backward(grad_output, x, weight, bias, gamma, response);
  const auto empty = [&](const Tensor& parameter) {
    return at::empty_symint(parameter.sym_sizes(), x.options().dtype(accumulation_type(x)));
  };
  return {empty_like_map(x), empty(weight), empty(gamma), empty(gamma), empty(gamma)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) {
  // residual_depthwise_norm(gelu(x), weight, bias, gamma, beta, eps), with derivatives, and the scale of the norm,
  // (B, C), which has none.
  m.def(
      "gelu_residual_depthwise_norm(Tensor x, Tensor weight, Tensor? bias, Tensor gamma, Tensor beta, float eps) "
      "-> (Tensor output, Tensor scale)");
  // The output for a scale that is known. It has no derivative.
  m.def("_gelu_residual_depthwise_normed(Tensor x, Tensor weight, Tensor? bias, Tensor scale, Tensor beta) -> Tensor");
  // With the response, (B, C), which the backward reads.
  m.def(
      "_gelu_residual_depthwise_norm(Tensor x, Tensor weight, Tensor? bias, Tensor gamma, Tensor beta, float eps) "
      "-> (Tensor output, Tensor scale, Tensor response)");
  // Gradients of x, weight, bias, gamma and beta. Those of parameters have the accumulation type.
  m.def(
      "_gelu_residual_depthwise_norm_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor gamma, Tensor response, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(overlock_mm, Meta, m) {
  m.impl("gelu_residual_depthwise_norm", &gelu_norm_meta);
  m.impl("_gelu_residual_depthwise_normed", &gelu_normed_meta);
  m.impl("_gelu_residual_depthwise_norm", &gelu_norm_with_response_meta);
  m.impl("_gelu_residual_depthwise_norm_backward", &gelu_norm_backward_meta);
}

}  // namespace overlock_mm
