// Static depth-wise convolutions, their sums through batch norms, and global response norms: schemas, checks, and
// shapes for the meta device. There are kernels for the CPU only; overlock_mm/ops/depthwise.py says what other devices
// run.
#include <torch/library.h>

#include "depthwise_tensors.h"

namespace overlock_mm {

void check_map(const char* name, const Tensor& map) {
  const at::ScalarType dtype = map.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16, name,
                   " must be float16, bfloat16, float32 or float64, got ", name_of(dtype));
  TORCH_CHECK_VALUE(map.dim() == 4, name, " must have 4 dimensions, got shape ", shape_of(map));
}

void check_grad_output(const Tensor& grad_output, const Tensor& input) {
  check_device("grad_output", grad_output, input, "input");
  check_same_dtype("grad_output", grad_output, input, "input");
  TORCH_CHECK_VALUE(grad_output.sym_sizes() == input.sym_sizes(), "grad_output must have the shape of input, ",
                    shape_of(input), ", got ", shape_of(grad_output));
}

void check_parameter(const char* name, const Tensor& parameter, const Tensor& input, c10::SymIntArrayRef shape) {
  check_device(name, parameter, input, "input");
  check_dtype(name, parameter, input, "input");
  TORCH_CHECK_VALUE(parameter.sym_sizes() == shape, name, " must have shape ", shape, ", got ", shape_of(parameter));
}

void check_depthwise(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, int64_t dilation,
                     bool gelu) {
  check_map("input", input);
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.sym_size(0) == input.sym_size(1) && weight.sym_size(1) == 1 &&
                        weight.sym_size(2) == weight.sym_size(3) && weight.sym_size(2) % 2 == 1,
                    "weight must have shape (", input.sym_size(1), ", 1, k, k) with k odd, got ", shape_of(weight));
  check_device("weight", weight, input, "input");
  check_dtype("weight", weight, input, "input");
  TORCH_CHECK_VALUE(dilation >= 1, "dilation must be at least 1, got ", dilation);
  TORCH_CHECK_VALUE(!gelu || (weight.sym_size(2) == 3 && dilation == 1),
                    "gelu goes with a 3 x 3 kernel without dilation, got ", shape_of(weight), " and dilation ",
                    dilation);
  if (bias) check_parameter("bias", *bias, input, {input.sym_size(1)});
}

void check_matrices(const Tensor& matrices) {
  const at::ScalarType dtype = matrices.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "matrices must be float32 or float64, got ",
                   name_of(dtype));
  TORCH_CHECK_VALUE(matrices.dim() >= 2 && matrices.is_contiguous(),
                    "matrices must be contiguous, of 2 dimensions or more, got shape ", shape_of(matrices));
}

void check_residual_depthwise_norm(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                   const Tensor& gamma, const Tensor& beta) {
  check_depthwise(input, weight, bias, /*dilation=*/1, /*gelu=*/false);
  TORCH_CHECK_VALUE(weight.sym_size(2) == 3, "weight must have shape (", input.sym_size(1), ", 1, 3, 3), got ",
                    shape_of(weight));
  check_parameter("gamma", gamma, input, {input.sym_size(1)});
  check_parameter("beta", beta, input, {input.sym_size(1)});
}

void check_branches(const Tensor& input, const Tensor& weights, const Tensor& norm_weights,
                    at::IntArrayRef kernel_sizes, at::IntArrayRef dilations) {
  check_map("input", input);
  const int64_t branches = kernel_sizes.size();
  TORCH_CHECK_VALUE(branches >= 1 && branches <= BranchParams::kMost && dilations.size() == kernel_sizes.size(),
                    "kernel_sizes and dilations must be 1 to ", BranchParams::kMost, " numbers each, got ",
                    kernel_sizes, " and ", dilations);
  int64_t taps = 0;
  for (int64_t i = 0; i < branches; ++i) {
    TORCH_CHECK_VALUE(kernel_sizes[i] >= 1 && kernel_sizes[i] % 2 == 1, "kernel_sizes must be odd, got ", kernel_sizes);
    TORCH_CHECK_VALUE(dilations[i] >= 1, "dilations must be at least 1, got ", dilations);
    TORCH_CHECK_VALUE(kernel_sizes[i] / 2 * dilations[i] <= kernel_sizes[0] / 2 * dilations[0],
                      "the first branch must reach as far as any, got kernel_sizes ", kernel_sizes, " and dilations ",
                      dilations);
    taps += kernel_sizes[i] * kernel_sizes[i];
  }
  TORCH_CHECK_VALUE(dilations[0] == 1, "the first branch must have no dilation, got dilations ", dilations);
  check_parameter("weights", weights, input, {input.sym_size(1), taps});
  check_parameter("norm_weights", norm_weights, input, {branches, input.sym_size(1)});
}

