// Residual 3 x 3 depth-wise convolutions with a response norm behind them, and with a GELU before them, for tensors on
// a GPU: by the kernels here or by PyTorch's, whichever is faster.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "choice.h"
#include "residual_depthwise_norm_launch.h"
#include "response_norm.h"
#include "tensors.h"

namespace overlock_mm {
namespace {

using c10::cuda::getCurrentCUDAStream;
using Results = std::tuple<Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

ResidualDepthwiseNormParams params_of(at::IntArrayRef size) {
  ResidualDepthwiseNormParams params{};
  params.batch = size[0];
  params.channels = size[1];
  params.height = size[2];
  params.width = size[3];
  residual_depthwise_norm_tiling(&params);
  return params;
}

/// The layers, with their tensors as the kernels take them.
struct Layers {
  Tensor input, weight, bias;
  ResidualDepthwiseNormParams params;

  Layers(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool gelu)
      : input(as_channels_last(x)),
        weight(as_parameter(weight, x)),
        bias(bias && bias->defined() ? as_parameter(*bias, x) : Tensor()),
        params(params_of(x.sizes())) {
    params.gelu = gelu;
    params.input = input.const_data_ptr();
    params.weight = this->weight.const_data_ptr();
    params.bias = this->bias.defined() ? this->bias.const_data_ptr() : nullptr;
  }

  Tensor empty_sums() const { return at::empty({params.batch, params.strips, params.channels}, weight.options()); }
  Dtype dtype() const { return dtype_of(input); }
};

/// The squares of u, (B, strips, C), and u where it is wanted.
std::pair<Tensor, Tensor> launch_squares(const Layers& layers, bool with_u) {
  ResidualDepthwiseNormParams params = layers.params;
  const Tensor squares = layers.empty_sums(), u = with_u ? empty_channels_last(layers.input) : Tensor();
  params.sums = squares.mutable_data_ptr();
  params.output = with_u ? u.mutable_data_ptr() : nullptr;
  C10_CUDA_CHECK(launch_residual_depthwise(params, layers.dtype(), getCurrentCUDAStream()));
  return {squares, u};
}

/// u normalised.
Tensor launch_normed(const Layers& layers, const Tensor& scale, const Tensor& beta) {
  const Tensor output = empty_channels_last(layers.input);
  ResidualDepthwiseNormParams params = layers.params;
  params.scale = scale.const_data_ptr();
  params.shift = beta.const_data_ptr();
  params.output = output.mutable_data_ptr();
  C10_CUDA_CHECK(launch_residual_depthwise(params, layers.dtype(), getCurrentCUDAStream()));
  return output;
}

// In PyTorch's operators.

Tensor convolved_by_pytorch(const Tensor& v, const Tensor& weight, const OptionalTensor& bias) {
  const OptionalTensor cast_bias = bias ? bias->to(v.scalar_type()) : bias;
  return v + at::conv2d(v, weight.to(v.scalar_type()), cast_bias, 1, 1, 1, /*groups=*/v.size(1));
}

Gradients gradients_by_pytorch(const Tensor& grad_output, const Tensor& x, const Tensor& weight,
                               const OptionalTensor& bias, const Tensor& gamma, const Tensor& response, double eps) {
  const at::ScalarType sums = accumulation_type(x);
  const Tensor v = at::gelu(x), u = convolved_by_pytorch(v, weight, bias);
  const auto [grad_u, grad_gamma, grad_beta] = response_norm_backward_by_pytorch(grad_output, u, gamma, response, eps);
  const auto [grad_v, grad_weight, grad_bias] = at::convolution_backward(
      grad_u, v, weight.to(x.scalar_type()), at::IntArrayRef{x.size(1)}, {1, 1}, {1, 1}, {1, 1},
      /*transposed=*/false, {0, 0}, x.size(1), {true, true, true});
  const Tensor grad_x = at::gelu_backward(grad_v + grad_u, x);
  return {laid_out_as(x, grad_x), grad_weight.to(sums), grad_bias.to(sums), grad_gamma, grad_beta};
}

// The operators.

/// Output, scale and response. u is made twice and not written: three passes over the map.
Results run_forward(const char* name, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                    const Tensor& gamma, const Tensor& beta, double eps, bool gelu) {
  check_residual_depthwise_norm(x, weight, bias, gamma, beta);
  const c10::cuda::CUDAGuard guard(x.device());
  if (x.numel() == 0) return response_norm_of_empty(x);
  const auto ours = [&]() -> Results {
    const Layers layers(x, weight, bias, gelu);
    const Tensor squares = launch_squares(layers, /*with_u=*/false).first;
    const auto [response, scale] = launch_response_and_scale(squares, as_parameter(gamma, x), eps);
    return {laid_out_as(x, launch_normed(layers, scale, as_parameter(beta, x))), scale, response};
  };
  const auto pytorch = [&]() -> Results {
    const auto [output, scale, response] =
        response_norm_by_pytorch(convolved_by_pytorch(gelu ? at::gelu(x) : x, weight, bias), gamma, beta, eps);
    return {laid_out_as(x, output), scale, response};
  };
  return fastest(kind_of_call(name, x), ours, pytorch);
}

Tensor residual_depthwise_norm_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                    const Tensor& gamma, const Tensor& beta, double eps) {
  return std::get<0>(run_forward("residual_depthwise_norm", x, weight, bias, gamma, beta, eps, /*gelu=*/false));
}

void residual_depthwise_norm_inplace_cuda(Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                          const Tensor& gamma, const Tensor& beta, double eps) {
  if (!x.is_contiguous(at::MemoryFormat::ChannelsLast) || x.numel() == 0) {
    x.copy_(residual_depthwise_norm_cuda(x, weight, bias, gamma, beta, eps));
    return;
  }
  check_residual_depthwise_norm(x, weight, bias, gamma, beta);
  const c10::cuda::CUDAGuard guard(x.device());
  x.mutable_data_ptr();  // a copy-on-write tensor becomes one of its own before its input is read
  // u needs its neighbours in x, so it is written elsewhere first.
  const auto [squares, u] = launch_squares(Layers(x, weight, bias, /*gelu=*/false), /*with_u=*/true);
  const Tensor scale = launch_response_and_scale(squares, as_parameter(gamma, x), eps).second;
  launch_scale_and_shift(u, scale, as_parameter(beta, x), x);
}

Results gelu_norm_with_response_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                     const Tensor& gamma, const Tensor& beta, double eps) {
  return run_forward("gelu_residual_depthwise_norm", x, weight, bias, gamma, beta, eps, /*gelu=*/true);
}

