// Launchers of the CUDA kernels of response norms. They do not allocate or synchronise, so that a CUDA graph may
// capture them, and no sum depends on the order in which threads run.
//
// Launches, and the bytes that each moves (every operand once), for a map of M bytes. Sums and factors are small.
//
//   _response_norm            channel_sums M · response_factors · scale_and_shift 2 M
//   _response_normed          scale_and_shift 2 M
//   _response_norm_backward   channel_sums 2 M · response_factors · response_norm_gradients 3 M
//
// tools/benchmarks/gpu_cost.py counts them so, and tests/test_ops/test_cuda_norms.py compares that with the emulation.
#pragma once

#include <cuda_runtime_api.h>

#include "../response_norm.h"
#include "dtype.h"

namespace overlock_mm {

/// What makes factors of sums. All data have the accumulation type.
struct ResponseFactorsParams {
  int64_t batch, channels, strips;
  double eps;
  const void* sums;        ///< (B, strips, C): of squares; in a backward, of the gradient of the output times the map
  const void* plain_sums;  ///< (B, strips, C): of the gradient of the output. Null in a forward
  const void* gamma;       ///< (C)
  void* response;          ///< (B, C): written in a forward, read in a backward
  void* scale;             ///< (B, C)
  // Only in a backward. The gradient of the map is that of the output * scale + map * slope.
  void* slope;            ///< (B, C)
  void* grads_of_images;  ///< (B, 2, C): each image's part of the gradients of gamma and beta
};

/// The gradients, with ResponseNormParams::output for that of the map.
struct ResponseNormGradientsParams : ResponseNormParams {
  const void* grads_of_images;   ///< ResponseFactorsParams::grads_of_images
  void *grad_gamma, *grad_beta;  ///< (C)
};

/// ResponseNormParams::strips: depends on the shape alone.
int64_t response_norm_strips(const ResponseNormParams& params);

// Launch on the current device. Without images or channels nothing is launched.

/// ResponseNormParams::sums and, with other, plain_sums.
cudaError_t launch_channel_sums(const ResponseNormParams& params, Dtype dtype, cudaStream_t stream);
/// ResponseNormParams::output, without other.
cudaError_t launch_scale_and_shift(const ResponseNormParams& params, Dtype dtype, cudaStream_t stream);
cudaError_t launch_response_factors(const ResponseFactorsParams& params, Dtype dtype, cudaStream_t stream);
cudaError_t launch_response_norm_gradients(const ResponseNormGradientsParams& params, Dtype dtype, cudaStream_t stream);

}  // namespace overlock_mm
