// CPU kernels over channels_last maps, compiled once for every instruction set, and what runs them.
//
// They work in float32 or float64; streamed maps may be bfloat16 in memory. Each function does the items [begin, end)
// of its phase; the items of a phase are independent, and how they are shared out changes no result.
#pragma once

#include "../depthwise.h"

namespace overlock_mm::cpu {

template <typename T>
struct MapKernels {
  int64_t lanes;

  /// B * blocks of rows * blocks of columns items.
  void (*transpose)(const TransposeParams&, int64_t begin, int64_t end);

  // A convolution is streamed line by line with all channels (small kernels, which are bound by memory: B * strips
  // items), or done by blocks of channels, as many as a vector has lanes (B * strips * blocks items).
  void (*stream)(const DepthwiseParams&, int64_t begin, int64_t end);
  void (*stream_backward)(const DepthwiseParams&, int64_t begin, int64_t end);
  void (*convolve)(const DepthwiseParams&, int64_t begin, int64_t end);
  void (*weight_gradient)(const DepthwiseParams&, int64_t begin, int64_t end);

  /// B * strips * blocks items.
  void (*branch_statistics)(const BranchParams&, int64_t begin, int64_t end);
  /// B * blocks items, or, of the whole batch, as many as there are blocks.
  void (*branch_gradients)(const BranchParams&, int64_t begin, int64_t end);

  /// B * strips items.
  void (*channel_sums)(const ResponseNormParams&, int64_t begin, int64_t end);
  void (*combine)(const ResponseNormParams&, int64_t begin, int64_t end);
};

}  // namespace overlock_mm::cpu
