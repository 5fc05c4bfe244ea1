#include "checks.h"

#include <c10/core/SymInt.h>

#include <sstream>
#include <utility>
#include <vector>

#include "branch_norms.h"

namespace overlock_mm {

std::string shape_of(const Tensor& tensor) {
  std::ostringstream out;
  out << '(';
  for (int64_t i = 0; i < tensor.dim(); ++i) out << (i ? ", " : "") << tensor.sym_size(i);
  out << (tensor.dim() == 1 ? ",)" : ")");
  return out.str();
}

std::string name_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return "torch.float16";
    case at::kBFloat16:
      return "torch.bfloat16";
    case at::kFloat:
      return "torch.float32";
    case at::kDouble:
      return "torch.float64";
    case at::kInt:
      return "torch.int32";
    case at::kLong:
      return "torch.int64";
    default:
      return c10::toString(dtype);
  }
}

void check_device(const char* name, const Tensor& tensor, const Tensor& reference, const char* reference_name) {
  TORCH_CHECK_VALUE(tensor.device() == reference.device(), name, " must be on the device of ", reference_name, ", ",
                    reference.device(), ", got ", tensor.device());
}

void check_same_dtype(const char* name, const Tensor& tensor, const Tensor& reference, const char* reference_name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == reference.scalar_type(), name, " must have dtype ",
                   name_of(reference.scalar_type()), " with ", reference_name, " of ", name_of(reference.scalar_type()),
                   ", got ", name_of(tensor.scalar_type()));
}

void check_parameter_dtype(const char* name, const Tensor& tensor, const Tensor& reference,
                           const char* reference_name) {
  const at::ScalarType dtype = tensor.scalar_type(), wanted = reference.scalar_type();
  const bool half = wanted == at::kHalf || wanted == at::kBFloat16;
  TORCH_CHECK_TYPE(dtype == wanted || (half && dtype == at::kFloat), name, " must have dtype ", name_of(wanted),
                   half ? " or torch.float32" : "", " with ", reference_name, " of ", name_of(wanted), ", got ",
                   name_of(dtype));
}

namespace {

// ----------------------------------------------------------------------------------------------------------- ContMix

int64_t slots_of(int64_t small_kernel_size, int64_t large_kernel_size) {
  return small_kernel_size * small_kernel_size + large_kernel_size * large_kernel_size;
}

/// What `contmix` and `_contmix` have in common.
void check_maps_and_biases(const Tensor& value, const Tensor& query, const OptionalTensor& proj_bias,
                           const OptionalTensor& rpb_small, const OptionalTensor& rpb_large,
                           const c10::SymInt& num_groups, int64_t small_kernel_size, int64_t large_kernel_size) {
  TORCH_CHECK_VALUE(num_groups >= 1, "num_groups must be at least 1, got ", num_groups);
  const std::pair<const char*, int64_t> kernel_sizes[] = {{"small_kernel_size", small_kernel_size},
                                                          {"large_kernel_size", large_kernel_size}};
  for (const auto& [name, size] : kernel_sizes) {
    TORCH_CHECK_VALUE(size >= 1, name, " must be at least 1, got ", size);
    TORCH_CHECK_VALUE(size % 2 == 1, name, " must be odd, got ", size);
  }

  check_floating("value", value);
  check_device("query", query, value, "value");
  check_same_dtype("query", query, value, "value");

  TORCH_CHECK_VALUE(value.dim() == 4, "value must have 4 dimensions, got shape ", shape_of(value));
  TORCH_CHECK_VALUE(query.dim() == 4, "query must have 4 dimensions, got shape ", shape_of(query));
  TORCH_CHECK_VALUE(value.sym_size(1) > 0 && value.sym_size(1) % (num_groups * 2) == 0,
                    "value must have channels divisible by 2 * num_groups = ", num_groups * 2, ", got ",
                    value.sym_size(1));
  TORCH_CHECK_VALUE(query.sym_size(1) > 0 && query.sym_size(1) % num_groups == 0,
                    "query must have channels divisible by num_groups = ", num_groups, ", got ", query.sym_size(1));
  TORCH_CHECK_VALUE(query.sym_size(0) == value.sym_size(0) && query.sym_size(2) == value.sym_size(2) &&
                        query.sym_size(3) == value.sym_size(3),
                    "query must have the batch and map of value, (", value.sym_size(0), ", *, ", value.sym_size(2),
                    ", ", value.sym_size(3), "), got shape ", shape_of(query));
  for (const auto& [name, size] : kernel_sizes) {
    TORCH_CHECK_VALUE(value.sym_size(2) >= size && value.sym_size(3) >= size, name,
                      " must be at most the map's smaller side, ", value.sym_size(2).min(value.sym_size(3)), ", got ",
                      size);
  }

  const int64_t slots = slots_of(small_kernel_size, large_kernel_size);
  if (proj_bias) {
    check_device("proj_bias", *proj_bias, value, "value");
    check_parameter_dtype("proj_bias", *proj_bias, value, "value");
    TORCH_CHECK_VALUE(proj_bias->dim() == 1 && proj_bias->sym_size(0) == slots, "proj_bias must have shape (", slots,
                      ",), got ", shape_of(*proj_bias));
  }
  const std::tuple<const char*, const OptionalTensor&, int64_t> position_biases[] = {
      {"rpb_small", rpb_small, 2 * small_kernel_size - 1}, {"rpb_large", rpb_large, 2 * large_kernel_size - 1}};
  for (const auto& [name, rpb, side] : position_biases) {
    if (!rpb) continue;
    check_device(name, *rpb, value, "value");
    check_parameter_dtype(name, *rpb, value, "value");
    TORCH_CHECK_VALUE(
        rpb->dim() == 3 && rpb->sym_size(0) == num_groups && rpb->sym_size(1) == side && rpb->sym_size(2) == side, name,
        " must have shape (", num_groups, ", ", side, ", ", side, "), got ", shape_of(*rpb));
  }
}

}  // namespace

