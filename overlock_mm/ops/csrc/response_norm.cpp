// Global response norms: schemas, and shapes for the meta device.
#include <torch/library.h>

#include "checks.h"

namespace overlock_mm {
namespace {

std::tuple<Tensor, Tensor, Tensor> response_norm_meta(const Tensor& x, const Tensor& gamma, const Tensor& beta,
                                                      double) {
  check_response_norm(x, gamma, beta);
  const auto of_images = [&] {
    return at::empty_symint({x.sym_size(0), x.sym_size(1)}, x.options().dtype(accumulation_type(x)));
  };
  return {empty_like_map(x), of_images(), of_images()};
}

std::tuple<Tensor, Tensor> global_response_norm_meta(const Tensor& x, const Tensor& gamma, const Tensor& beta,
                                                     double eps) {
  const auto [output, scale, response] = response_norm_meta(x, gamma, beta, eps);
  return {output, scale};
}

Tensor response_normed_meta(const Tensor& x, const Tensor& scale, const Tensor& beta) {
  check_response_normed(x, scale, beta);
  return empty_like_map(x);
}

std::tuple<Tensor, Tensor, Tensor> response_norm_backward_meta(const Tensor& grad_output, const Tensor& x,
                                                               const Tensor& gamma, const Tensor& response, double) {
  check_response_norm_backward(grad_output, x, gamma, response);
  const auto options = x.options().dtype(accumulation_type(x));
  return {empty_like_map(x), at::empty_symint(gamma.sym_sizes(), options),
          at::empty_symint(gamma.sym_sizes(), options)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) {
  // x * scale + beta, and the scale, (B, C), which has no derivative: gamma * n + 1, where n is the response, the L2
  // norm of a channel's map, over its mean over channels.
  m.def("global_response_norm(Tensor x, Tensor gamma, Tensor beta, float eps) -> (Tensor output, Tensor scale)");
  // The output for a scale that is known. It has no derivative.
  m.def("_response_normed(Tensor x, Tensor scale, Tensor beta) -> Tensor");
  // With the response, (B, C), which the backward reads.
  m.def(
      "_response_norm(Tensor x, Tensor gamma, Tensor beta, float eps) -> "
      "(Tensor output, Tensor scale, Tensor response)");
  // Gradients of x, gamma and beta. Those of parameters have the accumulation type.
  m.def(
      "_response_norm_backward(Tensor grad_output, Tensor x, Tensor gamma, Tensor response, float eps) -> "
      "(Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(overlock_mm, Meta, m) {
  m.impl("global_response_norm", &global_response_norm_meta);
  m.impl("_response_normed", &response_normed_meta);
  m.impl("_response_norm", &response_norm_meta);
  m.impl("_response_norm_backward", &response_norm_backward_meta);
}

}  // namespace overlock_mm
