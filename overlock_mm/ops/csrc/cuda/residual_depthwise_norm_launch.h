// Launchers of the CUDA kernels of residual depth-wise convolutions with a response norm behind them, and a GELU before
// them. They do not allocate or synchronise, so that a CUDA graph may capture them, and no sum depends on the order in
// which threads run.
//
// Launches, and the bytes that each moves (every operand once), for a map of M bytes. Sums, factors and parameters are
// small. The launches of response_norm_launch.h stand in brackets.
//
//   forward   residual_depthwise M: sums · [response_factors] · residual_depthwise 2 M: u again, normalised
//   again     residual_depthwise 2 M, with factors that are known
//   in place  residual_depthwise 2 M: sums and u · [response_factors] · [scale_and_shift] 2 M
//   backward  residual_depthwise 2 M: sums · [response_factors] · gradients 3 M · parameter_gradients
//
// tools/benchmarks/operator_costs.py states the same, and tests/test_ops/test_cuda_norms.py compares that with the
// emulation.
#pragma once

#include <cuda_runtime_api.h>

#include "../residual_depthwise_norm.h"
#include "dtype.h"

namespace overlock_mm {

/// Sets rows, warps and strips. They depend on the shape alone.
void residual_depthwise_norm_tiling(ResidualDepthwiseNormParams* params);

// Launch on the current device. Without images or channels nothing is launched.

/// Sums and output, as far as they are wanted.
cudaError_t launch_residual_depthwise(const ResidualDepthwiseNormParams& params, Dtype dtype, cudaStream_t stream);
/// grad_input and partial_sums.
cudaError_t launch_residual_depthwise_gradients(const ResidualDepthwiseNormParams& params, Dtype dtype,
                                                cudaStream_t stream);
/// The gradients of the parameters, from partial_sums and grads_of_images.
cudaError_t launch_parameter_gradients(const ResidualDepthwiseNormParams& params, Dtype dtype, cudaStream_t stream);

}  // namespace overlock_mm
