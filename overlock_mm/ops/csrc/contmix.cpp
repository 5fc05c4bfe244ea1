// Schemas, and what is the same on every device.
#include <torch/library.h>

#include "contmix_ops.h"
#include "contmix_tensors.h"

namespace overlock_mm {
namespace {

void check_key_and_weight(const Tensor& value, const Tensor& query, const Tensor& key, const Tensor& proj_weight,
                          int64_t slots) {
  check_device("key", key, value);
  check_device("proj_weight", proj_weight, value);
  check_same_dtype("key", key, value);
  check_dtype("proj_weight", proj_weight, value);
  TORCH_CHECK_VALUE(key.dim() == 4, "key must have 4 dimensions, got shape ", shape_of(key));
  TORCH_CHECK_VALUE(proj_weight.dim() == 2, "proj_weight must have 2 dimensions, got shape ", shape_of(proj_weight));
  TORCH_CHECK_VALUE(key.sym_size(0) == query.sym_size(0) && key.sym_size(1) == query.sym_size(1),
                    "key must have shape (", query.sym_size(0), ", ", query.sym_size(1), ", S, S), got ",
                    shape_of(key));
  TORCH_CHECK_VALUE(proj_weight.sym_size(0) == slots && proj_weight.sym_size(1) == key.sym_size(2) * key.sym_size(3),
                    "proj_weight must have shape (", slots, ", ", key.sym_size(2) * key.sym_size(3), "), got ",
                    shape_of(proj_weight));
}

/// z = W_d (kᵀ q) + b = (W_d kᵀ) q + b: with the keys M = W_d kᵀ folded, the context tokens are gone from the work at
/// every position. The small matrix product is torch's, and so is its backward.
Tensor contmix(const Tensor& value, const Tensor& query, const Tensor& key, const Tensor& proj_weight,
               const OptionalTensor& proj_bias, const OptionalTensor& rpb_small, const OptionalTensor& rpb_large,
               int64_t num_groups, int64_t small_kernel_size, int64_t large_kernel_size) {
  check_arguments(value, query, proj_bias, rpb_small, rpb_large, num_groups, small_kernel_size, large_kernel_size);
  const int64_t slots = small_kernel_size * small_kernel_size + large_kernel_size * large_kernel_size;
  check_key_and_weight(value, query, key, proj_weight, slots);

  const at::ScalarType dtype = accumulation_type(value);
  const auto converted = [&](const OptionalTensor& tensor) {
    return tensor ? OptionalTensor(tensor->to(dtype)) : OptionalTensor();
  };
  const Tensor tokens = key.to(dtype).reshape_symint({key.sym_size(0), num_groups, key.sym_size(1) / num_groups,
                                                      key.sym_size(2) * key.sym_size(3)});  // (B, G, Cq/G, S²)
  const Tensor keys = at::matmul(proj_weight.to(dtype), tokens.transpose(-2, -1));          // (B, G, L, Cq/G)

  return std::get<0>(call_contmix(value, query, keys, converted(proj_bias), converted(rpb_small), converted(rpb_large),
                                  small_kernel_size, large_kernel_size));
}

std::tuple<Tensor, Tensor> contmix_meta(const Tensor& value, const Tensor& query, const Tensor& keys,
                                        const OptionalTensor& bias, const OptionalTensor& rpb_small,
                                        const OptionalTensor& rpb_large, int64_t small_kernel_size,
                                        int64_t large_kernel_size) {
  check_internal_arguments(value, query, keys, bias, rpb_small, rpb_large, small_kernel_size, large_kernel_size);
  return {
      at::empty_symint(value.sym_sizes(), value.options(), memory_format_of(value)),
      at::empty_symint({value.sym_size(0), 2, keys.sym_size(1), value.sym_size(2), value.sym_size(3)}, keys.options())};
}

Gradients contmix_backward_meta(const Tensor& grad_output, const Tensor& value, const Tensor& query, const Tensor& keys,
                                const OptionalTensor& bias, const OptionalTensor& rpb_small,
                                const OptionalTensor& rpb_large, const Tensor& output, const Tensor& logsumexp,
                                int64_t small_kernel_size, int64_t large_kernel_size, std::array<bool, 6> output_mask) {
  check_internal_arguments(value, query, keys, bias, rpb_small, rpb_large, small_kernel_size, large_kernel_size);
  check_backward_arguments(grad_output, value, keys, output, logsumexp);
  const auto empty = [&](int i, c10::SymIntArrayRef sizes) {
    return output_mask[i] ? at::empty_symint(sizes, keys.options()) : at::empty({0}, keys.options());
  };
  const auto empty_map = [&](int i, const Tensor& map) {
    return output_mask[i] ? at::empty_symint(map.sym_sizes(), map.options(), memory_format_of(map))
                          : at::empty({0}, keys.options());
  };
  const c10::SymInt groups = keys.sym_size(1);
  const int64_t small_side = 2 * small_kernel_size - 1, large_side = 2 * large_kernel_size - 1;
  return {empty_map(0, value),
          empty_map(1, query),
          empty(2, keys.sym_sizes()),
          empty(3, {keys.sym_size(2)}),
          empty(4, {groups, small_side, small_side}),
          empty(5, {groups, large_side, large_side})};
}

}  // namespace

TORCH_LIBRARY(overlock_mm, m) {
  m.def(
      "contmix(Tensor value, Tensor query, Tensor key, Tensor proj_weight, Tensor? proj_bias, Tensor? rpb_small, "
      "Tensor? rpb_large, *, int num_groups, int small_kernel_size, int large_kernel_size) -> Tensor");
  // keys: M = W_d kᵀ, (B, G, L, Cq/G). logsumexp: (B, 2, G, H, W), base 2.
  m.def(
      "_contmix(Tensor value, Tensor query, Tensor keys, Tensor? bias, Tensor? rpb_small, Tensor? rpb_large, "
      "int small_kernel_size, int large_kernel_size) -> (Tensor output, Tensor logsumexp)");
  // Gradients of value, query, keys, bias, rpb_small, rpb_large; empty where output_mask is false.
  m.def(
      "_contmix_backward(Tensor grad_output, Tensor value, Tensor query, Tensor keys, Tensor? bias, Tensor? rpb_small, "
      "Tensor? rpb_large, Tensor output, Tensor logsumexp, int small_kernel_size, int large_kernel_size, "
      "bool[6] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("_build_info() -> str");
}

TORCH_LIBRARY_IMPL(overlock_mm, CompositeImplicitAutograd, m) { m.impl("contmix", &contmix); }

TORCH_LIBRARY_IMPL(overlock_mm, Meta, m) {
  m.impl("_contmix", &contmix_meta);
  m.impl("_contmix_backward", &contmix_backward_meta);
}

}  // namespace overlock_mm
