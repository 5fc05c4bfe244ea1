// Residual depth-wise convolution and response norm in one, for tensors on the CPU.
#include <torch/library.h>

#include <vector>

#include "../checks.h"
#include "launch.h"

namespace overlock_mm {
namespace cpu {
namespace {

/// Of each strip but the first, the line before it and its first, (B, 2 (strips - 1), W, C), copied.
Tensor borders_of_strips(const Tensor& input, int64_t strips) {
  std::vector<int64_t> lines;
  for (int64_t strip = 1; strip < strips; ++strip) {
    const int64_t first = strip * input.size(2) / strips;
    lines.insert(lines.end(), {first - 1, first});
  }
  return input.permute({0, 2, 3, 1}).index_select(1, at::tensor(lines, at::kLong)).contiguous();
}

/// The convolution, from `input` to `output`, which may be the input. On the way it sums the squares of its output, (B,
/// strips, C), if they are wanted.
Tensor launch_convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Tensor& output,
                          bool with_squares) {
  const Tensor kernel = as_parameter(weight, input), shift = bias ? as_parameter(*bias, input) : Tensor();
  DepthwiseConv2dParams p = depthwise_conv2d_params(input, kernel, /*dilation=*/1, /*residual=*/true);
  p.strips = strips_for_sums(p.batch, p.height, 8);
  const Tensor squares = with_squares ? at::empty({p.batch, p.strips, p.channels}, kernel.options()) : Tensor();
  p.output = output.mutable_data_ptr();
  Tensor borders;
  if (p.output == p.input && p.strips > 1) {
    borders = borders_of_strips(input, p.strips);
    p.borders = borders.const_data_ptr();
  }
  p.bias = shift.defined() ? shift.const_data_ptr() : nullptr;
  p.squares = with_squares ? squares.mutable_data_ptr() : nullptr;
  with_kernels<DepthwiseConv2dKernels>(input.scalar_type(), [&](const auto& kernels) {
    in_parallel(p.batch * p.strips, [&](int64_t begin, int64_t end) { kernels.stream(p, begin, end); });
  });
  return squares;
}

}  // namespace

std::pair<Tensor, Tensor> launch_residual_depthwise_norm(const Tensor& input, const Tensor& weight,
                                                         const OptionalTensor& bias, const Tensor& gamma,
                                                         const Tensor& beta, double eps, const Tensor& output) {
  if (input.numel() == 0) {
    const Tensor zeros = at::zeros({input.size(0), input.size(1)}, input.options());
    return {zeros, at::ones_like(zeros)};
  }
  const Tensor squares = launch_convolution(input, weight, bias, output, /*with_squares=*/true);
  const auto [response, scale] = response_and_scale(squares, as_parameter(gamma, input), eps);
  launch_scale_and_shift(output, scale, Tensor(), Tensor(), as_parameter(beta, input), output);
  return {response, scale};
}

void launch_residual_depthwise_normed(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                      const Tensor& scale, const Tensor& beta, const Tensor& output) {
  if (input.numel() == 0) return;
  launch_convolution(input, weight, bias, output, /*with_squares=*/false);
  launch_scale_and_shift(output, as_parameter(scale, input), Tensor(), Tensor(), as_parameter(beta, input), output);
}

}  // namespace cpu

namespace {

using namespace cpu;

Tensor residual_depthwise_norm_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                   const Tensor& gamma, const Tensor& beta, double eps) {
  check_residual_depthwise_norm(x, weight, bias, gamma, beta);
  const Tensor input = as_input(x), output = empty_output(input);
  launch_residual_depthwise_norm(input, weight, bias, gamma, beta, eps, output);
  return as_output(output, x);
}

void residual_depthwise_norm_inplace_cpu(Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                         const Tensor& gamma, const Tensor& beta, double eps) {
  check_residual_depthwise_norm(x, weight, bias, gamma, beta);
  x.mutable_data_ptr();  // a copy-on-write tensor becomes one of its own before its input is read
  const Tensor input = as_input(x);
  launch_residual_depthwise_norm(input, weight, bias, gamma, beta, eps, input);
  if (input.is_same(x)) return;
  if (x.is_contiguous() && x.scalar_type() == input.scalar_type() && x.numel() > 0) {
    launch_transpose(input, x, x.size(0), x.size(2) * x.size(3), x.size(1));
  } else {
    x.copy_(input);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(overlock_mm, CPU, m) {
  m.impl("residual_depthwise_norm", &residual_depthwise_norm_cpu);
  m.impl("residual_depthwise_norm_", &residual_depthwise_norm_inplace_cpu);
}

}  // namespace overlock_mm
