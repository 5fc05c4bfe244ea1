// Global response norms: schemas, and shapes for the meta device.
#include <torch/library.h>

#include "checks.h"

namespace overlock_mm {
namespace {

Tensor global_response_norm_meta(const Tensor& x, const Tensor& gamma, const Tensor& beta, double) {
  check_response_norm(x, gamma, beta);
  return empty_like_map(x);
}

std::tuple<Tensor, Tensor> response_norm_meta(const Tensor& x, const Tensor& gamma, const Tensor& beta, double) {
  check_response_norm(x, gamma, beta);
  const auto options = x.options().dtype(accumulation_type(x));
  return {empty_like_map(x), at::empty_symint({x.sym_size(0), x.sym_size(1)}, options)};
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
  // x * (gamma * n + 1) + beta, where n is the response, the L2 norm of a channel's map, over its mean over channels.
  m.def("global_response_norm(Tensor x, Tensor gamma, Tensor beta, float eps) -> Tensor");
  // The same with the response, (B, C), which the backward reads.
  m.def("_response_norm(Tensor x, Tensor gamma, Tensor beta, float eps) -> (Tensor output, Tensor response)");
  // Gradients of x, gamma and beta. Those of parameters have the accumulation type.
  m.def(
      "_response_norm_backward(Tensor grad_output, Tensor x, Tensor gamma, Tensor response, float eps) -> "
      "(Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(overlock_mm, Meta, m) {
  m.impl("global_response_norm", &global_response_norm_meta);
  m.impl("_response_norm", &response_norm_meta);
  m.impl("_response_norm_backward", &response_norm_backward_meta);
}

}  // namespace overlock_mm
