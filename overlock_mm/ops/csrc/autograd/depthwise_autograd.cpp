#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "../depthwise_tensors.h"

namespace overlock_mm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

/// The operator of that name, with the signature of a C++ function of its own.
template <typename Signature>
auto operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

/// Whether anything is to be noted for a backward. On a small map that takes longer than the convolution.
template <typename... Tensors>
bool wants_gradient(const Tensors&... tensors) {
  // A tangent of forward mode is for autograd to refuse.
  return (tensors._fw_grad(/*level=*/0).defined() || ...) ||
         (at::GradMode::is_enabled() && (tensors.requires_grad() || ...));
}

// One branch.

class DepthwiseConv2d : public torch::autograd::Function<DepthwiseConv2d> {
 public:
  static Tensor call(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, int64_t dilation,
                     bool residual, bool gelu) {
    static const auto op =
        operator_named<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, int64_t, bool, bool)>(
            "overlock_mm::_depthwise_conv2d");
    return op.call(input, weight, bias, dilation, residual, gelu);
  }

  static Variable forward(AutogradContext* context, const Variable& input, const Variable& weight,
                          const OptionalTensor& bias, int64_t dilation, bool residual, bool gelu) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    context->save_for_backward({input, weight});
    context->saved_data["dilation"] = dilation;
    context->saved_data["residual"] = residual;
    context->saved_data["gelu"] = gelu;
    context->saved_data["bias_dtype"] = bias ? static_cast<int64_t>(bias->scalar_type()) : int64_t(-1);
    return call(input, weight, bias, dilation, residual, gelu);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    static const auto op =
        operator_named<Three(const Tensor&, const Tensor&, const Tensor&, int64_t, bool, bool, std::array<bool, 3>)>(
            "overlock_mm::_depthwise_conv2d_backward");
    const int64_t bias_dtype = context->saved_data["bias_dtype"].toInt();
    const bool has_bias = bias_dtype >= 0;
    const std::array<bool, 3> wanted{context->needs_input_grad(0), context->needs_input_grad(1),
                                     has_bias && context->needs_input_grad(2)};
    auto [input, weight, bias] =
        op.call(grads[0], saved[0], saved[1], context->saved_data["dilation"].toInt(),
                context->saved_data["residual"].toBool(), context->saved_data["gelu"].toBool(), wanted);
    if (wanted[1]) weight = weight.to(saved[1].scalar_type());
    if (wanted[2]) bias = bias.to(static_cast<at::ScalarType>(bias_dtype));
    return {input, weight, bias, Variable(), Variable(), Variable()};
  }
};

// Branches with batch norms.

class BranchNorms : public torch::autograd::Function<BranchNorms> {
 public:
  static variable_list forward(AutogradContext* context, const Variable& input, const Variable& weights,
                               const Variable& norm_weights, const Variable& norm_biases, at::IntArrayRef kernel_sizes,
                               at::IntArrayRef dilations, double eps) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto op =
        operator_named<Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, at::IntArrayRef,
                             at::IntArrayRef, double)>("overlock_mm::_branch_norms");
    const auto [output, mean, variance] =
        op.call(input, weights, norm_weights, norm_biases, kernel_sizes, dilations, eps);
    context->save_for_backward({input, weights, norm_weights, mean, variance});
    context->saved_data["kernel_sizes"] = kernel_sizes.vec();
    context->saved_data["dilations"] = dilations.vec();
    context->saved_data["eps"] = eps;
    context->saved_data["bias_dtype"] = static_cast<int64_t>(norm_biases.scalar_type());
    context->mark_non_differentiable({mean, variance});
    return {output, mean, variance};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    static const auto op =
        operator_named<Four(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                            at::IntArrayRef, at::IntArrayRef, double)>("overlock_mm::_branch_norms_backward");
    const auto kernel_sizes = context->saved_data["kernel_sizes"].toIntVector();
    const auto dilations = context->saved_data["dilations"].toIntVector();
    const auto [input, weights, norm_weights, norm_biases] =
        op.call(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], kernel_sizes, dilations,
                context->saved_data["eps"].toDouble());
    const auto bias_dtype = static_cast<at::ScalarType>(context->saved_data["bias_dtype"].toInt());
    return {input,
            weights.to(saved[1].scalar_type()),
            norm_weights.to(saved[2].scalar_type()),
            norm_biases.to(bias_dtype),
            Variable(),
            Variable(),
            Variable()};
  }
};

