// Derivative of GELU.
#include "autograd.h"

namespace overlock_mm {
namespace {

using Forward = Tensor(const Tensor&);
using Backward = Tensor(const Tensor&, const Tensor&);

Tensor call_below_autograd(const Tensor& x) {
  static const auto op = operator_named<Forward>("overlock_mm::gelu");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(x);
}

class Gelu : public torch::autograd::Function<Gelu> {
 public:
  static Variable forward(AutogradContext* context, const Variable& x) {
    context->save_for_backward({x});
    return call_below_autograd(x);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto op = operator_named<Backward>("overlock_mm::_gelu_backward");
    return {op.call(grads[0], context->get_saved_variables()[0])};
  }
};

Tensor gelu_autograd(const Tensor& x) { return wants_gradient(x) ? Gelu::apply(x) : call_below_autograd(x); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) { impl_autograd(m, "gelu", &gelu_autograd); }

TORCH_LIBRARY_IMPL(overlock_mm, Autograd, m) { m.impl("_gelu_backward", without_derivative()); }

}  // namespace overlock_mm
