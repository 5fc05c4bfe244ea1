// Launchers of the CUDA kernels of depth-wise convolutions. They do not allocate or synchronise, so that a CUDA graph
// may capture them, and no sum depends on the order in which threads run.
//
// Launches, and the bytes that each moves (every operand once), for a map of M bytes:
//
//   forward, gradient of the input   1   2 M, the kernel and the bias
//   gradients of kernel and bias     2   2 M and the partial sums; the partial sums again, and the gradients
//   the same of a walk               2   3 M with the input's gradient, 2 M without it; and the kernel
//
// The gradients of a 3x3 kernel without dilation are a walk. If only the input's is wanted, it is as for the others.
//
// tools/benchmarks/gpu_cost.py counts them so, and tests/test_ops/test_cuda_depthwise.py compares that with the
// emulation.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace overlock_mm {

/// A depth-wise convolution of stride 1. Maps are (B, H, W, C), all of one dtype. Parameters and their gradients have
/// the accumulation type, float64 for float64 maps and float32 for all others.
struct DepthwiseParams {
  int64_t batch, channels, height, width;
  int64_t kernel_size, dilation;  ///< kernel_size odd
  const void* input;              ///< map

  // output = conv(input) + bias, and + input if residual.
  const void* weight;  ///< (C, k, k)
  const void* bias;    ///< (C), or null
  void* output;        ///< map
  bool residual;
  bool flipped;  ///< The kernel is turned by 180 degrees, as for the gradient of the input.

  // Gradients, as far as they are wanted.
  const void* grad_output;  ///< map
  void* grad_input;         ///< map, or null
  int64_t partials;         ///< depthwise_partials(...)
  void* partial_sums;       ///< (partials, C * k * k + C); the last C, of the bias, are not used without grad_bias
  void* grad_weight;        ///< (C, k, k), or null: no gradients of the parameters
  void* grad_bias;          ///< (C), or null
};

/// DepthwiseParams::partials on a device whose blocks may have so many bytes of shared memory, and on the current one.
int64_t depthwise_partials(const DepthwiseParams& params, Dtype dtype, int64_t shared_memory);
cudaError_t depthwise_partials(const DepthwiseParams& params, Dtype dtype, int64_t* partials);

// Launch on the current device. Of an empty map nothing is launched.

cudaError_t launch_depthwise_forward(const DepthwiseParams& params, Dtype dtype, cudaStream_t stream);
/// The gradients that are wanted.
cudaError_t launch_depthwise_backward(const DepthwiseParams& params, Dtype dtype, cudaStream_t stream);

}  // namespace overlock_mm
