// ContMix: schemas, the part that is the same on every device with kernels, and shapes for the meta device.
#include <torch/library.h>

#include "checks.h"
#include "contmix_tensors.h"

namespace overlock_mm {
namespace {

/// Context tokens (B, Cq, S, S) as rows of channels, (B, S², Cq). Channels_last ones are not copied.
Tensor rows_of(const Tensor& key) {
  return key.permute({0, 2, 3, 1})
      .reshape_symint({key.sym_size(0), key.sym_size(2) * key.sym_size(3), key.sym_size(1)});
}

Tensor for_each_image(const Tensor& matrix, const Tensor& key) {
  return matrix.unsqueeze(0).expand_symint({key.sym_size(0), matrix.sym_size(0), matrix.sym_size(1)});
}

/// scale * a b, of each image.
Tensor scaled_product(const Tensor& a, const Tensor& b, double scale) {
  // With beta = 0 the memory of the output is not read.
  return at::empty_symint({a.sym_size(0), a.sym_size(1), b.sym_size(2)}, a.options()).baddbmm_(a, b, 0, scale);
}

Tensor contmix_keys(const Tensor& key, const Tensor& proj_weight, int64_t num_groups, double scale) {
  const Tensor keys = scaled_product(for_each_image(proj_weight, key), rows_of(key), scale);  // (B, L, Cq)
  return keys.view_symint({keys.sym_size(0), keys.sym_size(1), num_groups, keys.sym_size(2) / num_groups})
      .transpose(1, 2)
      .contiguous();
}

std::tuple<Tensor, Tensor> contmix_keys_backward(const Tensor& grad_keys, const Tensor& key, const Tensor& proj_weight,
                                                 double scale, std::array<bool, 2> output_mask) {
  const Tensor grad = grad_keys.transpose(1, 2).flatten(2);  // (B, L, Cq). _contmix_backward has this layout: no copy
  Tensor grad_key = at::empty({0}, key.options()), grad_weight = at::empty({0}, key.options());
  if (output_mask[0]) {
    grad_key = scaled_product(for_each_image(proj_weight, key).transpose(1, 2), grad, scale)  // (B, S², Cq)
                   .view_symint({key.sym_size(0), key.sym_size(2), key.sym_size(3), key.sym_size(1)})
                   .permute({0, 3, 1, 2})
                   .contiguous(memory_format_of(key));
  }
  if (output_mask[1]) grad_weight = scaled_product(grad, rows_of(key).transpose(1, 2), scale).sum(at::IntArrayRef{0});
  return {grad_key, grad_weight};
}

/// z = W_d (s kᵀ q) + b = (s W_d kᵀ) q + b, with the scale s: with the folded keys M = s W_d kᵀ, the work at a position
/// does not depend on the number of context tokens.
Tensor contmix(const Tensor& value, const Tensor& query, const Tensor& key, const Tensor& proj_weight,
               const OptionalTensor& proj_bias, const OptionalTensor& rpb_small, const OptionalTensor& rpb_large,
               int64_t num_groups, int64_t small_kernel_size, int64_t large_kernel_size, double scale) {
  check_contmix(value, query, key, proj_weight, proj_bias, rpb_small, rpb_large, num_groups, small_kernel_size,
                large_kernel_size);

  const at::ScalarType dtype = accumulation_type(value);
  const auto converted = [&](const OptionalTensor& tensor) {
    return tensor ? OptionalTensor(tensor->to(dtype)) : OptionalTensor();
  };
  const Tensor keys = call_contmix_keys(key.to(dtype), proj_weight.to(dtype), num_groups, scale);
  return std::get<0>(call_contmix(value, query, keys, converted(proj_bias), converted(rpb_small), converted(rpb_large),
                                  small_kernel_size, large_kernel_size));
}

std::tuple<Tensor, Tensor> contmix_meta(const Tensor& value, const Tensor& query, const Tensor& keys,
                                        const OptionalTensor& bias, const OptionalTensor& rpb_small,
                                        const OptionalTensor& rpb_large, int64_t small_kernel_size,
                                        int64_t large_kernel_size) {
  check_contmix_keys(value, query, keys, bias, rpb_small, rpb_large, small_kernel_size, large_kernel_size);
  return {
      empty_like_map(value),
      at::empty_symint({value.sym_size(0), 2, keys.sym_size(1), value.sym_size(2), value.sym_size(3)}, keys.options())};
}

ContMixGradients contmix_backward_meta(const Tensor& grad_output, const Tensor& value, const Tensor& query,
                                       const Tensor& keys, const OptionalTensor& bias, const OptionalTensor& rpb_small,
                                       const OptionalTensor& rpb_large, const Tensor& output, const Tensor& logsumexp,
                                       int64_t small_kernel_size, int64_t large_kernel_size,
                                       std::array<bool, 6> output_mask) {
  check_contmix_keys(value, query, keys, bias, rpb_small, rpb_large, small_kernel_size, large_kernel_size);
  check_contmix_backward(grad_output, value, keys, output, logsumexp);
  const auto empty = [&](int i, c10::SymIntArrayRef sizes) {
    return output_mask[i] ? at::empty_symint(sizes, keys.options()) : at::empty({0}, keys.options());
  };
  const auto empty_map = [&](int i, const Tensor& map) {
    return output_mask[i] ? empty_like_map(map) : at::empty({0}, keys.options());
  };
  const c10::SymInt groups = keys.sym_size(1);
  // As ContMixGradientBuffers::sums lays it out.
  const Tensor grad_keys =
      output_mask[2] ? at::empty_symint({keys.sym_size(0), keys.sym_size(2), groups, keys.sym_size(3)}, keys.options())
                           .transpose(1, 2)
                     : at::empty({0}, keys.options());
  const int64_t small_side = 2 * small_kernel_size - 1, large_side = 2 * large_kernel_size - 1;
  return {empty_map(0, value),
          empty_map(1, query),
          grad_keys,
          empty(3, {keys.sym_size(2)}),
          empty(4, {groups, small_side, small_side}),
          empty(5, {groups, large_side, large_side})};
}

}  // namespace

TORCH_LIBRARY(overlock_mm, m) {
  m.def(
      "contmix(Tensor value, Tensor query, Tensor key, Tensor proj_weight, Tensor? proj_bias, Tensor? rpb_small, "
      "Tensor? rpb_large, *, int num_groups, int small_kernel_size, int large_kernel_size, float scale=1.0) -> Tensor");
  // The folded keys M = scale W_d kᵀ, (B, G, L, Cq/G), of key and proj_weight in the accumulation type.
  m.def("_contmix_keys(Tensor key, Tensor proj_weight, int num_groups, float scale) -> Tensor");
  // Of key and proj_weight; empty where output_mask is false.
  m.def(
      "_contmix_keys_backward(Tensor grad_keys, Tensor key, Tensor proj_weight, float scale, bool[2] output_mask) -> "
      "(Tensor, Tensor)");
  // keys: of _contmix_keys. logsumexp: (B, 2, G, H, W), base 2.
  m.def(
      "_contmix(Tensor value, Tensor query, Tensor keys, Tensor? bias, Tensor? rpb_small, Tensor? rpb_large, "
      "int small_kernel_size, int large_kernel_size) -> (Tensor output, Tensor logsumexp)");
  // ContMixGradients of value, query, keys, bias, rpb_small, rpb_large; empty where output_mask is false.
  m.def(
      "_contmix_backward(Tensor grad_output, Tensor value, Tensor query, Tensor keys, Tensor? bias, Tensor? rpb_small, "
      "Tensor? rpb_large, Tensor output, Tensor logsumexp, int small_kernel_size, int large_kernel_size, "
      "bool[6] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("_build_info() -> str");
}

// `contmix` is made of other operators, which autograd differentiates, wherever `_contmix` has kernels. (Not registered
// as CompositeImplicitAutograd: that would take in all other devices, which run the reference.) The folded keys are
// products of torch's, on every device.
TORCH_LIBRARY_IMPL(overlock_mm, CompositeExplicitAutograd, m) {
  m.impl("_contmix_keys", &contmix_keys);
  m.impl("_contmix_keys_backward", &contmix_keys_backward);
}

TORCH_LIBRARY_IMPL(overlock_mm, CPU, m) { m.impl("contmix", &contmix); }
TORCH_LIBRARY_IMPL(overlock_mm, AutogradCPU, m) { m.impl("contmix", &contmix); }
TORCH_LIBRARY_IMPL(overlock_mm, AutogradMeta, m) { m.impl("contmix", &contmix); }
#ifdef OVERLOCK_MM_WITH_CUDA
TORCH_LIBRARY_IMPL(overlock_mm, CUDA, m) { m.impl("contmix", &contmix); }
TORCH_LIBRARY_IMPL(overlock_mm, AutogradCUDA, m) { m.impl("contmix", &contmix); }
#endif

TORCH_LIBRARY_IMPL(overlock_mm, Meta, m) {
  m.impl("contmix", &contmix);
  m.impl("_contmix", &contmix_meta);
  m.impl("_contmix_backward", &contmix_backward_meta);
}

}  // namespace overlock_mm
