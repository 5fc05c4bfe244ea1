// The sum of two maps, each with a scale and a shift for each channel: schemas, and shapes for the meta device.
#include <torch/library.h>

#include "checks.h"

namespace overlock_mm {
namespace {

Tensor empty_map(const Tensor& x) {
  return at::empty_symint(x.sym_sizes(), x.options(), at::MemoryFormat::ChannelsLast);
}

Tensor scaled_sum_meta(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& other,
                       const Tensor& other_scale, const Tensor& other_shift) {
  check_scaled_sum(x, scale, shift, other, other_scale, other_shift);
  return empty_map(x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scaled_sum_backward_meta(const Tensor& grad_output, const Tensor& x,
                                                                    const Tensor& scale, const Tensor& other,
                                                                    const Tensor& other_scale) {
  check_scaled_sum(x, scale, scale, other, other_scale, other_scale);
  check_grad_output(grad_output, x);
  const auto options = x.options().dtype(accumulation_type(x));
  return {empty_map(x), empty_map(x), at::empty_symint({2, x.sym_size(1)}, options),
          at::empty_symint({x.sym_size(1)}, options)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) {
  // x * scale + shift + other * other_scale + other_shift, channels_last. Parameters are (C).
  m.def(
      "scaled_sum(Tensor x, Tensor scale, Tensor shift, Tensor other, Tensor other_scale, Tensor other_shift) -> "
      "Tensor");
  // Gradients of x and other, channels_last; of both scales, (2, C); and of either shift. The last two have the
  // accumulation type.
  m.def(
      "_scaled_sum_backward(Tensor grad_output, Tensor x, Tensor scale, Tensor other, Tensor other_scale) -> "
      "(Tensor grad_x, Tensor grad_other, Tensor grad_scales, Tensor grad_shift)");
}

TORCH_LIBRARY_IMPL(overlock_mm, Meta, m) {
  m.impl("scaled_sum", &scaled_sum_meta);
  m.impl("_scaled_sum_backward", &scaled_sum_backward_meta);
}

}  // namespace overlock_mm
