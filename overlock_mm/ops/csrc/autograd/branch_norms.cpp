// Derivatives of branch norms.
#include "autograd.h"

namespace overlock_mm {
namespace {

using Forward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, at::TensorList, at::TensorList, at::TensorList,
                                                   at::IntArrayRef, double);
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, at::TensorList,
                                                            at::TensorList, const Tensor&, const Tensor&,
                                                            at::IntArrayRef, double);

class BranchNorms : public torch::autograd::Function<BranchNorms> {
 public:
  static variable_list forward(AutogradContext* context, const Variable& x, at::TensorList weights,
                               at::TensorList norm_weights, at::TensorList norm_biases, at::IntArrayRef dilations,
                               double eps) {
    static const auto op = operator_named<Forward>("overlock_mm::branch_norms");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [output, mean, variance] = op.call(x, weights, norm_weights, norm_biases, dilations, eps);
    // Parameters, which live anyway, and not the kernels side by side, which would be a copy.
    variable_list saved{x, mean, variance};
    saved.insert(saved.end(), weights.begin(), weights.end());
    saved.insert(saved.end(), norm_weights.begin(), norm_weights.end());
    context->save_for_backward(std::move(saved));
    context->saved_data["dilations"] = dilations.vec();
    context->saved_data["eps"] = eps;
    std::vector<int64_t> bias_dtypes;
    for (const Tensor& bias : norm_biases) bias_dtypes.push_back(static_cast<int64_t>(bias.scalar_type()));
    context->saved_data["bias_dtypes"] = std::move(bias_dtypes);
    context->mark_non_differentiable({mean, variance});
    context->set_materialize_grads(false);  // of the statistics there are none
    return {output, mean, variance};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto op = operator_named<Backward>("overlock_mm::_branch_norms_backward");
    const auto saved = context->get_saved_variables();
    const auto dilations = context->saved_data["dilations"].toIntVector();
    const auto bias_dtypes = context->saved_data["bias_dtypes"].toIntVector();
    const size_t branches = dilations.size();
    if (!grads[0].defined()) return variable_list(1 + 3 * branches + 2);
    const at::TensorList weights(saved.data() + 3, branches), norm_weights(saved.data() + 3 + branches, branches);
    const auto [x, kernels, scales, shifts] = op.call(grads[0], saved[0], weights, norm_weights, saved[1], saved[2],
                                                      dilations, context->saved_data["eps"].toDouble());
    variable_list out{x};
    c10::SymInt first = 0;
    for (const Tensor& weight : weights) {
      const Tensor own = kernels.narrow_symint(0, first, weight.sym_numel()).view_symint(weight.sym_sizes());
      out.push_back(own.to(weight.scalar_type()));
      first += weight.sym_numel();
    }
    for (size_t i = 0; i < branches; ++i) out.push_back(scales.select(0, i).to(norm_weights[i].scalar_type()));
    for (size_t i = 0; i < branches; ++i)
      out.push_back(shifts.select(0, i).to(static_cast<at::ScalarType>(bias_dtypes[i])));
    out.resize(out.size() + 2);  // dilations and eps have no gradient
    return out;
  }
};

std::tuple<Tensor, Tensor, Tensor> branch_norms_autograd(const Tensor& x, at::TensorList weights,
                                                         at::TensorList norm_weights, at::TensorList norm_biases,
                                                         at::IntArrayRef dilations, double eps) {
  const variable_list out = BranchNorms::apply(x, weights, norm_weights, norm_biases, dilations, eps);
  return {out[0], out[1], out[2]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) {
  impl_autograd(m, "branch_norms", &branch_norms_autograd, /*has_cuda=*/true);
  for (const char* name :
       {"_branch_statistics", "_branch_norms_given", "_branch_norms_sums", "_branch_norms_gradients"}) {
    impl_without_derivative(m, name, /*has_cuda=*/true);
  }
}

TORCH_LIBRARY_IMPL(overlock_mm, Autograd, m) { m.impl("_branch_norms_backward", without_derivative()); }

}  // namespace overlock_mm
