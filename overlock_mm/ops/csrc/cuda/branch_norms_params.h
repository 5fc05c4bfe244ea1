// Parameters of the CUDA kernels of branch norms: plain numbers and pointers, nothing of torch. Maps are channels_last
// in memory. All other numbers have the accumulation type.
#pragma once

#include <cstdint>

#include "../branch_norms.h"
#include "../host_device.h"
#include "dtype.h"

namespace overlock_mm {

/// Branches, their norms and one map. A launcher says which pointers it reads and writes.
///
/// With y a branch's output, N the number of positions of all images (and processes), g the gradient of the operator's
/// output and products the sums of g * (y - mean), the gradient of y is
///     scale * (g - grad_mean - (y - mean) * product_mean / (variance + eps)),  scale = norm_weight / sqrt(variance +
///     eps)
/// where grad_mean = sum(g) / N and product_mean = products / N.
struct CudaBranchNormsParams {
  static constexpr int kMostBranches = BranchNormsParams::kMostBranches;

  Dtype dtype;  ///< of maps
  int64_t batch, channels, height, width;
  int branches;
  int64_t kernel_size[kMostBranches], dilation[kMostBranches];  ///< The first reaches furthest.
  double eps;
  int64_t parts;  ///< of the positions: a thread block sums over one of them

  const void* input;                                                     ///< map
  const void* weights[kMostBranches];                                    ///< (C, k, k)
  const void *norm_weights[kMostBranches], *norm_biases[kMostBranches];  ///< (C)

  // Statistics: of a part the number of positions, the means and the sums of squared distances from them.
  int64_t* partial_counts;                ///< (parts)
  void *partial_means, *partial_squares;  ///< (parts, branches, C)
  void *mean, *variance;                  ///< (branches, C)
  void *kernel, *bias;                    ///< (C, K, K) and (C): the convolution that the branches are

  // Backward.
  const void* grad_output;    ///< map
  void* partial_products;     ///< (parts, branches + 1, C): the products, and the sum of grad_output
  void *grad_sum, *products;  ///< (C) and (branches, C), divided by `divisor`
  double divisor;
  void *grad_norm_weights, *grad_norm_biases;  ///< (branches, C) both, or null
  const void *grad_mean, *product_mean;        ///< (C) and (branches, C)
  void* grad_branches;                         ///< (branches, B, H, W, C), of the map's dtype
  void* grad_input;                            ///< map
  void* partial_grad_weights;                  ///< (parts, C * taps)
  int64_t weight_parts;                        ///< of the positions: parts of partial_grad_weights
  void* grad_weights;                          ///< (C * taps): those of the branches one after the other

  OVERLOCK_MM_HOST_DEVICE int64_t image_size() const { return height * width * channels; }
  OVERLOCK_MM_HOST_DEVICE int64_t positions() const { return batch * height * width; }
  OVERLOCK_MM_HOST_DEVICE int64_t reach(int branch) const { return kernel_size[branch] / 2 * dilation[branch]; }
  OVERLOCK_MM_HOST_DEVICE int64_t taps() const { return first_tap(branches); }
  /// Taps of the branches before it.
  OVERLOCK_MM_HOST_DEVICE int64_t first_tap(int branch) const {
    int64_t sum = 0;
    for (int i = 0; i < branch; ++i) sum += kernel_size[i] * kernel_size[i];
    return sum;
  }
};

}  // namespace overlock_mm
