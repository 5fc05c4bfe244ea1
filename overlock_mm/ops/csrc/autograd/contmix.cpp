#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "../contmix_tensors.h"

namespace overlock_mm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

OptionalTensor if_defined(const Variable& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : OptionalTensor();
}

class ContMix : public torch::autograd::Function<ContMix> {
 public:
  static variable_list forward(AutogradContext* context, const Variable& value, const Variable& query,
                               const Variable& keys, const OptionalTensor& bias, const OptionalTensor& rpb_small,
                               const OptionalTensor& rpb_large, int64_t small_kernel_size, int64_t large_kernel_size) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [output, logsumexp] =
        call_contmix(value, query, keys, bias, rpb_small, rpb_large, small_kernel_size, large_kernel_size);
    context->save_for_backward({value, query, keys, bias.value_or(Tensor()), rpb_small.value_or(Tensor()),
                                rpb_large.value_or(Tensor()), output, logsumexp});
    context->saved_data["kernel_sizes"] = std::vector<int64_t>{small_kernel_size, large_kernel_size};
    context->mark_non_differentiable({logsumexp});
    return {output, logsumexp};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto kernel_sizes = context->saved_data["kernel_sizes"].toIntVector();
    // Only the gradients that this backward needs. Arguments that are None have no edge.
    std::array<bool, 6> wanted;
    size_t edge = 0;
    for (size_t i = 0; i < wanted.size(); ++i) wanted[i] = saved[i].defined() && context->needs_input_grad(edge++);
    const auto [value, query, keys, bias, rpb_small, rpb_large] =
        call_contmix_backward(grads[0], saved[0], saved[1], saved[2], if_defined(saved[3]), if_defined(saved[4]),
                              if_defined(saved[5]), saved[6], saved[7], kernel_sizes[0], kernel_sizes[1], wanted);
    variable_list out{value, query, keys, bias, rpb_small, rpb_large};
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (!wanted[i]) out[i] = Variable();
    }
    // Kernel sizes have no gradients.
    out.insert(out.end(), 2, Variable());
    return out;
  }
};

class ContMixBackward : public torch::autograd::Function<ContMixBackward> {
 public:
  static variable_list forward(AutogradContext*, const Variable& grad_output, const Variable& value,
                               const Variable& query, const Variable& keys, const OptionalTensor& bias,
                               const OptionalTensor& rpb_small, const OptionalTensor& rpb_large, const Variable& output,
                               const Variable& logsumexp, int64_t small_kernel_size, int64_t large_kernel_size,
                               std::array<bool, 6> output_mask) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [grad_value, grad_query, grad_keys, grad_bias, grad_rpb_small, grad_rpb_large] =
        call_contmix_backward(grad_output, value, query, keys, bias, rpb_small, rpb_large, output, logsumexp,
                              small_kernel_size, large_kernel_size, output_mask);
    return {grad_value, grad_query, grad_keys, grad_bias, grad_rpb_small, grad_rpb_large};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false,
                "contmix: the compiled operator has no second derivative; overlock_mm.ops.contmix_reference, which "
                "takes the same "
                "arguments, has one");
  }
};

std::tuple<Tensor, Tensor> contmix_autograd(const Tensor& value, const Tensor& query, const Tensor& keys,
                                            const OptionalTensor& bias, const OptionalTensor& rpb_small,
                                            const OptionalTensor& rpb_large, int64_t small_kernel_size,
                                            int64_t large_kernel_size) {
  const variable_list out =
      ContMix::apply(value, query, keys, bias, rpb_small, rpb_large, small_kernel_size, large_kernel_size);
  return {out[0], out[1]};
}

ContMixGradients contmix_backward_autograd(const Tensor& grad_output, const Tensor& value, const Tensor& query,
                                           const Tensor& keys, const OptionalTensor& bias,
                                           const OptionalTensor& rpb_small, const OptionalTensor& rpb_large,
                                           const Tensor& output, const Tensor& logsumexp, int64_t small_kernel_size,
                                           int64_t large_kernel_size, std::array<bool, 6> output_mask) {
  const variable_list out = ContMixBackward::apply(grad_output, value, query, keys, bias, rpb_small, rpb_large, output,
                                                   logsumexp, small_kernel_size, large_kernel_size, output_mask);
  return {out[0], out[1], out[2], out[3], out[4], out[5]};
}

}  // namespace

TORCH_LIBRARY_IMPL(overlock_mm, Autograd, m) {
  m.impl("_contmix", &contmix_autograd);
  m.impl("_contmix_backward", &contmix_backward_autograd);
}

}  // namespace overlock_mm
