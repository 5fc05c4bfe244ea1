// A scale and a shift for each channel of a map: schemas, and shapes for the meta device.
#include <torch/library.h>

#include "checks.h"

namespace overlock_mm {
namespace {

Tensor scale_and_shift_meta(const Tensor& x, const Tensor& scale, const OptionalTensor& shift,
                            const OptionalTensor& other) {
  check_scale_and_shift(x, scale, shift, other);
  return empty_like_map(x);
}

std::tuple<Tensor, Tensor, Tensor> scale_and_shift_backward_meta(const Tensor& grad_output, const Tensor& x,
                                                                 const Tensor& scale, bool has_shift) {
  check_scale_and_shift(x, scale, OptionalTensor(), OptionalTensor());
  check_grad_output(grad_output, x);
  const auto options = x.options().dtype(accumulation_type(x));
  return {empty_like_map(x), at::empty_symint(scale.sym_sizes(), options),
          has_shift ? at::empty_symint({x.sym_size(1)}, options) : Tensor()};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) {
  // x * scale + shift + other. scale is (C), or (B, C), beside which there is no shift. other is a map.
  m.def("scale_and_shift(Tensor x, Tensor scale, Tensor? shift, Tensor? other) -> Tensor");
  // Gradients of x, scale and shift. Those of parameters have the accumulation type.
  m.def(
      "_scale_and_shift_backward(Tensor grad_output, Tensor x, Tensor scale, bool has_shift) -> "
      "(Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(overlock_mm, Meta, m) {
  m.impl("scale_and_shift", &scale_and_shift_meta);
  m.impl("_scale_and_shift_backward", &scale_and_shift_backward_meta);
}

}  // namespace overlock_mm
