// Depth-wise convolutions that other operators use. Maps are channels_last, parameters of the accumulation type.
#pragma once

#include <utility>

#include "../tensors.h"
#include "depthwise_conv2d_launch.h"

namespace overlock_mm {

/// With sizes and input.
DepthwiseParams depthwise_params(const Tensor& input, int64_t kernel_size, int64_t dilation);

/// conv(input) + bias, if there is one, and + input if residual; with the kernel turned by 180 degrees if flipped.
Tensor launch_depthwise_conv2d(const Tensor& input, const Tensor& weight, const Tensor& bias, int64_t dilation,
                               bool residual, bool flipped);

/// Gradients of the kernel, (C, 1, k, k), and the bias, (C) or undefined if it is not wanted.
std::pair<Tensor, Tensor> launch_depthwise_gradients(const Tensor& grad_output, const Tensor& input,
                                                     int64_t kernel_size, int64_t dilation, bool of_bias);

}  // namespace overlock_mm
