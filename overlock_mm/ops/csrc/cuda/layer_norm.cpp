// Layer norms for tensors on a GPU, by the kernels here or by PyTorch's, whichever is faster.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "choice.h"
#include "layer_norm_launch.h"
#include "tensors.h"

namespace overlock_mm {
namespace {

using c10::cuda::getCurrentCUDAStream;
using Results = std::tuple<Tensor, Tensor, Tensor>;

LayerNormParams params_of(const Tensor& input, const Tensor& weight) {
  LayerNormParams params{};
  params.positions = input.size(0) * input.size(2) * input.size(3);
  params.channels = input.size(1);
  params.input = input.const_data_ptr();
  params.weight = weight.const_data_ptr();
  return params;
}

/// (B, H, W), for a number of every position.
Tensor empty_statistics(const Tensor& x) {
  return at::empty({x.size(0), x.size(2), x.size(3)}, x.options().dtype(accumulation_type(x)));
}

Results run_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, bool with_statistics) {
  check_layer_norm(x, weight, bias);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto ours = [&]() -> Results {
    const Tensor input = as_channels_last(x), scale = as_parameter(weight, x), shift = as_parameter(bias, x);
    const Tensor output = empty_channels_last(input);
    Tensor mean, rstd;
    LayerNormParams params = params_of(input, scale);
    params.bias = shift.const_data_ptr();
    params.eps = eps;
    params.output = output.mutable_data_ptr();
    if (with_statistics) {
      mean = empty_statistics(x);
      rstd = empty_statistics(x);
      params.mean = mean.mutable_data_ptr();
      params.rstd = rstd.mutable_data_ptr();
    }
    C10_CUDA_CHECK(launch_layer_norm_forward(params, dtype_of(x), getCurrentCUDAStream()));
    return {laid_out_as(x, output), mean, rstd};
  };
  const auto pytorch = [&]() -> Results {
    const at::ScalarType sums = accumulation_type(x);
    const Tensor rows = x.permute({0, 2, 3, 1}).to(sums);
    const auto [output, mean, rstd] = at::native_layer_norm(rows, {x.size(1)}, weight.to(sums), bias.to(sums), eps);
    return {laid_out_as(x, output.permute({0, 3, 1, 2}).to(x.scalar_type())), mean.squeeze(3), rstd.squeeze(3)};
  };
  if (x.numel() == 0) return ours();
  return fastest(kind_of_call("layer_norm", x), ours, pytorch);
}

Tensor layer_norm_cuda(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  return std::get<0>(run_forward(x, weight, bias, eps, /*with_statistics=*/false));
}

Results layer_norm_with_statistics_cuda(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  return run_forward(x, weight, bias, eps, /*with_statistics=*/true);
}

Results layer_norm_backward_cuda(const Tensor& grad_output, const Tensor& x, const Tensor& weight, const Tensor& mean,
                                 const Tensor& rstd, const OptionalTensor& other_grad) {
  check_layer_norm(x, weight, weight);
  check_grad_output(grad_output, x);
  if (other_grad) check_other_map("other_grad", *other_grad, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::ScalarType sums = accumulation_type(x);
  const auto ours = [&]() -> Results {
    const Tensor input = as_channels_last(x), grad = as_channels_last(grad_output), scale = as_parameter(weight, x);
    const Tensor means = mean.contiguous(), rstds = rstd.contiguous(), grad_input = empty_channels_last(input);
    const Tensor added = other_grad ? as_channels_last(*other_grad) : Tensor();
    const Tensor grad_weight = at::empty_like(scale), grad_bias = at::empty_like(scale);
    LayerNormParams params = params_of(input, scale);
    params.partials = layer_norm_partials(params, dtype_of(x));
    const Tensor partial_sums = at::empty({params.partials, 2, params.channels}, scale.options());
    params.mean = const_cast<void*>(means.const_data_ptr());
    params.rstd = const_cast<void*>(rstds.const_data_ptr());
    params.grad_output = grad.const_data_ptr();
    params.other_grad = other_grad ? added.const_data_ptr() : nullptr;
    params.grad_input = grad_input.mutable_data_ptr();
    params.partial_sums = partial_sums.mutable_data_ptr();
    params.grad_weight = grad_weight.mutable_data_ptr();
    params.grad_bias = grad_bias.mutable_data_ptr();
    C10_CUDA_CHECK(launch_layer_norm_backward(params, dtype_of(x), getCurrentCUDAStream()));
    return {laid_out_as(x, grad_input), grad_weight, grad_bias};
  };
  const auto pytorch = [&]() -> Results {
    const auto rows_of = [&](const Tensor& map) { return map.permute({0, 2, 3, 1}).to(sums); };
    const auto [grad_x, grad_weight, grad_bias] =
        at::native_layer_norm_backward(rows_of(grad_output), rows_of(x), {x.size(1)}, mean.unsqueeze(3),
                                       rstd.unsqueeze(3), weight.to(sums), weight.to(sums), {true, true, true});
    const Tensor grad = grad_x.permute({0, 3, 1, 2}).to(x.scalar_type());
    return {laid_out_as(x, other_grad ? grad + *other_grad : grad), grad_weight, grad_bias};
  };
  if (x.numel() == 0) {
    const auto zeros = [&] { return at::zeros(weight.sizes(), x.options().dtype(sums)); };
    return {empty_like_map(x), zeros(), zeros()};
  }
  return fastest(kind_of_call(other_grad ? "layer_norm backward with a sum" : "layer_norm backward", x), ours, pytorch);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) {
  // LayerNormParams::partials of a map of this size, for tools that count bytes without a GPU.
  m.def("_layer_norm_partials(int[] size, ScalarType dtype) -> int", [](at::IntArrayRef size, at::ScalarType dtype) {
    const Tensor map = at::empty(size, at::TensorOptions(at::kMeta).dtype(dtype));
    return layer_norm_partials(params_of(map, map), dtype_of(map));
  });
}

TORCH_LIBRARY_IMPL(overlock_mm, CUDA, m) {
  m.impl("layer_norm", &layer_norm_cuda);
  m.impl("_layer_norm", &layer_norm_with_statistics_cuda);
  m.impl("_layer_norm_backward", &layer_norm_backward_cuda);
}

}  // namespace overlock_mm
