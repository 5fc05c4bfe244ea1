// Shared by the launchers of the CPU kernels: threads, parts of a map, and the layout that the kernels take.
//
// A launcher checks its arguments, brings maps into that layout, allocates, and runs the phases of an operator.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "../tensors.h"
#include "dispatch.h"

namespace overlock_mm::cpu {

/// Call function(begin, end) for parts of [0, items), on all threads.
template <typename Function>
void in_parallel(int64_t items, Function function) {
  at::parallel_for(0, items, 1, function);
}

/// Call function(kernels) with those for float or double.
template <template <typename> class Kernels, typename Function>
void with_kernels(at::ScalarType dtype, Function function) {
  if (dtype == at::kDouble) {
    function(best_table<Kernels<double>>());
  } else {
    function(best_table<Kernels<float>>());
  }
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Strips of an image for sums. Their number depends on the shape alone, so that every number of threads adds up in the
/// same order. There are `items` without strips; a strip has `least` lines or more.
inline int64_t strips_for_sums(int64_t items, int64_t height, int64_t least) {
  return std::max<int64_t>(1, std::min(divide_up(32, std::max<int64_t>(items, 1)), height / least));
}

// Layout.

/// Matrices of (rows, columns) at `from`, laid out by columns at `to`.
void launch_transpose(const Tensor& from, const Tensor& to, int64_t batch, int64_t rows, int64_t columns);

/// A map as the kernels take it: channels_last, half types through float32.
Tensor as_input(const Tensor& map);
Tensor as_parameter(const Tensor& parameter, const Tensor& map);
/// The same for kernels that read and write bfloat16 too: such maps stay as they are, if they are channels_last.
Tensor as_map(const Tensor& map);
/// Both in the same dtype.
std::pair<Tensor, Tensor> as_maps(const Tensor& a, const Tensor& b);
/// For a result of a kernel, in the layout and dtype of `input`. Not initialised.
Tensor empty_output(const Tensor& input);
/// A result as the meta kernels describe it: with the dtype and layout of `like`.
Tensor as_output(const Tensor& map, const Tensor& like);

// Launchers that other operators use. Maps and parameters are as the kernels take them.

DepthwiseConv2dParams depthwise_conv2d_params(const Tensor& input, const Tensor& weight, int64_t dilation,
                                              bool residual);
Tensor launch_depthwise_conv2d(const Tensor& input, const Tensor& weight, const Tensor& bias, int64_t dilation,
                               bool residual);

/// gelu(x), or its gradient where grad_output is defined.
Tensor launch_gelu(const Tensor& x, const Tensor& grad_output);

/// global_response_norm(x + conv(x, weight) + bias), from `input` to `output`, which may be the input. Returns the
/// response and the scale, (B, C) each.
std::pair<Tensor, Tensor> launch_residual_depthwise_norm(const Tensor& input, const Tensor& weight,
                                                         const OptionalTensor& bias, const Tensor& gamma,
                                                         const Tensor& beta, double eps, const Tensor& output);
/// The same with a scale that is known.
void launch_residual_depthwise_normed(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                      const Tensor& scale, const Tensor& beta, const Tensor& output);

/// Sums over images and positions, (C). (Those of ATen depend on the number of threads.)
Tensor launch_channel_sums(const Tensor& map);
/// Of sums of squares, (B, strips, C): the response, (B, C), and the factors of the norm, (B, C).
std::pair<Tensor, Tensor> response_and_scale(const Tensor& squares, const Tensor& gamma, double eps);
/// input * scale + other * other_scale + shift, with scales (B, C) and shift (C), in `output`, which may be the input.
/// `other` and `shift` may be undefined.
Tensor launch_scale_and_shift(const Tensor& input, const Tensor& scale, const Tensor& other, const Tensor& other_scale,
                              const Tensor& shift, const Tensor& output);

}  // namespace overlock_mm::cpu
