// Squeeze-excitation: schemas, and shapes for the meta device.
#include <torch/library.h>

#include "checks.h"

namespace overlock_mm {
namespace {

Tensor gated_meta(const Tensor& x, const Tensor& gate, const OptionalTensor& other) {
  check_gated(x, gate, other);
  return empty_like_map(x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> squeeze_excitation_with_means_meta(
    const Tensor& x, const Tensor& reduce_weight, const Tensor& reduce_bias, const Tensor& expand_weight,
    const Tensor& expand_bias, const OptionalTensor& other) {
  check_squeeze_excitation(x, reduce_weight, reduce_bias, expand_weight, expand_bias, other);
  const auto of_images = [&](const c10::SymInt& channels) {
    return at::empty_symint({x.sym_size(0), channels}, x.options().dtype(accumulation_type(x)));
  };
  return {empty_like_map(x), of_images(x.sym_size(1)), of_images(x.sym_size(1)), of_images(reduce_bias.sym_size(0))};
}

std::tuple<Tensor, Tensor> squeeze_excitation_meta(const Tensor& x, const Tensor& reduce_weight,
                                                   const Tensor& reduce_bias, const Tensor& expand_weight,
                                                   const Tensor& expand_bias, const OptionalTensor& other) {
  const auto [output, gate, mean, squeezed] =
      squeeze_excitation_with_means_meta(x, reduce_weight, reduce_bias, expand_weight, expand_bias, other);
  return {output, gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> squeeze_excitation_backward_meta(
    const Tensor& grad_output, const Tensor& x, const Tensor& reduce_weight, const Tensor& expand_weight,
    const OptionalTensor& other, const Tensor& gate, const Tensor& mean, const Tensor& squeezed) {
  check_gated(x, gate, other);
  check_grad_output(grad_output, x);
  const auto empty = [&](c10::SymIntArrayRef shape) {
    return at::empty_symint(shape, x.options().dtype(accumulation_type(x)));
  };
  return {empty_like_map(x),
          empty(reduce_weight.sym_sizes()),
          empty({reduce_weight.sym_size(0)}),
          empty(expand_weight.sym_sizes()),
          empty({expand_weight.sym_size(0)}),
          other ? empty_like_map(x) : Tensor()};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) {
  // x * gate, where gate, (B, C), is sigmoid(expand(gelu(reduce(mean of x over the positions)))); and * silu(other),
  // where other is a map. The gate that is returned has no derivative.
  m.def(
      "squeeze_excitation(Tensor x, Tensor reduce_weight, Tensor reduce_bias, Tensor expand_weight, "
      "Tensor expand_bias, Tensor? other) -> (Tensor output, Tensor gate)");
  // The output for a gate that is known. It has no derivative.
  m.def("_gated(Tensor x, Tensor gate, Tensor? other) -> Tensor");
  // With what the backward reads: the mean, (B, C), and what goes into the GELU, (B, R).
  m.def(
      "_squeeze_excitation(Tensor x, Tensor reduce_weight, Tensor reduce_bias, Tensor expand_weight, "
      "Tensor expand_bias, Tensor? other) -> (Tensor output, Tensor gate, Tensor mean, Tensor squeezed)");
  // Gradients of x, reduce_weight, reduce_bias, expand_weight, expand_bias and other. Those of parameters have the
  // accumulation type.
  m.def(
      "_squeeze_excitation_backward(Tensor grad_output, Tensor x, Tensor reduce_weight, Tensor expand_weight, "
      "Tensor? other, Tensor gate, Tensor mean, Tensor squeezed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(overlock_mm, Meta, m) {
  m.impl("squeeze_excitation", &squeeze_excitation_meta);
  m.impl("_gated", &gated_meta);
  m.impl("_squeeze_excitation", &squeeze_excitation_with_means_meta);
  m.impl("_squeeze_excitation_backward", &squeeze_excitation_backward_meta);
}

}  // namespace overlock_mm