void check_contmix(const Tensor& value, const Tensor& query, const Tensor& key, const Tensor& proj_weight,
                   const OptionalTensor& proj_bias, const OptionalTensor& rpb_small, const OptionalTensor& rpb_large,
                   int64_t num_groups, int64_t small_kernel_size, int64_t large_kernel_size) {
  check_maps_and_biases(value, query, proj_bias, rpb_small, rpb_large, num_groups, small_kernel_size,
                        large_kernel_size);
  check_device("key", key, value, "value");
  check_device("proj_weight", proj_weight, value, "value");
  check_same_dtype("key", key, value, "value");
  check_parameter_dtype("proj_weight", proj_weight, value, "value");
  TORCH_CHECK_VALUE(key.dim() == 4, "key must have 4 dimensions, got shape ", shape_of(key));
  TORCH_CHECK_VALUE(proj_weight.dim() == 2, "proj_weight must have 2 dimensions, got shape ", shape_of(proj_weight));
  TORCH_CHECK_VALUE(key.sym_size(0) == query.sym_size(0) && key.sym_size(1) == query.sym_size(1),
                    "key must have shape (", query.sym_size(0), ", ", query.sym_size(1), ", S, S), got ",
                    shape_of(key));
  const int64_t slots = slots_of(small_kernel_size, large_kernel_size);
  const c10::SymInt tokens = key.sym_size(2) * key.sym_size(3);
  TORCH_CHECK_VALUE(proj_weight.sym_size(0) == slots && proj_weight.sym_size(1) == tokens,
                    "proj_weight must have shape (", slots, ", ", tokens, "), got ", shape_of(proj_weight));
}

void check_contmix_keys(const Tensor& value, const Tensor& query, const Tensor& keys, const OptionalTensor& bias,
                        const OptionalTensor& rpb_small, const OptionalTensor& rpb_large, int64_t small_kernel_size,
                        int64_t large_kernel_size) {
  TORCH_CHECK_VALUE(keys.dim() == 4, "keys must have 4 dimensions, got shape ", shape_of(keys));
  check_maps_and_biases(value, query, bias, rpb_small, rpb_large, keys.sym_size(1), small_kernel_size,
                        large_kernel_size);
  const int64_t slots = slots_of(small_kernel_size, large_kernel_size);
  TORCH_CHECK_VALUE(keys.sym_size(0) == value.sym_size(0) && keys.sym_size(2) == slots &&
                        keys.sym_size(1) * keys.sym_size(3) == query.sym_size(1),
                    "keys must have shape (", value.sym_size(0), ", G, ", slots, ", ", query.sym_size(1), " / G), got ",
                    shape_of(keys));
  check_device("keys", keys, value, "value");
  const std::pair<const char*, OptionalTensor> parameters[] = {
      {"keys", keys}, {"bias", bias}, {"rpb_small", rpb_small}, {"rpb_large", rpb_large}};
  for (const auto& [name, tensor] : parameters) {
    TORCH_CHECK_TYPE(!tensor || tensor->scalar_type() == accumulation_type(value), name, " must have dtype ",
                     name_of(accumulation_type(value)), ", got ", name_of(tensor->scalar_type()));
  }
}

