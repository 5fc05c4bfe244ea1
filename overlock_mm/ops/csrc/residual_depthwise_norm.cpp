// Residual depth-wise convolution and response norm in one, for inference: schemas, and shapes for the meta device.
#include <torch/library.h>

#include "checks.h"

namespace overlock_mm {
namespace {

Tensor residual_depthwise_norm_meta(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                    const Tensor& gamma, const Tensor& beta, double) {
  check_residual_depthwise_norm(x, weight, bias, gamma, beta);
  return empty_like_map(x);
}

void residual_depthwise_norm_inplace_meta(Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                          const Tensor& gamma, const Tensor& beta, double) {
  check_residual_depthwise_norm(x, weight, bias, gamma, beta);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) {
  // global_response_norm(x + conv(x, weight) + bias), with a 3 x 3 kernel.
  // The compiled operator has no derivative.
  m.def(
      "residual_depthwise_norm(Tensor x, Tensor weight, Tensor? bias, Tensor gamma, Tensor beta, float eps) "
      "-> Tensor");
  // It returns nothing: torch.compile refuses operators that return what they change.
  m.def(
      "residual_depthwise_norm_(Tensor(a!) x, Tensor weight, Tensor? bias, Tensor gamma, Tensor beta, float eps) "
      "-> ()");
}

TORCH_LIBRARY_IMPL(overlock_mm, Meta, m) {
  m.impl("residual_depthwise_norm", &residual_depthwise_norm_meta);
  m.impl("residual_depthwise_norm_", &residual_depthwise_norm_inplace_meta);
}

}  // namespace overlock_mm
