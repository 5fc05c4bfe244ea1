// Derivatives of global response norms.
#include "autograd.h"

namespace overlock_mm {
namespace {

using Norm = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, double);
using Forward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, double);
using Backward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double);

class ResponseNorm : public torch::autograd::Function<ResponseNorm> {
 public:
  static variable_list forward(AutogradContext* context, const Variable& x, const Variable& gamma, const Variable& beta,
                               double eps) {
    static const auto op = operator_named<Forward>("overlock_mm::_response_norm");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [output, scale, response] = op.call(x, gamma, beta, eps);
    context->save_for_backward({x, gamma, response});
    context->saved_data["eps"] = eps;
    context->saved_data["beta_dtype"] = static_cast<int64_t>(beta.scalar_type());
    context->mark_non_differentiable({scale});
    context->set_materialize_grads(false);  // there is none of it
    return {output, scale};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(4);  // as many as the arguments of forward
    static const auto op = operator_named<Backward>("overlock_mm::_response_norm_backward");
    const auto saved = context->get_saved_variables();
    const auto [x, gamma, beta] =
        op.call(grads[0], saved[0], saved[1], saved[2], context->saved_data["eps"].toDouble());
    const auto beta_dtype = static_cast<at::ScalarType>(context->saved_data["beta_dtype"].toInt());
    return {x, gamma.to(saved[1].scalar_type()), beta.to(beta_dtype), Variable()};
  }
};

std::tuple<Tensor, Tensor> global_response_norm_autograd(const Tensor& x, const Tensor& gamma, const Tensor& beta,
                                                         double eps) {
  if (wants_gradient(x, gamma, beta)) {
    const variable_list out = ResponseNorm::apply(x, gamma, beta, eps);
    return {out[0], out[1]};
  }
  static const auto op = operator_named<Norm>("overlock_mm::global_response_norm");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(x, gamma, beta, eps);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) {
  impl_autograd(m, "global_response_norm", &global_response_norm_autograd, /*has_cuda=*/true);
  impl_without_derivative(m, "_response_normed", /*has_cuda=*/true);
}

// These have no derivative, and say so if one is asked for.
TORCH_LIBRARY_IMPL(overlock_mm, Autograd, m) {
  m.impl("_response_norm", torch::autograd::autogradNotImplementedFallback());
  m.impl("_response_norm_backward", without_derivative());
}

}  // namespace overlock_mm
