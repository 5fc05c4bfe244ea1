// Derivatives of scaled sums. They have kernels for CUDA alone: the CPU runs PyTorch's.
#include "autograd.h"

namespace overlock_mm {
namespace {

using Forward = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&);
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                            const Tensor&);

Tensor call_below_autograd(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& other,
                           const Tensor& other_scale, const Tensor& other_shift) {
  static const auto op = operator_named<Forward>("overlock_mm::scaled_sum");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(x, scale, shift, other, other_scale, other_shift);
}

class ScaledSum : public torch::autograd::Function<ScaledSum> {
 public:
  static Variable forward(AutogradContext* context, const Variable& x, const Variable& scale, const Variable& shift,
                          const Variable& other, const Variable& other_scale, const Variable& other_shift) {
    context->save_for_backward({x, scale, other, other_scale});
    context->saved_data["shift_dtypes"] = std::vector<int64_t>{static_cast<int64_t>(shift.scalar_type()),
                                                               static_cast<int64_t>(other_shift.scalar_type())};
    return call_below_autograd(x, scale, shift, other, other_scale, other_shift);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto op = operator_named<Backward>("overlock_mm::_scaled_sum_backward");
    const auto saved = context->get_saved_variables();
    const auto shift_dtypes = context->saved_data["shift_dtypes"].toIntVector();
    const auto [x, other, scales, shift] = op.call(grads[0], saved[0], saved[1], saved[2], saved[3]);
    const auto shift_as = [&, &shift = shift](int i) { return shift.to(static_cast<at::ScalarType>(shift_dtypes[i])); };
    return {x,     scales[0].to(saved[1].scalar_type()), shift_as(0),
            other, scales[1].to(saved[3].scalar_type()), shift_as(1)};
  }
};

Tensor scaled_sum_autograd(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& other,
                           const Tensor& other_scale, const Tensor& other_shift) {
  if (wants_gradient(x, scale, shift, other, other_scale, other_shift))
    return ScaledSum::apply(x, scale, shift, other, other_scale, other_shift);
  return call_below_autograd(x, scale, shift, other, other_scale, other_shift);
}

}  // namespace

#if defined(OVERLOCK_MM_WITH_CUDA)
TORCH_LIBRARY_IMPL(overlock_mm, AutogradCUDA, m) { m.impl("scaled_sum", &scaled_sum_autograd); }
#endif
TORCH_LIBRARY_IMPL(overlock_mm, AutogradMeta, m) { m.impl("scaled_sum", &scaled_sum_autograd); }

TORCH_LIBRARY_IMPL(overlock_mm, Autograd, m) { m.impl("_scaled_sum_backward", without_derivative()); }

}  // namespace overlock_mm
