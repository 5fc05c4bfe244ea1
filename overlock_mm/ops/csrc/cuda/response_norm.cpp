// Global response norms for tensors on a GPU, by the kernels here or by PyTorch's, whichever is faster.
#include "response_norm.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <vector>

#include "../checks.h"
#include "choice.h"
#include "tensors.h"

namespace overlock_mm {
namespace {

using c10::cuda::getCurrentCUDAStream;

ResponseNormParams params_of(const Tensor& input) {
  ResponseNormParams params{};
  params.batch = input.size(0);
  params.channels = input.size(1);
  params.positions = input.size(2) * input.size(3);
  params.strips = response_norm_strips(params);
  params.input = input.const_data_ptr();
  return params;
}

/// Sums over parts of the map, (B, strips, C): of input * other, and of other. Without other, of the squares alone.
std::pair<Tensor, Tensor> launch_sums_of_products(const Tensor& input, const Tensor& other) {
  ResponseNormParams params = params_of(input);
  const Tensor sums =
      at::empty({params.batch, params.strips, params.channels}, input.options().dtype(accumulation_type(input)));
  params.sums = sums.mutable_data_ptr();
  Tensor plain;
  if (other.defined()) {
    plain = at::empty_like(sums);
    params.other = other.const_data_ptr();
    params.plain_sums = plain.mutable_data_ptr();
  }
  C10_CUDA_CHECK(launch_channel_sums(params, dtype_of(input), getCurrentCUDAStream()));
  return {sums, plain};
}

ResponseFactorsParams factors_params(const Tensor& sums, const Tensor& gamma, double eps) {
  ResponseFactorsParams params{};
  params.batch = sums.size(0);
  params.strips = sums.size(1);
  params.channels = sums.size(2);
  params.eps = eps;
  params.sums = sums.const_data_ptr();
  params.gamma = gamma.const_data_ptr();
  return params;
}

/// (B, C) or (C) for a map.
Tensor for_map(const Tensor& factors, const Tensor& map) {
  return factors.unsqueeze(-1).unsqueeze(-1).to(map.scalar_type());
}

}  // namespace

std::pair<Tensor, Tensor> launch_response_and_scale(const Tensor& squares, const Tensor& gamma, double eps) {
  ResponseFactorsParams params = factors_params(squares, gamma, eps);
  const Tensor response = at::empty({params.batch, params.channels}, squares.options()),
               scale = at::empty_like(response);
  params.response = response.mutable_data_ptr();
  params.scale = scale.mutable_data_ptr();
  C10_CUDA_CHECK(launch_response_factors(params, dtype_of(squares), getCurrentCUDAStream()));
  return {response, scale};
}

void launch_scale_and_shift(const Tensor& input, const Tensor& scale, const Tensor& shift, const Tensor& output) {
  ResponseNormParams params = params_of(input);
  params.scale = scale.const_data_ptr();
  params.shift = shift.const_data_ptr();
  params.output = output.mutable_data_ptr();
  C10_CUDA_CHECK(launch_scale_and_shift(params, dtype_of(input), getCurrentCUDAStream()));
}

ResponseGradients launch_response_gradients(const Tensor& products, const Tensor& sums, const Tensor& gamma,
                                            const Tensor& response, double eps) {
  ResponseFactorsParams params = factors_params(products, gamma, eps);
  const ResponseGradients out{at::empty_like(response), at::empty_like(response),
                              at::empty({params.batch, 2, params.channels}, products.options())};
  params.plain_sums = sums.const_data_ptr();
  params.response = const_cast<void*>(response.const_data_ptr());
  params.scale = out.scale.mutable_data_ptr();
  params.slope = out.slope.mutable_data_ptr();
  params.grads_of_images = out.grads_of_images.mutable_data_ptr();
  C10_CUDA_CHECK(launch_response_factors(params, dtype_of(products), getCurrentCUDAStream()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> response_norm_of_empty(const Tensor& x) {
  const std::vector<int64_t> shape{x.size(0), x.size(1)};
  const auto options = x.options().dtype(accumulation_type(x));
  return {empty_like_map(x), at::ones(shape, options), at::zeros(shape, options)};
}

Tensor response_normed_by_pytorch(const Tensor& x, const Tensor& scale, const Tensor& beta) {
  return laid_out_as(x, at::addcmul(for_map(beta, x), x, for_map(scale, x)));
}

std::tuple<Tensor, Tensor, Tensor> response_norm_by_pytorch(const Tensor& x, const Tensor& gamma, const Tensor& beta,
                                                            double eps) {
  const at::ScalarType sums = accumulation_type(x);
  const Tensor response = at::linalg_vector_norm(x, 2, at::IntArrayRef{2, 3}, /*keepdim=*/false, sums);
  const Tensor scale = gamma.to(sums) * (response / (response.mean(1, /*keepdim=*/true) + eps)) + 1;
  return {response_normed_by_pytorch(x, scale, beta), scale, response};
}

std::tuple<Tensor, Tensor, Tensor> response_norm_backward_by_pytorch(const Tensor& grad_output, const Tensor& x,
                                                                     const Tensor& gamma, const Tensor& response,
                                                                     double eps) {
  const at::ScalarType sums = accumulation_type(x);
  const Tensor products = (grad_output * x).sum({2, 3}, /*keepdim=*/false, sums);
  const Tensor plain = grad_output.sum({2, 3}, /*keepdim=*/false, sums), weight = gamma.to(sums);
  const Tensor mean = response.mean(1, /*keepdim=*/true) + eps, normed = response / mean;
  const Tensor grad_mean = (products * weight * response).mean(1, /*keepdim=*/true) / (mean * mean);
  const Tensor slope = at::where(response > 0, (products * weight / mean - grad_mean) / response, 0);
  const Tensor grad_x = at::addcmul(grad_output * for_map(weight * normed + 1, x), x, for_map(slope, x));
  return {laid_out_as(x, grad_x), (products * normed).sum(0), plain.sum(0)};
}

namespace {

/// input * scale + beta, for a map in channels_last.
Tensor launch_normed(const Tensor& input, const Tensor& scale, const Tensor& beta) {
  const Tensor output = empty_channels_last(input);
  launch_scale_and_shift(input, scale, as_parameter(beta, input), output);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> response_norm_cuda(const Tensor& x, const Tensor& gamma, const Tensor& beta,
                                                      double eps) {
  check_response_norm(x, gamma, beta);
  const c10::cuda::CUDAGuard guard(x.device());
  if (x.numel() == 0) return response_norm_of_empty(x);
  const auto ours = [&]() -> std::tuple<Tensor, Tensor, Tensor> {
    const Tensor input = as_channels_last(x), squares = launch_sums_of_products(input, Tensor()).first;
    const auto [response, scale] = launch_response_and_scale(squares, as_parameter(gamma, x), eps);
    return {laid_out_as(x, launch_normed(input, scale, beta)), scale, response};
  };
  const auto pytorch = [&] { return response_norm_by_pytorch(x, gamma, beta, eps); };
  return fastest(kind_of_call("global_response_norm", x), ours, pytorch);
}

std::tuple<Tensor, Tensor> global_response_norm_cuda(const Tensor& x, const Tensor& gamma, const Tensor& beta,
                                                     double eps) {
  const auto [output, scale, response] = response_norm_cuda(x, gamma, beta, eps);
  return {output, scale};
}

Tensor response_normed_cuda(const Tensor& x, const Tensor& scale, const Tensor& beta) {
  check_response_normed(x, scale, beta);
  const c10::cuda::CUDAGuard guard(x.device());
  if (x.numel() == 0) return empty_like_map(x);
  const auto ours = [&] { return laid_out_as(x, launch_normed(as_channels_last(x), as_parameter(scale, x), beta)); };
  const auto pytorch = [&] { return response_normed_by_pytorch(x, scale, beta); };
  return fastest(kind_of_call("global_response_norm again", x), ours, pytorch);
}

std::tuple<Tensor, Tensor, Tensor> response_norm_backward_cuda(const Tensor& grad_output, const Tensor& x,
                                                               const Tensor& gamma, const Tensor& response,
                                                               double eps) {
  check_response_norm_backward(grad_output, x, gamma, response);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor norms = as_parameter(response, x);
  if (x.numel() == 0) {
    const auto zeros = [&] { return at::zeros(gamma.sizes(), norms.options()); };
    return {empty_like_map(x), zeros(), zeros()};
  }
  const auto ours = [&]() -> std::tuple<Tensor, Tensor, Tensor> {
    const Tensor input = as_channels_last(x), grad = as_channels_last(grad_output), weight = as_parameter(gamma, x);
    const auto [products, sums] = launch_sums_of_products(input, grad);
    const ResponseGradients gradients = launch_response_gradients(products, sums, weight, norms, eps);
    const Tensor grad_x = empty_channels_last(input);
    const Tensor grad_gamma = at::empty_like(weight), grad_beta = at::empty_like(weight);
    ResponseNormGradientsParams params{params_of(grad)};
    params.other = input.const_data_ptr();
    params.scale = gradients.scale.const_data_ptr();
    params.other_scale = gradients.slope.const_data_ptr();
    params.output = grad_x.mutable_data_ptr();
    params.grads_of_images = gradients.grads_of_images.const_data_ptr();
    params.grad_gamma = grad_gamma.mutable_data_ptr();
    params.grad_beta = grad_beta.mutable_data_ptr();
    C10_CUDA_CHECK(launch_response_norm_gradients(params, dtype_of(x), getCurrentCUDAStream()));
    return {laid_out_as(x, grad_x), grad_gamma, grad_beta};
  };
  const auto pytorch = [&] { return response_norm_backward_by_pytorch(grad_output, x, gamma, norms, eps); };
  return fastest(kind_of_call("global_response_norm backward", x), ours, pytorch);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) {
  // ResponseNormParams::strips of a map of this size, for tools that count bytes without a GPU.
  m.def("_response_norm_strips(int[] size) -> int",
        [](at::IntArrayRef size) { return params_of(at::empty(size, at::TensorOptions(at::kMeta))).strips; });
}

TORCH_LIBRARY_IMPL(overlock_mm, CUDA, m) {
  m.impl("global_response_norm", &global_response_norm_cuda);
  m.impl("_response_normed", &response_normed_cuda);
  m.impl("_response_norm", &response_norm_cuda);
  m.impl("_response_norm_backward", &response_norm_backward_cuda);
}

}  // namespace overlock_mm