namespace {

Tensor empty_like_map(const Tensor& map) {
  return at::empty_symint(map.sym_sizes(), map.options(), memory_format_of(map));
}

Tensor transpose_meta(const Tensor& matrices) {
  check_matrices(matrices);
  c10::SymDimVector shape(matrices.sym_sizes());
  std::swap(shape[shape.size() - 1], shape[shape.size() - 2]);
  return at::empty_symint(shape, matrices.options());
}

Tensor depthwise_conv2d_meta(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, int64_t dilation,
                             bool, bool gelu) {
  check_depthwise(input, weight, bias, dilation, gelu);
  return empty_like_map(input);
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward_meta(const Tensor& grad_output, const Tensor& input,
                                                                  const Tensor& weight, int64_t dilation, bool,
                                                                  bool gelu, std::array<bool, 3> output_mask) {
  check_depthwise(input, weight, OptionalTensor(), dilation, gelu);
  check_grad_output(grad_output, input);
  const auto of_parameters = input.options().dtype(accumulation_type(input));
  return {output_mask[0] ? empty_like_map(input) : Tensor(),
          output_mask[1] ? at::empty_symint(weight.sym_sizes(), of_parameters) : Tensor(),
          output_mask[2] ? at::empty_symint({weight.sym_size(0)}, of_parameters) : Tensor()};
}

std::tuple<Tensor, Tensor, Tensor> branch_norms_meta(const Tensor& input, const Tensor& weights,
                                                     const Tensor& norm_weights, const Tensor& norm_biases,
                                                     at::IntArrayRef kernel_sizes, at::IntArrayRef dilations, double) {
  check_branches(input, weights, norm_weights, kernel_sizes, dilations);
  check_parameter("norm_biases", norm_biases, input, norm_weights.sym_sizes());
  const auto options = input.options().dtype(accumulation_type(input));
  return {empty_like_map(input), at::empty_symint(norm_weights.sym_sizes(), options),
          at::empty_symint(norm_weights.sym_sizes(), options)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> branch_norms_backward_meta(const Tensor& grad_output, const Tensor& input,
                                                                      const Tensor& weights, const Tensor& norm_weights,
                                                                      const Tensor& mean, const Tensor& variance,
                                                                      at::IntArrayRef kernel_sizes,
                                                                      at::IntArrayRef dilations, double) {
  check_branches(input, weights, norm_weights, kernel_sizes, dilations);
  check_grad_output(grad_output, input);
  check_parameter("mean", mean, input, norm_weights.sym_sizes());
  check_parameter("variance", variance, input, norm_weights.sym_sizes());
  const auto options = input.options().dtype(accumulation_type(input));
  return {empty_like_map(input), at::empty_symint(weights.sym_sizes(), options),
          at::empty_symint(norm_weights.sym_sizes(), options), at::empty_symint(norm_weights.sym_sizes(), options)};
}

Tensor residual_depthwise_norm_meta(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                    const Tensor& gamma, const Tensor& beta, double, bool) {
  check_residual_depthwise_norm(input, weight, bias, gamma, beta);
  return empty_like_map(input);
}

void residual_depthwise_norm_inplace_meta(Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                          const Tensor& gamma, const Tensor& beta, double, bool) {
  check_residual_depthwise_norm(input, weight, bias, gamma, beta);
}

std::tuple<Tensor, Tensor> response_norm_meta(const Tensor& input, const Tensor& gamma, const Tensor& beta, double) {
  check_map("input", input);
  check_parameter("gamma", gamma, input, {input.sym_size(1)});
  check_parameter("beta", beta, input, {input.sym_size(1)});
  const auto options = input.options().dtype(accumulation_type(input));
  return {empty_like_map(input), at::empty_symint({input.sym_size(0), input.sym_size(1)}, options)};
}

std::tuple<Tensor, Tensor, Tensor> response_norm_backward_meta(const Tensor& grad_output, const Tensor& input,
                                                               const Tensor& gamma, const Tensor& response, double) {
  check_map("input", input);
  check_grad_output(grad_output, input);
  check_parameter("gamma", gamma, input, {input.sym_size(1)});
  check_parameter("response", response, input, {input.sym_size(0), input.sym_size(1)});
  const auto options = input.options().dtype(accumulation_type(input));
  return {empty_like_map(input), at::empty_symint(gamma.sym_sizes(), options),
          at::empty_symint(gamma.sym_sizes(), options)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) {
  // The last two dimensions change places, in memory too. It has no derivative.
  m.def("_transpose(Tensor matrices) -> Tensor");
  // conv(f(input), weight) + bias, and + f(input) if residual, where f is GELU or nothing. Stride 1, same size.
  m.def(
      "_depthwise_conv2d(Tensor input, Tensor weight, Tensor? bias, int dilation, bool residual, bool gelu) -> Tensor");
  // Gradients of input, weight, bias; undefined where output_mask is false.
  m.def(
      "_depthwise_conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, int dilation, bool residual, "
      "bool gelu, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
  // Sum over branches of batch_norm(conv(input)), with the statistics of the batch. weights: (C, sum of k²),
  // norm_weights and norm_biases: (branches, C). variance is the biased one.
  m.def(
      "_branch_norms(Tensor input, Tensor weights, Tensor norm_weights, Tensor norm_biases, int[] kernel_sizes, "
      "int[] dilations, float eps) -> (Tensor output, Tensor mean, Tensor variance)");
  // Gradients of input, weights, norm_weights, norm_biases.
  m.def(
      "_branch_norms_backward(Tensor grad_output, Tensor input, Tensor weights, Tensor norm_weights, Tensor mean, "
      "Tensor variance, int[] kernel_sizes, int[] dilations, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  // response_norm(f(input) + conv(f(input), weight) + bias), where f is GELU or nothing, of a kernel of size 3. For
  // inference: it has no derivative.
  m.def(
      "_residual_depthwise_norm(Tensor input, Tensor weight, Tensor? bias, Tensor gamma, Tensor beta, float eps, "
      "bool gelu) -> Tensor");
  m.def(
      "_residual_depthwise_norm_(Tensor(a!) input, Tensor weight, Tensor? bias, Tensor gamma, Tensor beta, float eps, "
      "bool gelu) -> ()");
  // response: (B, C), the norm over the map.
  m.def("_response_norm(Tensor input, Tensor gamma, Tensor beta, float eps) -> (Tensor output, Tensor response)");
  // Gradients of input, gamma, beta.
  m.def(
      "_response_norm_backward(Tensor grad_output, Tensor input, Tensor gamma, Tensor response, float eps) -> "
      "(Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(overlock_mm, Meta, m) {
  m.impl("_transpose", &transpose_meta);
  m.impl("_depthwise_conv2d", &depthwise_conv2d_meta);
  m.impl("_depthwise_conv2d_backward", &depthwise_conv2d_backward_meta);
  m.impl("_branch_norms", &branch_norms_meta);
  m.impl("_branch_norms_backward", &branch_norms_backward_meta);
  m.impl("_residual_depthwise_norm", &residual_depthwise_norm_meta);
  m.impl("_residual_depthwise_norm_", &residual_depthwise_norm_inplace_meta);
  m.impl("_response_norm", &response_norm_meta);
  m.impl("_response_norm_backward", &response_norm_backward_meta);
}

}  // namespace overlock_mm
