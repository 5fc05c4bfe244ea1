// Checks of the static convolutions' arguments, once for all devices. They raise ValueError, or TypeError for a dtype,
// and work on tensors with symbolic sizes.
#pragma once

#include "contmix_tensors.h"
#include "depthwise.h"

namespace overlock_mm {

void check_map(const char* name, const Tensor& map);
void check_grad_output(const Tensor& grad_output, const Tensor& input);
void check_parameter(const char* name, const Tensor& parameter, const Tensor& input, c10::SymIntArrayRef shape);
void check_depthwise(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, int64_t dilation,
                     bool gelu);
void check_matrices(const Tensor& matrices);
void check_residual_depthwise_norm(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                   const Tensor& gamma, const Tensor& beta);
void check_branches(const Tensor& input, const Tensor& weights, const Tensor& norm_weights,
                    at::IntArrayRef kernel_sizes, at::IntArrayRef dilations);

}  // namespace overlock_mm
