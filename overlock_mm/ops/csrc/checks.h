// Checks of the operators' arguments, once for all devices. They raise ValueError, or TypeError for a dtype; the
// message names the argument and says what it got. They work on tensors with symbolic sizes.
//
// `reference` is the tensor whose device and dtype the others must have: `value` of ContMix, `x` of all other
// operators.
#pragma once

#include <string>

#include "tensors.h"

namespace overlock_mm {

// As Python writes them.
std::string shape_of(const Tensor& tensor);
std::string name_of(at::ScalarType dtype);

void check_device(const char* name, const Tensor& tensor, const Tensor& reference, const char* reference_name);
void check_same_dtype(const char* name, const Tensor& tensor, const Tensor& reference, const char* reference_name);
/// The dtype of the reference, or float32 beside half types.
void check_parameter_dtype(const char* name, const Tensor& tensor, const Tensor& reference, const char* reference_name);

void check_floating(const char* name, const Tensor& tensor);

// ContMix.

/// All arguments of `contmix`.
void check_contmix(const Tensor& value, const Tensor& query, const Tensor& key, const Tensor& proj_weight,
                   const OptionalTensor& proj_bias, const OptionalTensor& rpb_small, const OptionalTensor& rpb_large,
                   int64_t num_groups, int64_t small_kernel_size, int64_t large_kernel_size);
/// All arguments of `_contmix`, whose keys and biases are of the accumulation type.
void check_contmix_keys(const Tensor& value, const Tensor& query, const Tensor& keys, const OptionalTensor& bias,
                        const OptionalTensor& rpb_small, const OptionalTensor& rpb_large, int64_t small_kernel_size,
                        int64_t large_kernel_size);
/// What `_contmix_backward` has beside the arguments of `_contmix`.
void check_contmix_backward(const Tensor& grad_output, const Tensor& value, const Tensor& keys, const Tensor& output,
                            const Tensor& logsumexp);

// The other operators, of a map x (B, C, H, W).

void check_map(const Tensor& x);
/// A map of the shape and dtype of x: a gradient, or one that is added.
void check_other_map(const char* name, const Tensor& other, const Tensor& x);
void check_grad_output(const Tensor& grad_output, const Tensor& x);
/// A parameter, or statistics, of the given shape.
void check_parameter(const char* name, const Tensor& parameter, const Tensor& x, c10::SymIntArrayRef shape);
/// A depth-wise kernel (C, 1, k, k) with k odd.
void check_kernel(const char* name, const Tensor& weight, const Tensor& x);

void check_depthwise_conv2d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t dilation);
/// The convolutions of branch norms.
void check_branches(const Tensor& x, at::TensorList weights, at::IntArrayRef dilations);
/// Statistics of the branches, or sums over their outputs: (branches, C).
void check_branch_statistics(const char* name, const Tensor& statistics, const Tensor& x, int64_t branches);
/// All arguments but norm_biases, which the backward does not have.
void check_branch_norms(const Tensor& x, at::TensorList weights, at::TensorList norm_weights,
                        at::IntArrayRef dilations);
/// norm_weights or norm_biases: (C) for each branch.
void check_norm_parameters(const char* name, at::TensorList parameters, const Tensor& x, int64_t branches);
void check_branch_norms_backward(const Tensor& grad_output, const Tensor& x, at::TensorList weights,
                                 at::TensorList norm_weights, const Tensor& mean, const Tensor& variance,
                                 at::IntArrayRef dilations);
void check_branch_norms_given(const Tensor& x, at::TensorList weights, at::TensorList norm_weights,
                              at::TensorList norm_biases, const Tensor& mean, const Tensor& variance,
                              at::IntArrayRef dilations);
void check_branch_norms_sums(const Tensor& grad_output, const Tensor& x, at::TensorList weights, const Tensor& mean,
                             at::IntArrayRef dilations);
void check_branch_norms_gradients(const Tensor& grad_output, const Tensor& x, at::TensorList weights,
                                  at::TensorList norm_weights, const Tensor& mean, const Tensor& variance,
                                  const Tensor& grad_mean, const Tensor& product_mean, at::IntArrayRef dilations);
void check_response_norm(const Tensor& x, const Tensor& gamma, const Tensor& beta);
/// scale is (B, C).
void check_response_normed(const Tensor& x, const Tensor& scale, const Tensor& beta);
void check_response_norm_backward(const Tensor& grad_output, const Tensor& x, const Tensor& gamma,
                                  const Tensor& response);
void check_residual_depthwise_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                   const Tensor& gamma, const Tensor& beta);
void check_residual_depthwise_normed(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                     const Tensor& scale, const Tensor& beta);
void check_layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias);
/// scale is (C), or (B, C) without a shift. other is a map as x.
void check_scale_and_shift(const Tensor& x, const Tensor& scale, const OptionalTensor& shift,
                           const OptionalTensor& other);
/// Parameters are (C), and other is a map as x.
void check_scaled_sum(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& other,
                      const Tensor& other_scale, const Tensor& other_shift);
/// Weights are (R, C) and (C, R), with biases. other is a map as x.
void check_squeeze_excitation(const Tensor& x, const Tensor& reduce_weight, const Tensor& reduce_bias,
                              const Tensor& expand_weight, const Tensor& expand_bias, const OptionalTensor& other);
/// gate is (B, C), and other a map as x.
void check_gated(const Tensor& x, const Tensor& gate, const OptionalTensor& other);
void check_gelu_residual_depthwise_norm_backward(const Tensor& grad_output, const Tensor& x, const Tensor& weight,
                                                 const OptionalTensor& bias, const Tensor& gamma,
                                                 const Tensor& response);
void check_matrices(const Tensor& matrices);

}  // namespace overlock_mm
