// Depth-wise convolutions: schemas, and shapes for the meta device.
#include <torch/library.h>

#include "checks.h"

namespace overlock_mm {
namespace {

Tensor depthwise_conv2d_meta(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t dilation,
                             bool) {
  check_depthwise_conv2d(x, weight, bias, dilation);
  return empty_like_map(x);
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward_meta(const Tensor& grad_output, const Tensor& x,
                                                                  const Tensor& weight, int64_t dilation, bool,
                                                                  std::array<bool, 3> output_mask) {
  check_depthwise_conv2d(x, weight, OptionalTensor(), dilation);
  check_grad_output(grad_output, x);
  const auto options = x.options().dtype(accumulation_type(x));
  return {output_mask[0] ? empty_like_map(x) : Tensor(),
          output_mask[1] ? at::empty_symint(weight.sym_sizes(), options) : Tensor(),
          output_mask[2] ? at::empty_symint({weight.sym_size(0)}, options) : Tensor()};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) {
  // conv(x, weight) + bias, and + x if residual. Stride 1, same size.
  m.def("depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, int dilation, bool residual) -> Tensor");
  // Gradients of x, weight and bias, undefined where output_mask is false. Those of parameters have the accumulation
  // type.
  m.def(
      "_depthwise_conv2d_backward(Tensor grad_output, Tensor x, Tensor weight, int dilation, bool residual, "
      "bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(overlock_mm, Meta, m) {
  m.impl("depthwise_conv2d", &depthwise_conv2d_meta);
  m.impl("_depthwise_conv2d_backward", &depthwise_conv2d_backward_meta);
}

}  // namespace overlock_mm