void check_contmix_backward(const Tensor& grad_output, const Tensor& value, const Tensor& keys, const Tensor& output,
                            const Tensor& logsumexp) {
  for (const auto& [name, map] : {std::pair{"grad_output", grad_output}, std::pair{"output", output}}) {
    check_device(name, map, value, "value");
    check_same_dtype(name, map, value, "value");
    TORCH_CHECK_VALUE(map.sym_sizes() == value.sym_sizes(), name, " must have the shape of value, ", shape_of(value),
                      ", got ", shape_of(map));
  }
  check_device("logsumexp", logsumexp, value, "value");
  TORCH_CHECK_TYPE(logsumexp.scalar_type() == keys.scalar_type(), "logsumexp must have dtype ",
                   name_of(keys.scalar_type()), ", got ", name_of(logsumexp.scalar_type()));
  const std::array<c10::SymInt, 5> sizes{value.sym_size(0), 2, keys.sym_size(1), value.sym_size(2), value.sym_size(3)};
  TORCH_CHECK_VALUE(logsumexp.sym_sizes() == c10::SymIntArrayRef(sizes), "logsumexp must have shape (", sizes[0],
                    ", 2, ", sizes[2], ", ", sizes[3], ", ", sizes[4], "), got ", shape_of(logsumexp));
}

// ----------------------------------------------------------------------------------------------- the other operators

void check_floating(const char* name, const Tensor& tensor) {
  const at::ScalarType dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16, name,
                   " must be float16, bfloat16, float32 or float64, got ", name_of(dtype));
}

void check_map(const Tensor& x) {
  check_floating("x", x);
  TORCH_CHECK_VALUE(x.dim() == 4, "x must have 4 dimensions, got shape ", shape_of(x));
}

void check_other_map(const char* name, const Tensor& other, const Tensor& x) {
  check_device(name, other, x, "x");
  check_same_dtype(name, other, x, "x");
  TORCH_CHECK_VALUE(other.sym_sizes() == x.sym_sizes(), name, " must have the shape of x, ", shape_of(x), ", got ",
                    shape_of(other));
}

void check_grad_output(const Tensor& grad_output, const Tensor& x) { check_other_map("grad_output", grad_output, x); }

void check_parameter(const char* name, const Tensor& parameter, const Tensor& x, c10::SymIntArrayRef shape) {
  check_device(name, parameter, x, "x");
  check_parameter_dtype(name, parameter, x, "x");
  std::ostringstream wanted;  // as shape_of writes it
  for (size_t i = 0; i < shape.size(); ++i) wanted << (i ? ", " : "") << shape[i];
  TORCH_CHECK_VALUE(parameter.sym_sizes() == shape, name, " must have shape (", wanted.str(),
                    shape.size() == 1 ? ",), got " : "), got ", shape_of(parameter));
}

void check_kernel(const char* name, const Tensor& weight, const Tensor& x) {
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.sym_size(0) == x.sym_size(1) && weight.sym_size(1) == 1 &&
                        weight.sym_size(2) == weight.sym_size(3) && weight.sym_size(2) % 2 == 1,
                    name, " must have shape (", x.sym_size(1), ", 1, k, k) with k odd, got ", shape_of(weight));
  check_device(name, weight, x, "x");
  check_parameter_dtype(name, weight, x, "x");
}

void check_depthwise_conv2d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t dilation) {
  check_map(x);
  check_kernel("weight", weight, x);
  TORCH_CHECK_VALUE(dilation >= 1, "dilation must be at least 1, got ", dilation);
  if (bias) check_parameter("bias", *bias, x, {x.sym_size(1)});
}

