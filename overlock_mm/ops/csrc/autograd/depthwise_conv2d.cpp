// Derivatives of depth-wise convolutions.
#include "../checks.h"
#include "../cpu/onednn.h"
#include "autograd.h"

namespace overlock_mm {
namespace {

using Forward = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, int64_t, bool);
using Backward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, int64_t, bool,
                                                    std::array<bool, 3>);

Tensor call_below_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t dilation,
                           bool residual) {
  static const auto op = operator_named<Forward>("overlock_mm::depthwise_conv2d");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(x, weight, bias, dilation, residual);
}

class DepthwiseConv2d : public torch::autograd::Function<DepthwiseConv2d> {
 public:
  static Variable forward(AutogradContext* context, const Variable& x, const Variable& weight,
                          const OptionalTensor& bias, int64_t dilation, bool residual) {
    context->save_for_backward({x, weight});
    context->saved_data["dilation"] = dilation;
    context->saved_data["residual"] = residual;
    context->saved_data["bias_dtype"] = bias ? static_cast<int64_t>(bias->scalar_type()) : int64_t(-1);
    return call_below_autograd(x, weight, bias, dilation, residual);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto op = operator_named<Backward>("overlock_mm::_depthwise_conv2d_backward");
    const auto saved = context->get_saved_variables();
    const int64_t bias_dtype = context->saved_data["bias_dtype"].toInt();
    const bool has_bias = bias_dtype >= 0;
    const std::array<bool, 3> wanted{context->needs_input_grad(0), context->needs_input_grad(1),
                                     has_bias && context->needs_input_grad(2)};
    auto [x, weight, bias] = op.call(grads[0], saved[0], saved[1], context->saved_data["dilation"].toInt(),
                                     context->saved_data["residual"].toBool(), wanted);
    if (wanted[1]) weight = weight.to(saved[1].scalar_type());
    if (wanted[2]) bias = bias.to(static_cast<at::ScalarType>(bias_dtype));
    return {x, weight, bias, Variable(), Variable()};
  }
};

Tensor depthwise_conv2d_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t dilation,
                                 bool residual) {
  const bool differentiates = at::GradMode::is_enabled() && (x.requires_grad() || weight.requires_grad());
  if (!residual && cpu::onednn_is_fast_for_contiguous(x, weight, dilation, differentiates)) {
    check_depthwise_conv2d(x, weight, bias, dilation);
    return cpu::onednn_conv2d(x, weight, bias, dilation);
  }
  if (!wants_gradient(x, weight, bias.value_or(Tensor())))
    return call_below_autograd(x, weight, bias, dilation, residual);
  return DepthwiseConv2d::apply(x, weight, bias, dilation, residual);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) {
  impl_autograd(m, "depthwise_conv2d", &depthwise_conv2d_autograd, /*has_cuda=*/true);
}

TORCH_LIBRARY_IMPL(overlock_mm, Autograd, m) { m.impl("_depthwise_conv2d_backward", without_derivative()); }

}  // namespace overlock_mm
