// Derivatives of ContMix.
#include "../contmix_tensors.h"
#include "autograd.h"

namespace overlock_mm {
namespace {

OptionalTensor if_defined(const Variable& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : OptionalTensor();
}

class ContMixKeys : public torch::autograd::Function<ContMixKeys> {
 public:
  static Tensor forward(AutogradContext* context, const Variable& key, const Variable& proj_weight, int64_t num_groups,
                        double scale) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    context->save_for_backward({key, proj_weight});
    context->saved_data["scale"] = scale;
    return call_contmix_keys(key, proj_weight, num_groups, scale);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list out(4);  // num_groups and scale have no gradients
    if (!grads[0].defined()) return out;
    const auto saved = context->get_saved_variables();
    const std::array<bool, 2> wanted{context->needs_input_grad(0), context->needs_input_grad(1)};
    const auto [key, proj_weight] =
        call_contmix_keys_backward(grads[0], saved[0], saved[1], context->saved_data["scale"].toDouble(), wanted);
    if (wanted[0]) out[0] = key;
    if (wanted[1]) out[1] = proj_weight;
    return out;
  }
};

Tensor contmix_keys_autograd(const Tensor& key, const Tensor& proj_weight, int64_t num_groups, double scale) {
  return ContMixKeys::apply(key, proj_weight, num_groups, scale);
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
    context->set_materialize_grads(false);  // there is none of it
    return {output, logsumexp};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(8);  // as many as the arguments of forward
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

std::tuple<Tensor, Tensor> contmix_autograd(const Tensor& value, const Tensor& query, const Tensor& keys,
                                            const OptionalTensor& bias, const OptionalTensor& rpb_small,
                                            const OptionalTensor& rpb_large, int64_t small_kernel_size,
                                            int64_t large_kernel_size) {
  const variable_list out =
      ContMix::apply(value, query, keys, bias, rpb_small, rpb_large, small_kernel_size, large_kernel_size);
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(overlock_mm, Autograd, m) {
  m.impl("_contmix_keys", &contmix_keys_autograd);
  m.impl("_contmix_keys_backward", without_derivative());
  m.impl("_contmix", &contmix_autograd);
  m.impl("_contmix_backward", without_derivative());
}

}  // namespace overlock_mm
