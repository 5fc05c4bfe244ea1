// A depth-wise convolution that other operators use. Maps are channels_last, parameters of the accumulation type.
#pragma once

#include "../tensors.h"

namespace overlock_mm {

/// conv(input) + bias, if there is one, and + input if residual.
Tensor launch_depthwise_conv2d(const Tensor& input, const Tensor& weight, const Tensor& bias, int64_t dilation,
                               bool residual);

}  // namespace overlock_mm
