// Branch norms, parallel depth-wise convolutions with a batch norm each: schemas, and shapes for the meta device.
#include <torch/library.h>

#include "checks.h"

namespace overlock_mm {
namespace {

// Outputs, not initialised.

/// (branches, C).
Tensor empty_statistics(const Tensor& x, at::TensorList weights) {
  return at::empty_symint({int64_t(weights.size()), x.sym_size(1)}, x.options().dtype(accumulation_type(x)));
}

/// Gradients of the kernels, one after the other: (C * sum of k * k).
Tensor empty_grad_weights(const Tensor& x, at::TensorList weights) {
  c10::SymInt taps = 0;
  for (const Tensor& weight : weights) taps += weight.sym_size(2) * weight.sym_size(3);
  return at::empty_symint({x.sym_size(1) * taps}, x.options().dtype(accumulation_type(x)));
}

std::tuple<Tensor, Tensor, Tensor> branch_norms_meta(const Tensor& x, at::TensorList weights,
                                                     at::TensorList norm_weights, at::TensorList norm_biases,
                                                     at::IntArrayRef dilations, double) {
  check_branch_norms(x, weights, norm_weights, dilations);
  check_norm_parameters("norm_biases", norm_biases, x, weights.size());
  return {empty_like_map(x), empty_statistics(x, weights), empty_statistics(x, weights)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> branch_norms_backward_meta(const Tensor& grad_output, const Tensor& x,
                                                                      at::TensorList weights,
                                                                      at::TensorList norm_weights, const Tensor& mean,
                                                                      const Tensor& variance, at::IntArrayRef dilations,
                                                                      double) {
  check_branch_norms_backward(grad_output, x, weights, norm_weights, mean, variance, dilations);
  return {empty_like_map(x), empty_grad_weights(x, weights), empty_statistics(x, weights),
          empty_statistics(x, weights)};
}

std::tuple<Tensor, Tensor> branch_statistics_meta(const Tensor& x, at::TensorList weights, at::IntArrayRef dilations) {
  check_branches(x, weights, dilations);
  return {empty_statistics(x, weights), empty_statistics(x, weights)};
}

Tensor branch_norms_given_meta(const Tensor& x, at::TensorList weights, at::TensorList norm_weights,
                               at::TensorList norm_biases, const Tensor& mean, const Tensor& variance,
                               at::IntArrayRef dilations, double) {
  check_branch_norms_given(x, weights, norm_weights, norm_biases, mean, variance, dilations);
  return empty_like_map(x);
}

std::tuple<Tensor, Tensor> branch_norms_sums_meta(const Tensor& grad_output, const Tensor& x, at::TensorList weights,
                                                  const Tensor& mean, at::IntArrayRef dilations) {
  check_branch_norms_sums(grad_output, x, weights, mean, dilations);
  return {at::empty_symint({x.sym_size(1)}, x.options().dtype(accumulation_type(x))), empty_statistics(x, weights)};
}

std::tuple<Tensor, Tensor> branch_norms_gradients_meta(const Tensor& grad_output, const Tensor& x,
                                                       at::TensorList weights, at::TensorList norm_weights,
                                                       const Tensor& mean, const Tensor& variance,
                                                       const Tensor& grad_mean, const Tensor& product_mean,
                                                       at::IntArrayRef dilations, double) {
  check_branch_norms_gradients(grad_output, x, weights, norm_weights, mean, variance, grad_mean, product_mean,
                               dilations);
  return {empty_like_map(x), empty_grad_weights(x, weights)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) {
  // Sum over branches of batch_norm(conv(x)), with the statistics of the batch. mean and variance, the biased one:
  // (branches, C), of each branch's output.
  m.def(
      "branch_norms(Tensor x, Tensor[] weights, Tensor[] norm_weights, Tensor[] norm_biases, int[] dilations, "
      "float eps) -> (Tensor output, Tensor mean, Tensor variance)");
  // Gradients of x, of the kernels, one after the other, (C * sum of k * k), of norm_weights and of norm_biases,
  // (branches, C). Those of parameters have the accumulation type. A part of the second is the gradient of a kernel as
  // it is, dense: autograd does not copy it.
  m.def(
      "_branch_norms_backward(Tensor grad_output, Tensor x, Tensor[] weights, Tensor[] norm_weights, Tensor mean, "
      "Tensor variance, int[] dilations, float eps) -> (Tensor, Tensor, Tensor, Tensor)");

  // The same in parts, between which processes exchange what they found (overlock_mm/ops/sync_norms.py). The batch is
  // that of all processes, of N values for each channel. y is a branch's output.
  //
  // Mean and biased variance of y in this process, (branches, C).
  m.def("_branch_statistics(Tensor x, Tensor[] weights, int[] dilations) -> (Tensor mean, Tensor variance)");
  // The output, with the statistics of the batch.
  m.def(
      "_branch_norms_given(Tensor x, Tensor[] weights, Tensor[] norm_weights, Tensor[] norm_biases, Tensor mean, "
      "Tensor variance, int[] dilations, float eps) -> Tensor");
  // Sums over this process: of grad_output, (C), and of grad_output * (y - mean), (branches, C).
  m.def(
      "_branch_norms_sums(Tensor grad_output, Tensor x, Tensor[] weights, Tensor mean, int[] dilations) -> "
      "(Tensor grad_sum, Tensor products)");
  // Gradients of x and of the kernels, one after the other, from those sums over the batch, divided by N.
  m.def(
      "_branch_norms_gradients(Tensor grad_output, Tensor x, Tensor[] weights, Tensor[] norm_weights, Tensor mean, "
      "Tensor variance, Tensor grad_mean, Tensor product_mean, int[] dilations, float eps) -> "
      "(Tensor grad_x, Tensor grad_weights)");
}

TORCH_LIBRARY_IMPL(overlock_mm, Meta, m) {
  m.impl("branch_norms", &branch_norms_meta);
  m.impl("_branch_norms_backward", &branch_norms_backward_meta);
  m.impl("_branch_statistics", &branch_statistics_meta);
  m.impl("_branch_norms_given", &branch_norms_given_meta);
  m.impl("_branch_norms_sums", &branch_norms_sums_meta);
  m.impl("_branch_norms_gradients", &branch_norms_gradients_meta);
}

}  // namespace overlock_mm
