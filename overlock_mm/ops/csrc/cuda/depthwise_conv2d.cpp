// Depth-wise convolutions for tensors on a GPU, by the kernels here or by PyTorch's convolution, whichever is faster.
#include "depthwise_conv2d.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "choice.h"
#include "depthwise_conv2d_launch.h"
#include "tensors.h"

namespace overlock_mm {

using c10::cuda::getCurrentCUDAStream;

namespace {

/// With sizes and input.
DepthwiseParams depthwise_params(const Tensor& input, int64_t kernel_size, int64_t dilation) {
  DepthwiseParams params{};
  params.batch = input.size(0);
  params.channels = input.size(1);
  params.height = input.size(2);
  params.width = input.size(3);
  params.kernel_size = kernel_size;
  params.dilation = dilation;
  params.input = input.const_data_ptr();
  return params;
}

}  // namespace

Tensor launch_depthwise_conv2d(const Tensor& input, const Tensor& weight, const Tensor& bias, int64_t dilation,
                               bool residual) {
  const Tensor output = empty_channels_last(input);
  DepthwiseParams params = depthwise_params(input, weight.size(2), dilation);
  params.weight = weight.const_data_ptr();
  params.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  params.output = output.mutable_data_ptr();
  params.residual = residual;
  C10_CUDA_CHECK(launch_depthwise_forward(params, dtype_of(input), getCurrentCUDAStream()));
  return output;
}

namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

/// Gradients of input, kernel and bias, undefined where they are not wanted. The bias has one only with the kernel's.
/// Without the kernel's, only the sizes of the input are used.
Gradients launch_gradients(const Tensor& grad_output, const Tensor& input, const Tensor& weight, int64_t dilation,
                           bool residual, std::array<bool, 3> wanted) {
  const auto [of_input, of_weight, of_bias] = wanted;
  const Dtype dtype = dtype_of(input);
  DepthwiseParams params = depthwise_params(input, weight.size(2), dilation);
  params.weight = weight.const_data_ptr();
  params.residual = residual;
  params.grad_output = grad_output.const_data_ptr();
  Tensor grad_input, partial_sums, grad_weight, grad_bias;
  if (of_input) {
    grad_input = empty_channels_last(input);
    params.grad_input = grad_input.mutable_data_ptr();
  }
  if (of_weight) {
    C10_CUDA_CHECK(depthwise_partials(params, dtype, &params.partials));
    partial_sums = at::empty({params.partials, weight.numel() + params.channels}, weight.options());
    grad_weight = at::empty(weight.sizes(), weight.options());
    params.partial_sums = partial_sums.mutable_data_ptr();
    params.grad_weight = grad_weight.mutable_data_ptr();
  }
  if (of_weight && of_bias) {
    grad_bias = at::empty({params.channels}, weight.options());
    params.grad_bias = grad_bias.mutable_data_ptr();
  }
  C10_CUDA_CHECK(launch_depthwise_backward(params, dtype, getCurrentCUDAStream()));
  return {grad_input, grad_weight, grad_bias};
}

Tensor as_optional_parameter(const OptionalTensor& parameter, const Tensor& map) {
  return parameter && parameter->defined() ? as_parameter(*parameter, map) : Tensor();
}

Tensor depthwise_conv2d_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t dilation,
                             bool residual) {
  check_depthwise_conv2d(x, weight, bias, dilation);
  const c10::cuda::CUDAGuard guard(x.device());
  if (x.numel() == 0) return empty_like_map(x);
  const auto ours = [&] {
    const Tensor output = launch_depthwise_conv2d(as_channels_last(x), as_parameter(weight, x),
                                                  as_optional_parameter(bias, x), dilation, residual);
    return laid_out_as(x, output);
  };
  const auto pytorch = [&] {
    const int64_t padding = dilation * (weight.size(2) / 2);
    const OptionalTensor cast_bias = bias ? bias->to(x.scalar_type()) : bias;
    const Tensor output =
        at::conv2d(x, weight.to(x.scalar_type()), cast_bias, 1, padding, dilation, /*groups=*/x.size(1));
    return laid_out_as(x, residual ? output + x : output);
  };
  return fastest(kind_of_call("depthwise_conv2d", x, weight.size(2), dilation), ours, pytorch);
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward_cuda(const Tensor& grad_output, const Tensor& x,
                                                                  const Tensor& weight, int64_t dilation, bool residual,
                                                                  std::array<bool, 3> output_mask) {
  check_depthwise_conv2d(x, weight, OptionalTensor(), dilation);
  check_grad_output(grad_output, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto [of_x, of_weight, of_bias] = output_mask;
  if (x.numel() == 0) {
    const auto zeros = [&](bool wanted, at::IntArrayRef size) {
      return wanted ? at::zeros(size, x.options().dtype(accumulation_type(x))) : Tensor();
    };
    return {of_x ? empty_like_map(x) : Tensor(), zeros(of_weight, weight.sizes()), zeros(of_bias, {x.size(1)})};
  }
  const auto ours = [&, of_x = of_x, of_weight = of_weight, of_bias = of_bias]() -> Gradients {
    const Tensor grad = as_channels_last(grad_output);
    auto [grad_x, grad_weight, grad_bias] =
        launch_gradients(grad, of_weight ? as_channels_last(x) : x, as_parameter(weight, x), dilation, residual,
                         {of_x, of_weight, of_bias});
    if (of_x) grad_x = laid_out_as(x, grad_x);
    if (of_bias && !of_weight) grad_bias = grad.sum({0, 2, 3}, /*keepdim=*/false, accumulation_type(x));
    return {grad_x, grad_weight, grad_bias};
  };
  const auto pytorch = [&, of_x = of_x, of_bias = of_bias]() -> Gradients {
    const int64_t padding = dilation * (weight.size(2) / 2), channels = x.size(1);
    auto [grad_x, grad_weight, grad_bias] = at::convolution_backward(
        grad_output, x, weight.to(x.scalar_type()), at::IntArrayRef{channels}, {1, 1}, {padding, padding},
        {dilation, dilation}, /*transposed=*/false, {0, 0}, channels, output_mask);
    if (of_x) grad_x = laid_out_as(x, residual ? grad_x + grad_output : grad_x);
    const at::ScalarType sums = accumulation_type(x);
    return {grad_x, grad_weight.defined() ? grad_weight.to(sums) : grad_weight,
            of_bias ? grad_bias.to(sums) : grad_bias};
  };
  return fastest(kind_of_call("depthwise_conv2d backward", x, weight.size(2), dilation), ours, pytorch);
}

/// DepthwiseParams::partials of a map of this size, for tools that count bytes without a GPU.
int64_t partials_of(at::IntArrayRef size, int64_t kernel_size, int64_t dilation, at::ScalarType dtype,
                    int64_t shared_memory) {
  const Tensor map = at::empty(size, at::TensorOptions(at::kMeta).dtype(dtype));
  return depthwise_partials(depthwise_params(map, kernel_size, dilation), dtype_of(map), shared_memory);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) {
  m.def("_depthwise_partials(int[] size, int kernel_size, int dilation, ScalarType dtype, int shared_memory) -> int",
        &partials_of);
}

TORCH_LIBRARY_IMPL(overlock_mm, CUDA, m) {
  m.impl("depthwise_conv2d", &depthwise_conv2d_cuda);
  m.impl("_depthwise_conv2d_backward", &depthwise_conv2d_backward_cuda);
}

}  // namespace overlock_mm
