// Parameters of the CUDA kernels of residual 3 x 3 depth-wise convolutions, with a GELU before them, for the response
// norm behind them: plain numbers and pointers, nothing of torch. Maps are laid out as in depthwise_conv2d.h, and have
// any dtype. All other data have the accumulation type.
#pragma once

#include <cstdint>

#include "cuda/walk.h"

namespace overlock_mm {

/// With v = gelu(input), or the input, and u = v + conv(v) + bias.
struct ResidualDepthwiseNormParams : WalkedMap {
  bool gelu;
  const void* input;   ///< map
  const void* weight;  ///< (C, 3, 3)
  const void* bias;    ///< (C), or null

  // Forward, and the sums of the backward.
  const void* grad_output;    ///< map; null in a forward
  void* sums;                 ///< (B, strips, C): of u * u, or of grad_output * u; or null
  void* plain_sums;           ///< (B, strips, C): of grad_output; or null
  const void *scale, *shift;  ///< (B, C), (C), or both null
  void* output;               ///< map: u * scale + shift, or u; or null

  // Gradients: that of u is grad_output * scale + u * slope.
  const void* slope;            ///< (B, C)
  void* grad_input;             ///< map
  void* partial_sums;           ///< (B, strips, 10, C): of the gradients of the 9 taps, and of the bias
  const void* grads_of_images;  ///< (B, 2, C): of gamma and beta
  void *grad_weight, *grad_bias, *grad_gamma, *grad_beta;  ///< (C, 3, 3), (C), (C), (C)
};

}  // namespace overlock_mm
