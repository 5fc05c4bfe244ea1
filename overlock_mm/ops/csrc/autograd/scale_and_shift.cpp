// Derivatives of scales and shifts. They have kernels for CUDA alone: the CPU runs PyTorch's.
#include "autograd.h"

namespace overlock_mm {
namespace {

using Forward = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&);
using Backward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, bool);

Tensor call_below_autograd(const Tensor& x, const Tensor& scale, const OptionalTensor& shift,
                           const OptionalTensor& other) {
  static const auto op = operator_named<Forward>("overlock_mm::scale_and_shift");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(x, scale, shift, other);
}

class ScaleAndShift : public torch::autograd::Function<ScaleAndShift> {
 public:
  static Variable forward(AutogradContext* context, const Variable& x, const Variable& scale,
                          const OptionalTensor& shift, const OptionalTensor& other) {
    context->save_for_backward({x, scale});
    context->saved_data["shift_dtype"] = shift ? static_cast<int64_t>(shift->scalar_type()) : int64_t(-1);
    context->saved_data["has_other"] = other.has_value();
    return call_below_autograd(x, scale, shift, other);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto op = operator_named<Backward>("overlock_mm::_scale_and_shift_backward");
    const auto saved = context->get_saved_variables();
    const int64_t shift_dtype = context->saved_data["shift_dtype"].toInt();
    auto [x, scale, shift] = op.call(grads[0], saved[0], saved[1], shift_dtype >= 0);
    if (shift_dtype >= 0) shift = shift.to(static_cast<at::ScalarType>(shift_dtype));
    const Tensor other = context->saved_data["has_other"].toBool() ? grads[0] : Tensor();
    return {x, scale.to(saved[1].scalar_type()), shift, other};
  }
};

Tensor scale_and_shift_autograd(const Tensor& x, const Tensor& scale, const OptionalTensor& shift,
                                const OptionalTensor& other) {
  if (wants_gradient(x, scale, shift.value_or(Tensor()), other.value_or(Tensor())))
    return ScaleAndShift::apply(x, scale, shift, other);
  return call_below_autograd(x, scale, shift, other);
}

}  // namespace

#if defined(OVERLOCK_MM_WITH_CUDA)
TORCH_LIBRARY_IMPL(overlock_mm, AutogradCUDA, m) { m.impl("scale_and_shift", &scale_and_shift_autograd); }
#endif
TORCH_LIBRARY_IMPL(overlock_mm, AutogradMeta, m) { m.impl("scale_and_shift", &scale_and_shift_autograd); }

TORCH_LIBRARY_IMPL(overlock_mm, Autograd, m) { m.impl("_scale_and_shift_backward", without_derivative()); }

}  // namespace overlock_mm