void check_norm_parameters(const char* name, at::TensorList parameters, const Tensor& x, int64_t branches) {
  TORCH_CHECK_VALUE(int64_t(parameters.size()) == branches, name, " must be a tensor for each of ", branches,
                    " weights, got ", parameters.size());
  for (const Tensor& parameter : parameters) check_parameter(name, parameter, x, {x.sym_size(1)});
}

void check_branches(const Tensor& x, at::TensorList weights, at::IntArrayRef dilations) {
  check_map(x);
  const int64_t branches = weights.size();
  TORCH_CHECK_VALUE(branches >= 1 && branches <= BranchNormsParams::kMostBranches, "weights must be 1 to ",
                    BranchNormsParams::kMostBranches, " kernels, got ", branches);
  TORCH_CHECK_VALUE(int64_t(dilations.size()) == branches, "dilations must be a number for each of ", branches,
                    " weights, got ", dilations);
  std::vector<c10::SymInt> kernel_sizes;
  for (const Tensor& weight : weights) {
    check_kernel("weights", weight, x);
    kernel_sizes.push_back(weight.sym_size(2));
  }
  TORCH_CHECK_VALUE(dilations[0] == 1, "the first branch must have no dilation, got dilations ", dilations);
  for (int64_t i = 0; i < branches; ++i) {
    TORCH_CHECK_VALUE(dilations[i] >= 1, "dilations must be at least 1, got ", dilations);
    // Not as products, which may be too large.
    TORCH_CHECK_VALUE(kernel_sizes[i] == 1 || dilations[i] <= (kernel_sizes[0] - 1) / (kernel_sizes[i] - 1),
                      "the first branch must reach as far as any, got kernel sizes ", c10::SymIntArrayRef(kernel_sizes),
                      " and dilations ", dilations);
  }
}

void check_branch_statistics(const char* name, const Tensor& statistics, const Tensor& x, int64_t branches) {
  check_parameter(name, statistics, x, {branches, x.sym_size(1)});
}

void check_branch_norms(const Tensor& x, at::TensorList weights, at::TensorList norm_weights,
                        at::IntArrayRef dilations) {
  check_branches(x, weights, dilations);
  check_norm_parameters("norm_weights", norm_weights, x, weights.size());
}

void check_branch_norms_backward(const Tensor& grad_output, const Tensor& x, at::TensorList weights,
                                 at::TensorList norm_weights, const Tensor& mean, const Tensor& variance,
                                 at::IntArrayRef dilations) {
  check_branch_norms(x, weights, norm_weights, dilations);
  check_grad_output(grad_output, x);
  check_branch_statistics("mean", mean, x, weights.size());
  check_branch_statistics("variance", variance, x, weights.size());
}

void check_branch_norms_given(const Tensor& x, at::TensorList weights, at::TensorList norm_weights,
                              at::TensorList norm_biases, const Tensor& mean, const Tensor& variance,
                              at::IntArrayRef dilations) {
  check_branch_norms(x, weights, norm_weights, dilations);
  check_norm_parameters("norm_biases", norm_biases, x, weights.size());
  check_branch_statistics("mean", mean, x, weights.size());
  check_branch_statistics("variance", variance, x, weights.size());
}

void check_branch_norms_sums(const Tensor& grad_output, const Tensor& x, at::TensorList weights, const Tensor& mean,
                             at::IntArrayRef dilations) {
  check_branches(x, weights, dilations);
  check_grad_output(grad_output, x);
  check_branch_statistics("mean", mean, x, weights.size());
}

void check_branch_norms_gradients(const Tensor& grad_output, const Tensor& x, at::TensorList weights,
                                  at::TensorList norm_weights, const Tensor& mean, const Tensor& variance,
                                  const Tensor& grad_mean, const Tensor& product_mean, at::IntArrayRef dilations) {
  check_branch_norms_backward(grad_output, x, weights, norm_weights, mean, variance, dilations);
  check_parameter("grad_mean", grad_mean, x, {x.sym_size(1)});
  check_branch_statistics("product_mean", product_mean, x, weights.size());
}

void check_response_norm(const Tensor& x, const Tensor& gamma, const Tensor& beta) {
  check_map(x);
  check_parameter("gamma", gamma, x, {x.sym_size(1)});
  check_parameter("beta", beta, x, {x.sym_size(1)});
}

