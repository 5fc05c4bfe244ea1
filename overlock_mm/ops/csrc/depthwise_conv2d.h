// What the kernels of depth-wise convolutions are given: plain numbers and pointers, nothing of torch.
//
// Maps are (B, C, H, W) laid out channels_last: the channels of a position lie side by side, positions row-major.
// Strides are 1, positions outside the map are 0, and outputs have the map of the input.
#pragma once

#include <cstdint>

namespace overlock_mm {

/// One convolution, of f(input), where f is GELU or nothing: output = conv(f(input)) + bias, and + f(input) if
/// residual.
struct DepthwiseConv2dParams {
  int64_t batch, channels, height, width;
  int64_t kernel_size, dilation;  ///< kernel_size odd
  bool residual, gelu;            ///< gelu and the fused backward: for kernel size 3 without dilation
  int64_t strips;                 ///< parts of an image, of whole lines, that are worked on apart

  const void* input;   ///< map
  const void* weight;  ///< (C, k, k) contiguous
  const void* bias;    ///< (C), or null
  void* output;        ///< map
  // Of the streamed form.
  bool bfloat16;        ///< maps are bfloat16, all else float32
  void* squares;        ///< (B, strips, C): sums of the output's squares, or null
  const void* borders;  ///< in place: (B, strips - 1, 2, W, C), the input's lines on both sides of a cut; else null

  // Backward only.
  const void* grad_output;  ///< map
  void* grad_input;         ///< map, or null
  void* grad_weight;        ///< (B, strips, C, k, k), to be summed over the first two, or null
  void* grad_bias;          ///< (B, strips, C), likewise
};

}  // namespace overlock_mm
