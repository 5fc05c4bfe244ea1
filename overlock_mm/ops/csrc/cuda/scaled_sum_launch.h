// Launchers of the CUDA kernels of scaled sums. They do not allocate or synchronise, so that a CUDA graph may capture
// them, and no sum depends on the order in which threads run.
//
// Launches, and the bytes that each moves (every operand once), for a map of M bytes:
//
//   forward    1   3 M
//   backward   2   5 M and the partial sums; the partial sums again, and the gradients
//
// tools/benchmarks/operator_costs.py states the same, and tests/test_ops/test_cuda_scaled_sum.py compares that with
// the emulation.
#pragma once

#include "scale_and_shift_launch.h"

namespace overlock_mm {

/// Of those of scales and shifts, by_image is false, and grad_scale is (2, C), of scale and other_scale. partial_sums
/// is (strips, B, 3, C).
struct ScaledSumParams : ScaleAndShiftParams {
  int64_t input_step;       ///< from a position of input to the next: C, or more of a slice of channels
  const void* other_scale;  ///< as scale
  const void* other_shift;  ///< as shift
  void* grad_other;         ///< map
};

/// Launch on the current device. Without positions nothing is launched.
cudaError_t launch_scaled_sum_forward(const ScaledSumParams& params, Dtype dtype, cudaStream_t stream);
cudaError_t launch_scaled_sum_backward(const ScaledSumParams& params, Dtype dtype, cudaStream_t stream);

}  // namespace overlock_mm