std::tuple<Tensor, Tensor> gelu_norm_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                          const Tensor& gamma, const Tensor& beta, double eps) {
  const auto [output, scale, response] = gelu_norm_with_response_cuda(x, weight, bias, gamma, beta, eps);
  return {output, scale};
}

Tensor gelu_normed_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& scale,
                        const Tensor& beta) {
  check_residual_depthwise_normed(x, weight, bias, scale, beta);
  const c10::cuda::CUDAGuard guard(x.device());
  if (x.numel() == 0) return empty_like_map(x);
  const auto ours = [&] {
    const Layers layers(x, weight, bias, /*gelu=*/true);
    return laid_out_as(x, launch_normed(layers, as_parameter(scale, x), as_parameter(beta, x)));
  };
  const auto pytorch = [&] {
    const Tensor u = convolved_by_pytorch(at::gelu(x), weight, bias);
    return laid_out_as(x, response_normed_by_pytorch(u, scale, beta));
  };
  return fastest(kind_of_call("gelu_residual_depthwise_norm again", x), ours, pytorch);
}

Gradients gelu_norm_backward_cuda(const Tensor& grad_output, const Tensor& x, const Tensor& weight,
                                  const OptionalTensor& bias, const Tensor& gamma, const Tensor& response, double eps) {
  check_gelu_residual_depthwise_norm_backward(grad_output, x, weight, bias, gamma, response);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor norms = as_parameter(response, x);
  if (x.numel() == 0) {
    const auto zeros = [&](const Tensor& parameter) { return at::zeros(parameter.sizes(), norms.options()); };
    return {empty_like_map(x), zeros(weight), zeros(gamma), zeros(gamma), zeros(gamma)};
  }
  const auto ours = [&]() -> Gradients {
    const Layers layers(x, weight, bias, /*gelu=*/true);
    const Tensor grad = as_channels_last(grad_output), scales = as_parameter(gamma, x);
    ResidualDepthwiseNormParams params = layers.params;
    const Tensor products = layers.empty_sums(), sums = layers.empty_sums();
    params.grad_output = grad.const_data_ptr();
    params.sums = products.mutable_data_ptr();
    params.plain_sums = sums.mutable_data_ptr();
    C10_CUDA_CHECK(launch_residual_depthwise(params, layers.dtype(), getCurrentCUDAStream()));

    const ResponseGradients norm = launch_response_gradients(products, sums, scales, norms, eps);
    const Tensor grad_x = empty_channels_last(layers.input);
    const Tensor partial_sums = at::empty({params.batch, params.strips, 10, params.channels}, norms.options());
    const Tensor grad_weight = at::empty(weight.sizes(), norms.options()), grad_bias = at::empty_like(scales);
    const Tensor grad_gamma = at::empty_like(scales), grad_beta = at::empty_like(scales);
    params.scale = norm.scale.const_data_ptr();
    params.slope = norm.slope.const_data_ptr();
    params.grad_input = grad_x.mutable_data_ptr();
    params.partial_sums = partial_sums.mutable_data_ptr();
    params.grads_of_images = norm.grads_of_images.const_data_ptr();
    params.grad_weight = grad_weight.mutable_data_ptr();
    params.grad_bias = grad_bias.mutable_data_ptr();
    params.grad_gamma = grad_gamma.mutable_data_ptr();
    params.grad_beta = grad_beta.mutable_data_ptr();
    C10_CUDA_CHECK(launch_residual_depthwise_gradients(params, layers.dtype(), getCurrentCUDAStream()));
    C10_CUDA_CHECK(launch_parameter_gradients(params, layers.dtype(), getCurrentCUDAStream()));
    return {laid_out_as(x, grad_x), grad_weight, grad_bias, grad_gamma, grad_beta};
  };
  const auto pytorch = [&] { return gradients_by_pytorch(grad_output, x, weight, bias, gamma, norms, eps); };
  return fastest(kind_of_call("gelu_residual_depthwise_norm backward", x), ours, pytorch);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) {
  // ResidualDepthwiseNormParams::strips of a map of this size, for tools that count bytes without a GPU.
  m.def("_residual_depthwise_norm_strips(int[] size) -> int",
        [](at::IntArrayRef size) { return params_of(size).strips; });
}

TORCH_LIBRARY_IMPL(overlock_mm, CUDA, m) {
  m.impl("residual_depthwise_norm", &residual_depthwise_norm_cuda);
  m.impl("residual_depthwise_norm_", &residual_depthwise_norm_inplace_cuda);
  m.impl("gelu_residual_depthwise_norm", &gelu_norm_cuda);
  m.impl("_gelu_residual_depthwise_normed", &gelu_normed_cuda);
  m.impl("_gelu_residual_depthwise_norm", &gelu_norm_with_response_cuda);
  m.impl("_gelu_residual_depthwise_norm_backward", &gelu_norm_backward_cuda);
}

}  // namespace overlock_mm
