// Derivatives of squeeze-excitation. It has kernels for CUDA alone: the CPU runs PyTorch's.
#include "autograd.h"

namespace overlock_mm {
namespace {

using Excitation = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                              const OptionalTensor&);
using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                           const Tensor&, const OptionalTensor&);
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                                            const Tensor&, const OptionalTensor&,
                                                                            const Tensor&, const Tensor&,
                                                                            const Tensor&);

/// Of the maps, the backward keeps the inputs alone.
class SqueezeExcitation : public torch::autograd::Function<SqueezeExcitation> {
 public:
  static variable_list forward(AutogradContext* context, const Variable& x, const Variable& reduce_weight,
                               const Variable& reduce_bias, const Variable& expand_weight, const Variable& expand_bias,
                               const OptionalTensor& other) {
    static const auto op = operator_named<Forward>("overlock_mm::_squeeze_excitation");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [output, gate, mean, squeezed] =
        op.call(x, reduce_weight, reduce_bias, expand_weight, expand_bias, other);
    context->save_for_backward({x, reduce_weight, expand_weight, other.value_or(Tensor()), gate, mean, squeezed});
    context->saved_data["bias_dtypes"] = std::vector<int64_t>{static_cast<int64_t>(reduce_bias.scalar_type()),
                                                              static_cast<int64_t>(expand_bias.scalar_type())};
    context->mark_non_differentiable({gate});
    context->set_materialize_grads(false);  // there is none of it
    return {output, gate};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(6);  // as many as the arguments of forward
    static const auto op = operator_named<Backward>("overlock_mm::_squeeze_excitation_backward");
    const auto saved = context->get_saved_variables();
    const auto bias_dtypes = context->saved_data["bias_dtypes"].toIntVector();
    const OptionalTensor saved_other = saved[3].defined() ? OptionalTensor(saved[3]) : OptionalTensor();
    const auto [x, reduce_weight, reduce_bias, expand_weight, expand_bias, other] =
        op.call(grads[0], saved[0], saved[1], saved[2], saved_other, saved[4], saved[5], saved[6]);
    return {x,
            reduce_weight.to(saved[1].scalar_type()),
            reduce_bias.to(static_cast<at::ScalarType>(bias_dtypes[0])),
            expand_weight.to(saved[2].scalar_type()),
            expand_bias.to(static_cast<at::ScalarType>(bias_dtypes[1])),
            other};
  }
};

std::tuple<Tensor, Tensor> squeeze_excitation_autograd(const Tensor& x, const Tensor& reduce_weight,
                                                       const Tensor& reduce_bias, const Tensor& expand_weight,
                                                       const Tensor& expand_bias, const OptionalTensor& other) {
  if (wants_gradient(x, reduce_weight, reduce_bias, expand_weight, expand_bias, other.value_or(Tensor()))) {
    const variable_list out =
        SqueezeExcitation::apply(x, reduce_weight, reduce_bias, expand_weight, expand_bias, other);
    return {out[0], out[1]};
  }
  static const auto op = operator_named<Excitation>("overlock_mm::squeeze_excitation");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(x, reduce_weight, reduce_bias, expand_weight, expand_bias, other);
}

}  // namespace

#if defined(OVERLOCK_MM_WITH_CUDA)
TORCH_LIBRARY_IMPL(overlock_mm, AutogradCUDA, m) {
  m.impl("squeeze_excitation", &squeeze_excitation_autograd);
  m.impl("_gated", without_derivative());
}
#endif
TORCH_LIBRARY_IMPL(overlock_mm, AutogradMeta, m) {
  m.impl("squeeze_excitation", &squeeze_excitation_autograd);
  m.impl("_gated", without_derivative());
}

// These have no derivative, and say so if one is asked for.
TORCH_LIBRARY_IMPL(overlock_mm, Autograd, m) {
  m.impl("_squeeze_excitation", torch::autograd::autogradNotImplementedFallback());
  m.impl("_squeeze_excitation_backward", without_derivative());
}

}  // namespace overlock_mm
