// Derivatives of GELU, residual depth-wise convolution and response norm in one.
#include "autograd.h"

namespace overlock_mm {
namespace {

using Norm = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                        const Tensor&, double);
using Forward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                                   const Tensor&, double);
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                                    const OptionalTensor&, const Tensor&, const Tensor&,
                                                                    double);

/// Of the maps, the backward keeps the input alone.
class GeluResidualDepthwiseNorm : public torch::autograd::Function<GeluResidualDepthwiseNorm> {
 public:
  static variable_list forward(AutogradContext* context, const Variable& x, const Variable& weight,
                               const OptionalTensor& bias, const Variable& gamma, const Variable& beta, double eps) {
    static const auto op = operator_named<Forward>("overlock_mm::_gelu_residual_depthwise_norm");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [output, scale, response] = op.call(x, weight, bias, gamma, beta, eps);
    context->save_for_backward({x, weight, bias.value_or(Tensor()), gamma, response});
    context->saved_data["eps"] = eps;
    context->saved_data["beta_dtype"] = static_cast<int64_t>(beta.scalar_type());
    context->mark_non_differentiable({scale});
    context->set_materialize_grads(false);  // there is none of it
    return {output, scale};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(6);  // as many as the arguments of forward
    static const auto op = operator_named<Backward>("overlock_mm::_gelu_residual_depthwise_norm_backward");
    const auto saved = context->get_saved_variables();
    const OptionalTensor saved_bias = saved[2].defined() ? OptionalTensor(saved[2]) : OptionalTensor();
    auto [x, weight, bias, gamma, beta] =
        op.call(grads[0], saved[0], saved[1], saved_bias, saved[3], saved[4], context->saved_data["eps"].toDouble());
    bias = saved_bias ? bias.to(saved_bias->scalar_type()) : Tensor();
    const auto beta_dtype = static_cast<at::ScalarType>(context->saved_data["beta_dtype"].toInt());
    return {x,         weight.to(saved[1].scalar_type()), bias, gamma.to(saved[3].scalar_type()), beta.to(beta_dtype),
            Variable()};
  }
};

std::tuple<Tensor, Tensor> gelu_norm_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                              const Tensor& gamma, const Tensor& beta, double eps) {
  if (wants_gradient(x, weight, bias.value_or(Tensor()), gamma, beta)) {
    const variable_list out = GeluResidualDepthwiseNorm::apply(x, weight, bias, gamma, beta, eps);
    return {out[0], out[1]};
  }
  static const auto op = operator_named<Norm>("overlock_mm::gelu_residual_depthwise_norm");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(x, weight, bias, gamma, beta, eps);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) {
  impl_autograd(m, "gelu_residual_depthwise_norm", &gelu_norm_autograd, /*has_cuda=*/true);
  impl_without_derivative(m, "_gelu_residual_depthwise_normed", /*has_cuda=*/true);
}

// These have no derivative, and say so if one is asked for.
TORCH_LIBRARY_IMPL(overlock_mm, Autograd, m) {
  m.impl("_gelu_residual_depthwise_norm", torch::autograd::autogradNotImplementedFallback());
  m.impl("_gelu_residual_depthwise_norm_backward", without_derivative());
}

}  // namespace overlock_mm
