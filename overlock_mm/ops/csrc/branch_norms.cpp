// Branch norms, parallel depth-wise convolutions with a batch norm each: schemas, and shapes for the meta device.
#include <torch/library.h>

#include "checks.h"

namespace overlock_mm {
namespace {

std::tuple<Tensor, Tensor, Tensor> branch_norms_meta(const Tensor& x, at::TensorList weights,
                                                     at::TensorList norm_weights, at::TensorList norm_biases,
                                                     at::IntArrayRef dilations, double) {
  check_branch_norms(x, weights, norm_weights, dilations);
  check_norm_parameters("norm_biases", norm_biases, x, weights.size());
  const auto options = x.options().dtype(accumulation_type(x));
  const auto empty_statistics = [&] { return at::empty_symint({int64_t(weights.size()), x.sym_size(1)}, options); };
  return {empty_like_map(x), empty_statistics(), empty_statistics()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> branch_norms_backward_meta(const Tensor& grad_output, const Tensor& x,
                                                                      at::TensorList weights,
                                                                      at::TensorList norm_weights, const Tensor& mean,
                                                                      const Tensor& variance, at::IntArrayRef dilations,
                                                                      double) {
  check_branch_norms_backward(grad_output, x, weights, norm_weights, mean, variance, dilations);
  const auto options = x.options().dtype(accumulation_type(x));
  c10::SymInt taps = 0;
  for (const Tensor& weight : weights) taps += weight.sym_size(2) * weight.sym_size(3);
  const auto empty_statistics = [&] { return at::empty_symint(mean.sym_sizes(), options); };
  return {empty_like_map(x), at::empty_symint({x.sym_size(1), taps}, options), empty_statistics(), empty_statistics()};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) {
  // Sum over branches of batch_norm(conv(x)), with the statistics of the batch. mean and variance, the biased one:
  // (branches, C), of each branch's output.
  m.def(
      "branch_norms(Tensor x, Tensor[] weights, Tensor[] norm_weights, Tensor[] norm_biases, int[] dilations, "
      "float eps) -> (Tensor output, Tensor mean, Tensor variance)");
  // Gradients of x, of the kernels side by side, (C, sum of k * k), of norm_weights and of norm_biases, (branches, C).
  // Those of parameters have the accumulation type.
  m.def(
      "_branch_norms_backward(Tensor grad_output, Tensor x, Tensor[] weights, Tensor[] norm_weights, Tensor mean, "
      "Tensor variance, int[] dilations, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(overlock_mm, Meta, m) {
  m.impl("branch_norms", &branch_norms_meta);
  m.impl("_branch_norms_backward", &branch_norms_backward_meta);
}

}  // namespace overlock_mm
