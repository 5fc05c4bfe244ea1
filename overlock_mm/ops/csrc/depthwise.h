// What the kernels of static depth-wise convolutions are given: plain numbers and pointers, nothing of torch.
//
// Maps are (B, C, H, W) laid out channels_last: the channels of a position lie side by side, positions row-major.
// Strides are 1, positions outside the map are 0, and outputs have the map of the input.
#pragma once

#include <cstdint>

namespace overlock_mm {

/// Matrices of (rows, columns), to be laid out by columns.
struct TransposeParams {
  static constexpr int64_t kBlock = 64;  ///< rows and columns that are worked on together

  int64_t batch, rows, columns;
  const void* from;
  void* to;
};

/// One convolution, of f(input), where f is GELU or nothing: output = conv(f(input)) + bias, and + f(input) if
/// residual.
struct DepthwiseParams {
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

/// Parallel convolutions of one map, each followed by a batch norm over the batch, summed. Weights of all branches lie
/// side by side: (C, taps) with taps the sum of k * k. No branch reaches further than `reach` positions.
struct BranchParams {
  static constexpr int kMost = 8;

  int64_t batch, channels, height, width;
  int64_t strips;
  int branches;
  int64_t kernel_size[kMost], dilation[kMost];  ///< kernel_size odd
  int64_t reach;

  const void* input;    ///< map
  const void* weights;  ///< (C, taps)

  // Statistics of the branches' outputs over a strip: their mean, and the sum of squared distances from it.
  void* means;    ///< (B, strips, branches, C)
  void* squares;  ///< likewise

  // Backward: with y a branch's output, the gradient of y is scale * (grad - slope * (y - mean)), with grad that of the
  // output less its mean, and slope = slope_of_product * product, the sum of grad * (y - mean) over the batch. An item
  // is a block of channels of one image, or of the whole batch. The batch in one, all is done in one pass. Image by
  // image there are two: the first makes the products only, and is the one without a grad_input.
  bool whole_batch;
  const void* grad_output;                      ///< map
  const void* grad_mean;                        ///< (C): the mean of grad_output
  const void *mean, *scale, *slope_of_product;  ///< (branches, C)
  void* products;                               ///< (B, branches, C)
  void* grad_input;                             ///< map, or null
  void* grad_weights;                           ///< (B, C, taps), to be summed over the first

  int64_t taps() const {
    int64_t sum = 0;
    for (int i = 0; i < branches; ++i) sum += kernel_size[i] * kernel_size[i];
    return sum;
  }
};

/// Global response normalisation: output = input * (gamma * response + 1) + beta.
struct ResponseNormParams {
  int64_t batch, channels, positions, strips;
  const void* input;  ///< map
  const void* other;  ///< map, or null: of what products are summed with the input
  void* sums;         ///< (B, strips, C): of input * other
  void* plain_sums;   ///< (B, strips, C): of other, or null
  // output = input * scale + other * other_scale + shift, per image and channel.
  const void *scale, *other_scale, *shift;  ///< (B, C), (B, C) or null with other, (C) or null
  void* output;
};

}  // namespace overlock_mm
