// Depth-wise convolutions for tensors on the CPU.
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include "../checks.h"
#include "launch.h"
#include "onednn.h"

namespace overlock_mm {
namespace {

using namespace cpu;

/// Which kernels are streamed.
bool streams(int64_t kernel_size, int64_t dilation) { return kernel_size == 3 && dilation == 1; }

/// A dilation that gives the same: taps that are further apart than the map is large read its border of zeros. No
/// border is larger than the kernel and the map make it.
int64_t within_map(int64_t dilation, const Tensor& map) {
  return std::min(dilation, std::max<int64_t>({1, map.size(2), map.size(3)}));
}

/// Whether there are kernels that read and write bfloat16: those that stream, and where the processor multiplies
/// bfloat16, all forward ones.
bool has_bfloat16_kernels(int64_t kernel_size, int64_t dilation) {
  return streams(kernel_size, dilation) || best_table<DepthwiseConv2dKernels<float>>().convolve_bfloat16;
}

/// Strips of an image for a forward: enough for all threads, and small enough for a core's cache. No result depends on
/// their number.
int64_t strips_for_outputs(int64_t items, int64_t height, int64_t least, int64_t bytes_of_line, int64_t border) {
  constexpr int64_t cache = 512 * 1024;
  const int64_t for_threads = divide_up(4 * at::get_num_threads(), std::max<int64_t>(items, 1));
  const int64_t lines = std::max(cache / bytes_of_line - 2 * border, std::max<int64_t>(2 * border, 1));
  return std::max<int64_t>(1, std::min(std::max(for_threads, divide_up(height, lines)), divide_up(height, least)));
}

/// With the residual connection as a 1 on the middle tap.
Tensor convolve_by_onednn(const Tensor& input, const Tensor& weight, const Tensor& bias, int64_t dilation,
                          bool residual) {
  Tensor kernel = weight;
  if (residual) {
    const int64_t middle = weight.size(2) / 2;
    kernel = weight.clone();
    kernel.select(3, middle).select(2, middle).add_(1);
  }
  const OptionalTensor shift = bias.defined() ? OptionalTensor(bias) : OptionalTensor();
  return onednn_conv2d(input, kernel, shift, dilation).contiguous(at::MemoryFormat::ChannelsLast);
}

}  // namespace

namespace cpu {

DepthwiseConv2dParams depthwise_conv2d_params(const Tensor& input, const Tensor& weight, int64_t dilation,
                                              bool residual) {
  DepthwiseConv2dParams p{};
  p.batch = input.size(0);
  p.channels = input.size(1);
  p.height = input.size(2);
  p.width = input.size(3);
  p.kernel_size = weight.size(2);
  p.dilation = dilation;
  p.residual = residual;
  p.bfloat16 = input.scalar_type() == at::kBFloat16;
  p.input = input.const_data_ptr();
  p.weight = weight.const_data_ptr();
  return p;
}

Tensor launch_depthwise_conv2d(const Tensor& input, const Tensor& weight, const Tensor& bias, int64_t dilation,
                               bool residual) {
  if (input.numel() == 0) return empty_output(input);
  DepthwiseConv2dParams p = depthwise_conv2d_params(input, weight, dilation, residual);
  if (onednn_is_fast(input, p.kernel_size, p.dilation))
    return convolve_by_onednn(input, weight, bias, dilation, residual);
  const Tensor output = empty_output(input);
  p.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  p.output = output.mutable_data_ptr();
  with_kernels<DepthwiseConv2dKernels>(input.scalar_type(), [&](const auto& kernels) {
    if (streams(p.kernel_size, p.dilation)) {
      p.strips = std::max<int64_t>(1, std::min(divide_up(4 * at::get_num_threads(), p.batch), divide_up(p.height, 8)));
      in_parallel(p.batch * p.strips, [&](int64_t begin, int64_t end) { kernels.stream(p, begin, end); });
      return;
    }
    const int64_t blocks = divide_up(p.channels, kernels.lanes), border = p.kernel_size / 2 * p.dilation;
    const int64_t bytes_of_line = (p.width + 2 * border) * kernels.lanes * weight.element_size();
    p.strips = strips_for_outputs(p.batch * blocks, p.height, 4, bytes_of_line, border);
    const auto convolve = p.bfloat16 ? kernels.convolve_bfloat16 : kernels.convolve;
    in_parallel(p.batch * p.strips * blocks, [&](int64_t begin, int64_t end) { convolve(p, begin, end); });
  });
  return output;
}

}  // namespace cpu

namespace {

Tensor depthwise_conv2d_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t dilation,
                            bool residual) {
  check_depthwise_conv2d(x, weight, bias, dilation);
  dilation = within_map(dilation, x);
  const bool plain = !residual && x.numel() > 0;
  // Inference mode skips autograd's kernel, which otherwise makes this choice, with and without gradients.
  if (plain && c10::InferenceMode::is_enabled() &&
      onednn_is_fast_for_contiguous(x, weight, dilation, /*differentiates=*/false))
    return onednn_conv2d(x, weight, bias, dilation);
  if (plain && onednn_is_fast_in_bfloat16(x, weight, bias, dilation))
    return convolve_by_onednn(x, weight, bias.value_or(Tensor()), dilation, /*residual=*/false);
  const Tensor input = has_bfloat16_kernels(weight.size(2), dilation) ? as_map(x) : as_input(x);
  const Tensor shift = bias ? as_parameter(*bias, x) : Tensor();
  return as_output(launch_depthwise_conv2d(input, as_parameter(weight, x), shift, dilation, residual), x);
}

struct Gradients {
  Tensor input, weight, bias;  ///< as the kernels make them; undefined if not wanted
};

/// All gradients in one pass over the input and grad_output.
Gradients stream_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight, bool residual,
                          std::array<bool, 3> wanted) {
  DepthwiseConv2dParams p = depthwise_conv2d_params(input, weight, /*dilation=*/1, residual);
  p.grad_output = grad_output.const_data_ptr();
  p.strips = strips_for_sums(p.batch, p.height, 8);
  Gradients gradients;
  Tensor partial_weight, partial_bias;
  if (wanted[0]) {
    gradients.input = empty_output(input);
    p.grad_input = gradients.input.mutable_data_ptr();
  }
  if (wanted[1]) {
    partial_weight = at::empty({p.batch * p.strips, p.channels, 1, 3, 3}, weight.options());
    p.grad_weight = partial_weight.mutable_data_ptr();
  }
  if (wanted[2]) {
    partial_bias = at::empty({p.batch * p.strips, p.channels}, weight.options());
    p.grad_bias = partial_bias.mutable_data_ptr();
  }
  with_kernels<DepthwiseConv2dKernels>(input.scalar_type(), [&](const auto& kernels) {
    in_parallel(p.batch * p.strips, [&](int64_t begin, int64_t end) { kernels.stream_backward(p, begin, end); });
  });
  if (wanted[1]) gradients.weight = partial_weight.sum(0);
  if (wanted[2]) gradients.bias = partial_bias.sum(0);
  return gradients;
}

