// Launchers of the CUDA kernels of layer norms over the channels. They do not allocate or synchronise, so that a CUDA
// graph may capture them, and no sum depends on the order in which threads run.
//
// Launches, and the bytes that each moves (every operand once), for a map of M bytes:
//
//   forward    1   2 M, the parameters, and the statistics if they are wanted
//   backward   2   3 M, and 1 M of a gradient that is added, the weight, the statistics, the partial sums; the partial
//   sums again, and the gradients
//
// tools/benchmarks/operator_costs.py states the same, and tests/test_ops/test_cuda_layer_norm.py compares that with the
// emulation.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace overlock_mm {

/// A map (positions, C) of any dtype. Everything else has the accumulation type, float64 for float64 maps and float32
/// for all others.
struct LayerNormParams {
  int64_t positions, channels;
  const void* input;   ///< map
  const void* weight;  ///< (C)
  void *mean, *rstd;   ///< (positions): written by the forward, unless they are null, and read by the backward

  const void* bias;  ///< (C)
  double eps;
  void* output;  ///< map

  // Backward only.
  const void* grad_output;        ///< map
  const void* other_grad;         ///< map: a gradient of input that is added to this one, or null
  void* grad_input;               ///< map
  int64_t partials;               ///< layer_norm_partials(...)
  void* partial_sums;             ///< (partials, 2 * C)
  void *grad_weight, *grad_bias;  ///< (C)
};

int64_t layer_norm_partials(const LayerNormParams& params, Dtype dtype);

/// Launch on the current device. Without positions nothing is launched. The backward of more than 6,144 channels (3,072
/// of float64) does not fit on every GPU: the launch fails with cudaErrorInvalidValue then.
cudaError_t launch_layer_norm_forward(const LayerNormParams& params, Dtype dtype, cudaStream_t stream);
cudaError_t launch_layer_norm_backward(const LayerNormParams& params, Dtype dtype, cudaStream_t stream);

}  // namespace overlock_mm
