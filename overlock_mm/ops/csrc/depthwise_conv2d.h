// Parameters of the depth-wise convolution kernels: plain numbers and pointers, nothing of torch.
//
// Maps are (B, C, H, W) laid out channels_last: the channels of a position lie side by side, positions row-major.
// Strides are 1, positions outside the map are 0, and outputs have the map of the input.
#pragma once

#include <cstdint>

namespace overlock_mm {

/// output = conv(input) + bias, and + input if residual.
struct DepthwiseConv2dParams {
  int64_t batch, channels, height, width;
  int64_t kernel_size, dilation;  ///< kernel_size odd
  bool residual;
  int64_t strips;  ///< parts of an image, of whole lines: a work item each

  const void* input;   ///< map
  const void* weight;  ///< (C, k, k) contiguous
  const void* bias;    ///< (C), or null
  void* output;        ///< map
  bool bfloat16;       ///< Maps are bfloat16, all other data float32. Not for convolve() and weight_gradient().
  // Only for the streamed kernels.
  const void* scale;    ///< (B, C): the output is multiplied by it, or null
  const void* shift;    ///< (C): with a scale, added to the output then
  void* squares;        ///< (B, strips, C): sums of the output's squares, or null. There may be no output with them
  const void* borders;  ///< in place: the input's lines on both sides of a cut, (B, strips - 1, 2, W, C); else null

  // Backward only.
  const void* grad_output;  ///< map
  void* grad_input;         ///< map, or null
  void* grad_weight;        ///< (B, strips, C, k, k), to be summed over the first two, or null
  void* grad_bias;          ///< (B, strips, C), likewise
};

}  // namespace overlock_mm
