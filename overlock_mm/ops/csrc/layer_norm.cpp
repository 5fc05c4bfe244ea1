// Layer norms over the channels of a map: schemas, and shapes for the meta device.
#include <torch/library.h>

#include "checks.h"

namespace overlock_mm {
namespace {

Tensor layer_norm_meta(const Tensor& x, const Tensor& weight, const Tensor& bias, double) {
  check_layer_norm(x, weight, bias);
  return empty_like_map(x);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_with_statistics_meta(const Tensor& x, const Tensor& weight,
                                                                   const Tensor& bias, double) {
  check_layer_norm(x, weight, bias);
  const auto statistics = [&] {
    return at::empty_symint({x.sym_size(0), x.sym_size(2), x.sym_size(3)}, x.options().dtype(accumulation_type(x)));
  };
  return {empty_like_map(x), statistics(), statistics()};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_meta(const Tensor& grad_output, const Tensor& x,
                                                            const Tensor& weight, const Tensor& mean, const Tensor&,
                                                            const OptionalTensor& other_grad) {
  check_layer_norm(x, weight, weight);
  check_grad_output(grad_output, x);
  if (other_grad) check_other_map("other_grad", *other_grad, x);
  const auto parameter = [&] { return at::empty_symint(weight.sym_sizes(), mean.options()); };
  return {empty_like_map(x), parameter(), parameter()};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) {
  // Of every position by itself.
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor");
  // The same with the mean and the inverse of the standard deviation, (B, H, W) each, which the backward reads. They
  // have the accumulation type.
  m.def("_layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor output, Tensor mean, Tensor rstd)");
  // Gradients of x, weight and bias. Those of parameters have the accumulation type. other_grad is added to that of x.
  m.def(
      "_layer_norm_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor mean, Tensor rstd, "
      "Tensor? other_grad) -> "
      "(Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(overlock_mm, Meta, m) {
  m.impl("layer_norm", &layer_norm_meta);
  m.impl("_layer_norm", &layer_norm_with_statistics_meta);
  m.impl("_layer_norm_backward", &layer_norm_backward_meta);
}

}  // namespace overlock_mm