/// Gradient of a kernel, (C, 1, k, k).
Tensor weight_gradient(const Tensor& grad_output, const Tensor& input, const Tensor& weight, int64_t dilation) {
  DepthwiseConv2dParams p = depthwise_conv2d_params(input, weight, dilation, /*residual=*/false);
  p.grad_output = grad_output.const_data_ptr();
  // As for 16 lanes, whatever the instruction set.
  p.strips = strips_for_sums(p.batch * divide_up(p.channels, 16), p.height, p.kernel_size / 2 * p.dilation + 1);
  const Tensor partial = at::empty({p.batch * p.strips, p.channels, 1, p.kernel_size, p.kernel_size}, weight.options());
  p.grad_weight = partial.mutable_data_ptr();
  with_kernels<DepthwiseConv2dKernels>(input.scalar_type(), [&](const auto& kernels) {
    in_parallel(p.batch * p.strips * divide_up(p.channels, kernels.lanes),
                [&](int64_t begin, int64_t end) { kernels.weight_gradient(p, begin, end); });
  });
  return partial.sum(0);
}

Gradients convolve_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight, int64_t dilation,
                            bool residual, std::array<bool, 3> wanted) {
  Gradients gradients;
  // The gradient of the input is the convolution with the kernel turned round.
  if (wanted[0])
    gradients.input = launch_depthwise_conv2d(grad_output, weight.flip({2, 3}), Tensor(), dilation, residual);
  if (wanted[1]) gradients.weight = weight_gradient(grad_output, input, weight, dilation);
  if (wanted[2]) gradients.bias = launch_channel_sums(grad_output);
  return gradients;
}

Gradients gradients_of_nothing(const Tensor& input, const Tensor& weight, std::array<bool, 3> wanted) {
  return {wanted[0] ? empty_output(input) : Tensor(), wanted[1] ? at::zeros_like(weight) : Tensor(),
          wanted[2] ? at::zeros({weight.size(0)}, weight.options()) : Tensor()};
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward_cpu(const Tensor& grad_output, const Tensor& x,
                                                                 const Tensor& weight, int64_t dilation, bool residual,
                                                                 std::array<bool, 3> output_mask) {
  check_depthwise_conv2d(x, weight, OptionalTensor(), dilation);
  check_grad_output(grad_output, x);
  dilation = within_map(dilation, x);
  const bool streamed = streams(weight.size(2), dilation);
  const auto [input, grad] = streamed ? as_maps(x, grad_output) : std::pair(as_input(x), as_input(grad_output));
  const Tensor kernel = as_parameter(weight, x);
  Gradients gradients;
  if (x.numel() == 0) {
    gradients = gradients_of_nothing(input, kernel, output_mask);
  } else if (streamed) {
    gradients = stream_backward(grad, input, kernel, residual, output_mask);
  } else {
    gradients = convolve_backward(grad, input, kernel, dilation, residual, output_mask);
  }
  if (output_mask[0]) gradients.input = as_output(gradients.input, x);
  return {gradients.input, gradients.weight, gradients.bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(overlock_mm, CPU, m) {
  m.impl("depthwise_conv2d", &depthwise_conv2d_cpu);
  m.impl("_depthwise_conv2d_backward", &depthwise_conv2d_backward_cpu);
}

}  // namespace overlock_mm
