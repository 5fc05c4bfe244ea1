// The CPU kernels of depth-wise convolutions, compiled once for every instruction set.
#pragma once

#include "../depthwise_conv2d.h"

namespace overlock_mm::cpu {

template <typename T>
struct DepthwiseConv2dKernels {
  int64_t lanes;

  // A convolution is streamed line by line with all channels (small kernels, which are bound by memory: B * strips
  // items), or done by channel blocks, a vector of channels each (B * strips * blocks items).
  void (*stream)(const DepthwiseConv2dParams&, int64_t begin, int64_t end);
  void (*stream_backward)(const DepthwiseConv2dParams&, int64_t begin, int64_t end);
  void (*convolve)(const DepthwiseConv2dParams&, int64_t begin, int64_t end);
  void (*convolve_bfloat16)(const DepthwiseConv2dParams&, int64_t begin, int64_t end);  ///< null: no instruction for it
  void (*weight_gradient)(const DepthwiseConv2dParams&, int64_t begin, int64_t end);
};

}  // namespace overlock_mm::cpu
