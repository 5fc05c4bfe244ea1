// GELU: schemas, and shapes for the meta device.
#include <torch/library.h>

#include "checks.h"

namespace overlock_mm {
namespace {

Tensor gelu_meta(const Tensor& x) {
  check_floating("x", x);
  return at::empty_like(x);
}

Tensor gelu_backward_meta(const Tensor& grad_output, const Tensor& x) {
  check_floating("x", x);
  check_grad_output(grad_output, x);
  return at::empty_like(x);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) {
  // The exact GELU, of a tensor of any shape.
  m.def("gelu(Tensor x) -> Tensor");
  m.def("_gelu_backward(Tensor grad_output, Tensor x) -> Tensor");
}

TORCH_LIBRARY_IMPL(overlock_mm, Meta, m) {
  m.impl("gelu", &gelu_meta);
  m.impl("_gelu_backward", &gelu_backward_meta);
}

}  // namespace overlock_mm
