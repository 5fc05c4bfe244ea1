// Parameters of the branch norm kernels: plain numbers and pointers, nothing of torch. Maps are laid out as in
// depthwise_conv2d.h.
#pragma once

#include <cstdint>

namespace overlock_mm {

/// Parallel convolutions of one map, each followed by a batch norm, summed. The weights of all branches lie side by
/// side: (C, taps), where taps is the sum of k * k. No branch reaches further than `reach` positions.
struct BranchNormsParams {
  static constexpr int kMostBranches = 8;

  int64_t batch, channels, height, width;
  int64_t strips;
  bool bfloat16;  ///< Maps are bfloat16, all other data float32.
  int branches;
  int64_t kernel_size[kMostBranches], dilation[kMostBranches];  ///< kernel_size odd
  int64_t reach;

  const void* input;    ///< map
  const void* weights;  ///< (C, taps)

  // Statistics of the branches' outputs over a strip: their mean, and the sum of squared distances from it.
  void* means;    ///< (B, strips, branches, C)
  void* squares;  ///< likewise

  // Backward. Let y be a branch's output, and grad the gradient of the output less its mean. The gradient of y is
  // scale * (grad - slope * (y - mean)), where slope = slope_of_product * product, and product is the sum of
  // grad * (y - mean) over the batch. A work item is a channel block of one image or of the whole batch. With the whole
  // batch there may be one pass, for which `product` is null. With one image there are two: the first only makes the
  // products, and has no grad_input; for the second, `product` is their sum.
  bool whole_batch;
  const void* grad_output;                      ///< map
  const void* grad_mean;                        ///< (C): the mean of grad_output
  const void *mean, *scale, *slope_of_product;  ///< (branches, C)
  const void* product;                          ///< (branches, C), or null
  void* products;                               ///< (B, branches, C): of each image. Not written if `product` is given
  void* grad_input;                             ///< map, or null
  void* grad_weights;                           ///< (B, C, taps), to be summed over the first

  int64_t taps() const {
    int64_t sum = 0;
    for (int i = 0; i < branches; ++i) sum += kernel_size[i] * kernel_size[i];
    return sum;
  }
};

}  // namespace overlock_mm
