// Launchers of the CUDA kernels of squeeze-excitations: x * gate, or x * gate * silu(other). They do not allocate or
// synchronise, so that a CUDA graph may capture them, and no sum depends on the order in which threads run.
//
// Launches, and the bytes that each moves (every operand once), for a map of M bytes. Sums, gates and parameters are
// small. The launches of scale_and_shift_launch.h stand in brackets.
//
//   forward    [sums] M · gates · [scale_and_shift] 2 M
//   backward   [sums] 2 M · gate_gradients · weight_gradients · [scale_and_shift] 2 M
//
// with another map
//
//   forward    [sums] M · gates · gated_forward 3 M
//   backward   gated_sums 3 M · gate_gradients · weight_gradients · gated_gradients 5 M
//
// tools/benchmarks/operator_costs.py states the same, and tests/test_ops/test_cuda_squeeze_excitation.py compares that
// with the emulation.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"
#include "scale_and_shift_launch.h"

namespace overlock_mm {

/// All of the accumulation type, float64 for float64 maps and float32 for all others. R is the number of hidden
/// channels.
struct SqueezeExcitationParams {
  int64_t batch, positions, channels, hidden, strips;
  const void *reduce_weight, *reduce_bias;  ///< (R, C), (R)
  const void *expand_weight, *expand_bias;  ///< (C, R), (C)
  const void* partial_sums;  ///< (strips, B, C): of the map, or, backward, of its products with grad_output
  void* mean;                ///< (B, C): over the positions
  void* squeezed;            ///< (B, R): the hidden numbers before the GELU
  void* gate;                ///< (B, C)

  // Backward only. The forward has written mean, squeezed and gate.
  void* grad_mean;      ///< (B, C): for each position
  void* grad_squeezed;  ///< (B, R)
  void* grad_expanded;  ///< (B, C): of the numbers before the sigmoid
  void *grad_reduce_weight, *grad_reduce_bias, *grad_expand_weight, *grad_expand_bias;
};

/// Maps (B, positions, C), with a scale for each image, the gate. shift is grad_mean, of the backward alone.
struct GatedMapParams : ScaleAndShiftParams {
  void* grad_other;
};

/// Launch on the current device. Without images or positions nothing is launched.
cudaError_t launch_gates(const SqueezeExcitationParams& params, Dtype dtype, cudaStream_t stream);
/// grad_mean, grad_squeezed and grad_expanded.
cudaError_t launch_gate_gradients(const SqueezeExcitationParams& params, Dtype dtype, cudaStream_t stream);
/// The gradients of the parameters, from those of launch_gate_gradients.
cudaError_t launch_weight_gradients(const SqueezeExcitationParams& params, Dtype dtype, cudaStream_t stream);

/// output: input * scale * silu(other).
cudaError_t launch_gated_forward(const GatedMapParams& params, Dtype dtype, cudaStream_t stream);
/// partial_sums: of grad_output * input * silu(other).
cudaError_t launch_gated_sums(const GatedMapParams& params, Dtype dtype, cudaStream_t stream);
/// grad_input: grad_output * scale * silu(other) + shift, and grad_other.
cudaError_t launch_gated_gradients(const GatedMapParams& params, Dtype dtype, cudaStream_t stream);

}  // namespace overlock_mm