void check_response_normed(const Tensor& x, const Tensor& scale, const Tensor& beta) {
  check_map(x);
  check_parameter("scale", scale, x, {x.sym_size(0), x.sym_size(1)});
  check_parameter("beta", beta, x, {x.sym_size(1)});
}

void check_response_norm_backward(const Tensor& grad_output, const Tensor& x, const Tensor& gamma,
                                  const Tensor& response) {
  check_map(x);
  check_grad_output(grad_output, x);
  check_parameter("gamma", gamma, x, {x.sym_size(1)});
  check_parameter("response", response, x, {x.sym_size(0), x.sym_size(1)});
}

namespace {

void check_residual_depthwise(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  check_depthwise_conv2d(x, weight, bias, /*dilation=*/1);
  TORCH_CHECK_VALUE(weight.sym_size(2) == 3, "weight must have shape (", x.sym_size(1), ", 1, 3, 3), got ",
                    shape_of(weight));
}

}  // namespace

void check_residual_depthwise_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                   const Tensor& gamma, const Tensor& beta) {
  check_residual_depthwise(x, weight, bias);
  check_response_norm(x, gamma, beta);
}

void check_residual_depthwise_normed(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                     const Tensor& scale, const Tensor& beta) {
  check_residual_depthwise(x, weight, bias);
  check_response_normed(x, scale, beta);
}

void check_layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check_map(x);
  check_parameter("weight", weight, x, {x.sym_size(1)});
  check_parameter("bias", bias, x, {x.sym_size(1)});
}

void check_scale_and_shift(const Tensor& x, const Tensor& scale, const OptionalTensor& shift,
                           const OptionalTensor& other) {
  check_map(x);
  if (scale.dim() == 2 && !shift) {
    check_parameter("scale", scale, x, {x.sym_size(0), x.sym_size(1)});
  } else {
    check_parameter("scale", scale, x, {x.sym_size(1)});
  }
  if (shift) check_parameter("shift", *shift, x, {x.sym_size(1)});
  if (other) check_other_map("other", *other, x);
}

void check_scaled_sum(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& other,
                      const Tensor& other_scale, const Tensor& other_shift) {
  check_map(x);
  const std::pair<const char*, const Tensor&> parameters[] = {
      {"scale", scale}, {"shift", shift}, {"other_scale", other_scale}, {"other_shift", other_shift}};
  for (const auto& [name, parameter] : parameters) check_parameter(name, parameter, x, {x.sym_size(1)});
  check_other_map("other", other, x);
}

void check_squeeze_excitation(const Tensor& x, const Tensor& reduce_weight, const Tensor& reduce_bias,
                              const Tensor& expand_weight, const Tensor& expand_bias, const OptionalTensor& other) {
  check_map(x);
  const c10::SymInt channels = x.sym_size(1);
  const c10::SymInt hidden = reduce_weight.dim() == 2 ? reduce_weight.sym_size(0) : 0;
  check_parameter("reduce_weight", reduce_weight, x, {hidden, channels});
  check_parameter("reduce_bias", reduce_bias, x, {hidden});
  check_parameter("expand_weight", expand_weight, x, {channels, hidden});
  check_parameter("expand_bias", expand_bias, x, {channels});
  if (other) check_other_map("other", *other, x);
}

void check_gated(const Tensor& x, const Tensor& gate, const OptionalTensor& other) {
  check_map(x);
  check_parameter("gate", gate, x, {x.sym_size(0), x.sym_size(1)});
  if (other) check_other_map("other", *other, x);
}

void check_gelu_residual_depthwise_norm_backward(const Tensor& grad_output, const Tensor& x, const Tensor& weight,
                                                 const OptionalTensor& bias, const Tensor& gamma,
                                                 const Tensor& response) {
  check_residual_depthwise_norm(x, weight, bias, gamma, gamma);
  check_response_norm_backward(grad_output, x, gamma, response);
}

void check_matrices(const Tensor& matrices) {
  const at::ScalarType dtype = matrices.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "matrices must be float32 or float64, got ",
                   name_of(dtype));
  TORCH_CHECK_VALUE(matrices.dim() >= 2 && matrices.is_contiguous(),
                    "matrices must be contiguous, of 2 dimensions or more, got shape ", shape_of(matrices));
}

}  // namespace overlock_mm
