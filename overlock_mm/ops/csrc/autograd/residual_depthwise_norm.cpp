// Residual depth-wise convolution and response norm in one: for inference. It has no derivative, and says so if one is
// asked for.
#include "autograd.h"

namespace overlock_mm {
namespace {

using NormInPlace = void(Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, double);

auto norm_in_place() {
  static const auto op = operator_named<NormInPlace>("overlock_mm::residual_depthwise_norm_");
  return op;
}

void inplace_autograd(Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& gamma,
                      const Tensor& beta, double eps) {
  TORCH_CHECK_NOT_IMPLEMENTED(!wants_gradient(x, weight, bias.value_or(Tensor()), gamma, beta),
                              "derivative for overlock_mm::residual_depthwise_norm_ is not implemented");
  const at::AutoDispatchBelowAutograd below_autograd;
  norm_in_place().call(x, weight, bias, gamma, beta, eps);
}

/// Tells autograd that x has changed. (The fallback of torch does so only for operators that return what they change.)
void inplace_version(Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& gamma,
                     const Tensor& beta, double eps) {
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    norm_in_place().call(x, weight, bias, gamma, beta, eps);
  }
  x.unsafeGetTensorImpl()->bump_version();
}

/// For views with a sign that is not in memory. (PyTorch's fallback takes for granted that an operator returns what it
/// changes, and reads beyond its stack here.)
void inplace_negative(Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& gamma,
                      const Tensor& beta, double eps) {
  Tensor resolved = x.resolve_neg();
  const OptionalTensor shift = bias ? OptionalTensor(bias->resolve_neg()) : bias;
  norm_in_place().call(resolved, weight.resolve_neg(), shift, gamma.resolve_neg(), beta.resolve_neg(), eps);
  if (!resolved.is_same(x)) x.copy_(resolved);
}

void register_derivatives(torch::Library& m) {
  m.impl("residual_depthwise_norm", torch::autograd::autogradNotImplementedFallback());
  m.impl("residual_depthwise_norm_", &inplace_autograd);
}

}  // namespace

TORCH_LIBRARY_IMPL(overlock_mm, AutogradCPU, m) { register_derivatives(m); }
TORCH_LIBRARY_IMPL(overlock_mm, AutogradMeta, m) { register_derivatives(m); }
#if defined(OVERLOCK_MM_WITH_CUDA)
TORCH_LIBRARY_IMPL(overlock_mm, AutogradCUDA, m) { register_derivatives(m); }
#endif
TORCH_LIBRARY_IMPL(overlock_mm, Negative, m) { m.impl("residual_depthwise_norm_", &inplace_negative); }
TORCH_LIBRARY_IMPL(overlock_mm, ADInplaceOrView, m) { m.impl("residual_depthwise_norm_", &inplace_version); }

}  // namespace overlock_mm