// Response norms.

class ResponseNorm : public torch::autograd::Function<ResponseNorm> {
 public:
  static variable_list forward(AutogradContext* context, const Variable& input, const Variable& gamma,
                               const Variable& beta, double eps) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto op =
        operator_named<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, double)>(
            "overlock_mm::_response_norm");
    const auto [output, response] = op.call(input, gamma, beta, eps);
    context->save_for_backward({input, gamma, response});
    context->saved_data["eps"] = eps;
    context->saved_data["beta_dtype"] = static_cast<int64_t>(beta.scalar_type());
    context->mark_non_differentiable({response});
    return {output, response};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    static const auto op = operator_named<Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double)>(
        "overlock_mm::_response_norm_backward");
    const auto [input, gamma, beta] =
        op.call(grads[0], saved[0], saved[1], saved[2], context->saved_data["eps"].toDouble());
    const auto beta_dtype = static_cast<at::ScalarType>(context->saved_data["beta_dtype"].toInt());
    return {input, gamma.to(saved[1].scalar_type()), beta.to(beta_dtype), Variable()};
  }
};

Tensor depthwise_conv2d_autograd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                 int64_t dilation, bool residual, bool gelu) {
  if (!wants_gradient(input, weight, bias.value_or(Tensor()))) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return DepthwiseConv2d::call(input, weight, bias, dilation, residual, gelu);
  }
  return DepthwiseConv2d::apply(input, weight, bias, dilation, residual, gelu);
}

Three branch_norms_autograd(const Tensor& input, const Tensor& weights, const Tensor& norm_weights,
                            const Tensor& norm_biases, at::IntArrayRef kernel_sizes, at::IntArrayRef dilations,
                            double eps) {
  const variable_list out = BranchNorms::apply(input, weights, norm_weights, norm_biases, kernel_sizes, dilations, eps);
  return {out[0], out[1], out[2]};
}

std::tuple<Tensor, Tensor> response_norm_autograd(const Tensor& input, const Tensor& gamma, const Tensor& beta,
                                                  double eps) {
  const variable_list out = ResponseNorm::apply(input, gamma, beta, eps);
  return {out[0], out[1]};
}

using NormInPlace = void(Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, double, bool);

/// It has no derivative, and says so if one is asked for.
void residual_depthwise_norm_inplace_autograd(Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                              const Tensor& gamma, const Tensor& beta, double eps, bool gelu) {
  static const auto norm = operator_named<NormInPlace>("overlock_mm::_residual_depthwise_norm_");
  TORCH_CHECK_NOT_IMPLEMENTED(!wants_gradient(input, weight, bias.value_or(Tensor()), gamma, beta),
                              "derivative for overlock_mm::_residual_depthwise_norm_ is not implemented");
  const at::AutoDispatchBelowAutograd below_autograd;
  norm.call(input, weight, bias, gamma, beta, eps, gelu);
}

/// Lets autograd know that the input is not what it was. (torch's own fallback does that for operators that return what
/// they change, which torch.compile does not take.)
void residual_depthwise_norm_inplace_version(Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                             const Tensor& gamma, const Tensor& beta, double eps, bool gelu) {
  static const auto norm = operator_named<NormInPlace>("overlock_mm::_residual_depthwise_norm_");
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    norm.call(input, weight, bias, gamma, beta, eps, gelu);
  }
  input.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_IMPL(overlock_mm, Autograd, m) {
  // These have no derivative, and say so if one is asked for.
  for (const char* name : {"_depthwise_conv2d_backward", "_branch_norms_backward", "_response_norm_backward",
                           "_residual_depthwise_norm", "_transpose"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
  m.impl("_depthwise_conv2d", &depthwise_conv2d_autograd);
  m.impl("_branch_norms", &branch_norms_autograd);
  m.impl("_response_norm", &response_norm_autograd);
  m.impl("_residual_depthwise_norm_", &residual_depthwise_norm_inplace_autograd);
}

TORCH_LIBRARY_IMPL(overlock_mm, ADInplaceOrView, m) {
  m.impl("_residual_depthwise_norm_", &residual_depthwise_norm_inplace_version);
}

}  // namespace overlock_mm
