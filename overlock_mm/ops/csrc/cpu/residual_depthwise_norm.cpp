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

/// The convolution, with a norm or its sums of squares.
struct Convolution {
  Tensor kernel, conv_shift, norm_shift, borders;
  DepthwiseConv2dParams params;
  at::ScalarType dtype;

  /// The output may be the input.
  Convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Tensor& beta,
              const Tensor& output)
      : kernel(as_parameter(weight, input)),
        conv_shift(bias ? as_parameter(*bias, input) : Tensor()),
        norm_shift(as_parameter(beta, input)),
        params(depthwise_conv2d_params(input, kernel, /*dilation=*/1, /*residual=*/true)),
        dtype(input.scalar_type()) {
    params.strips = strips_for_sums(params.batch, params.height, 8);
    params.output = output.mutable_data_ptr();
    if (params.output == params.input && params.strips > 1) {
      borders = borders_of_strips(input, params.strips);
      params.borders = borders.const_data_ptr();
    }
    params.bias = conv_shift.defined() ? conv_shift.const_data_ptr() : nullptr;
  }

  /// One of bfloat16 would be rounded twice, before the norm and after it. So it is made twice, and its norm is in its
  /// weights.
  bool has_norm_within() const { return params.bfloat16; }

  void launch(const DepthwiseConv2dParams& p) const {
    with_kernels<DepthwiseConv2dKernels>(dtype, [&](const auto& kernels) {
      in_parallel(p.batch * p.strips, [&](int64_t begin, int64_t end) { kernels.stream(p, begin, end); });
    });
  }

  /// The sums of the squares of its output, (B, strips, C). The output is written, unless it would have no norm.
  Tensor launch_squares() const {
    const Tensor squares = at::empty({params.batch, params.strips, params.channels}, kernel.options());
    DepthwiseConv2dParams p = params;
    p.squares = squares.mutable_data_ptr();
    if (has_norm_within()) p.output = nullptr;
    launch(p);
    return squares;
  }

  void launch_normed(const Tensor& scale) const {
    DepthwiseConv2dParams p = params;
    p.scale = scale.const_data_ptr();
    p.shift = norm_shift.const_data_ptr();
    launch(p);
  }
};

}  // namespace

std::pair<Tensor, Tensor> launch_residual_depthwise_norm(const Tensor& input, const Tensor& weight,
                                                         const OptionalTensor& bias, const Tensor& gamma,
                                                         const Tensor& beta, double eps, const Tensor& output) {
  if (input.numel() == 0) {
    const Tensor zeros = at::zeros({input.size(0), input.size(1)}, input.options().dtype(accumulation_type(input)));
    return {zeros, at::ones_like(zeros)};
  }
  const Convolution convolution(input, weight, bias, beta, output);
  const auto [response, scale] = response_and_scale(convolution.launch_squares(), as_parameter(gamma, input), eps);
  if (convolution.has_norm_within()) {
    convolution.launch_normed(scale);
  } else {
    launch_scale_and_shift(output, scale, Tensor(), Tensor(), convolution.norm_shift, output);
  }
  return {response, scale};
}

void launch_residual_depthwise_normed(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                      const Tensor& scale, const Tensor& beta, const Tensor& output) {
  if (input.numel() == 0) return;
  const Convolution convolution(input, weight, bias, beta, output);
  const Tensor factors = as_parameter(scale, input);
  if (convolution.has_norm_within()) return convolution.launch_normed(factors);
  convolution.launch(convolution.params);
  launch_scale_and_shift(output, factors, Tensor(), Tensor(), convolution.norm_shift, output);
}

}  // namespace cpu

namespace {

using namespace cpu;

Tensor residual_depthwise_norm_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                   const Tensor& gamma, const Tensor& beta, double eps) {
  check_residual_depthwise_norm(x, weight, bias, gamma, beta);
  const Tensor input = as_map(x), output = empty_output(input);
  launch_residual_depthwise_norm(input, weight, bias, gamma, beta, eps, output);
  return as_output(output, x);
}

void residual_depthwise_norm_inplace_cpu(Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                         const Tensor& gamma, const Tensor& beta, double eps) {
  check_residual_depthwise_norm(x, weight, bias, gamma, beta);
  x.mutable_data_ptr();  // a copy-on-write tensor becomes one of its own before its input is read
  const Tensor input = as_map(x);
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
