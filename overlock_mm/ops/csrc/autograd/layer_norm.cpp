// Derivatives of layer norms. They have kernels for CUDA alone: the CPU runs PyTorch's.
#include "autograd.h"

namespace overlock_mm {
namespace {

using Norm = Tensor(const Tensor&, const Tensor&, const Tensor&, double);
using Forward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, double);
using Backward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                    const Tensor&, const OptionalTensor&);

class LayerNorm : public torch::autograd::Function<LayerNorm> {
 public:
  static Variable forward(AutogradContext* context, const Variable& x, const Variable& weight, const Variable& bias,
                          double eps) {
    static const auto op = operator_named<Forward>("overlock_mm::_layer_norm");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [output, mean, rstd] = op.call(x, weight, bias, eps);
    context->save_for_backward({x, weight, mean, rstd});
    context->saved_data["bias_dtype"] = static_cast<int64_t>(bias.scalar_type());
    return output;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto op = operator_named<Backward>("overlock_mm::_layer_norm_backward");
    const auto saved = context->get_saved_variables();
    const auto [x, weight, bias] = op.call(grads[0], saved[0], saved[1], saved[2], saved[3], OptionalTensor());
    const auto bias_dtype = static_cast<at::ScalarType>(context->saved_data["bias_dtype"].toInt());
    return {x, weight.to(saved[1].scalar_type()), bias.to(bias_dtype), Variable()};
  }
};

Tensor layer_norm_autograd(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  if (wants_gradient(x, weight, bias)) return LayerNorm::apply(x, weight, bias, eps);
  static const auto op = operator_named<Norm>("overlock_mm::layer_norm");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(x, weight, bias, eps);
}

}  // namespace

#if defined(OVERLOCK_MM_WITH_CUDA)
TORCH_LIBRARY_IMPL(overlock_mm, AutogradCUDA, m) { m.impl("layer_norm", &layer_norm_autograd); }
#endif
TORCH_LIBRARY_IMPL(overlock_mm, AutogradMeta, m) { m.impl("layer_norm", &layer_norm_autograd); }

// These have no derivative, and say so if one is asked for.
TORCH_LIBRARY_IMPL(overlock_mm, Autograd, m) {
  m.impl("_layer_norm", torch::autograd::autogradNotImplementedFallback());
  m.impl("_layer_norm_backward", without_derivative());
}

}  // namespace overlock_mm
