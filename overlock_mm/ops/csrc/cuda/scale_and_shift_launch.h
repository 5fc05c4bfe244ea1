// Launchers of the CUDA kernels of scales and shifts. They do not allocate or synchronise, so that a CUDA graph may
// capture them, and no sum depends on the order in which threads run.
//
// Launches, and the bytes that each moves (every operand once), for a map of M bytes:
//
//   forward    1   2 M, and 1 M of a map that is added
//   backward   2   3 M and the partial sums; the partial sums again, and the gradients
//   sums       1   1 M, or 2 M of products, and the partial sums
//
// tools/benchmarks/operator_costs.py states the same, and tests/test_ops/test_cuda_scale_and_shift.py compares that
// with the emulation.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace overlock_mm {

/// A map (B, positions, C) of any dtype. Everything else has the accumulation type, float64 for float64 maps and
/// float32 for all others.
struct ScaleAndShiftParams {
  int64_t batch, positions, channels;
  bool by_image;      ///< whether each image has its own scale, and, in the forward, its own shift
  const void* input;  ///< map
  const void* scale;  ///< (C) or (B, C)
  const void* shift;  ///< as scale, or null
  const void* other;  ///< map that is added, or null
  void* output;       ///< map

  // Backward and sums only.
  const void* grad_output;  ///< map
  void* grad_input;         ///< map
  int64_t strips;           ///< scale_and_shift_strips(...): parts of an image
  void* partial_sums;       ///< (strips, B, C), or in a backward with a shift (strips, B, 2, C)
  void* grad_scale;         ///< as scale
  void* grad_shift;         ///< (C), or null
};

int64_t scale_and_shift_strips(const ScaleAndShiftParams& params);

/// Launch on the current device. Without positions nothing is launched.
cudaError_t launch_scale_and_shift_forward(const ScaleAndShiftParams& params, Dtype dtype, cudaStream_t stream);
cudaError_t launch_scale_and_shift_backward(const ScaleAndShiftParams& params, Dtype dtype, cudaStream_t stream);
/// The partial sums of input, or, if there is grad_output, of its products with input.
cudaError_t launch_sums_over_positions(const ScaleAndShiftParams& params, Dtype dtype, cudaStream_t stream);

}  // namespace overlock_mm
