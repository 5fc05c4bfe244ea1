// Scales and shifts for tensors on a GPU, by the kernels here or by PyTorch's, whichever is faster.
#include "scale_and_shift.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "choice.h"
#include "tensors.h"

namespace overlock_mm {

ScaleAndShiftParams scale_and_shift_params(const Tensor& input) {
  ScaleAndShiftParams params{};
  params.batch = input.size(0);
  params.positions = input.size(2) * input.size(3);
  params.channels = input.size(1);
  params.input = input.const_data_ptr();
  params.strips = scale_and_shift_strips(params);
  return params;
}

Tensor beside(const Tensor& map, const Tensor& factors) {
  return factors.to(map.scalar_type()).unsqueeze(-1).unsqueeze(-1);
}

namespace {

using c10::cuda::getCurrentCUDAStream;

ScaleAndShiftParams params_of(const Tensor& input, const Tensor& scale) {
  ScaleAndShiftParams params = scale_and_shift_params(input);
  params.by_image = scale.dim() == 2;
  params.scale = scale.const_data_ptr();
  return params;
}

std::string kind_of(const char* name, const Tensor& x, const Tensor& scale) {
  return kind_of_call(std::string(name) + (scale.dim() == 2 ? " by image" : ""), x);
}

Tensor scale_and_shift_cuda(const Tensor& x, const Tensor& scale, const OptionalTensor& shift,
                            const OptionalTensor& other) {
  check_scale_and_shift(x, scale, shift, other);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto ours = [&] {
    const Tensor input = as_channels_last(x), factors = as_parameter(scale, x), output = empty_channels_last(input);
    const Tensor shifts = shift ? as_parameter(*shift, x) : Tensor();
    const Tensor added = other ? as_channels_last(*other) : Tensor();
    ScaleAndShiftParams params = params_of(input, factors);
    params.shift = shift ? shifts.const_data_ptr() : nullptr;
    params.other = other ? added.const_data_ptr() : nullptr;
    params.output = output.mutable_data_ptr();
    C10_CUDA_CHECK(launch_scale_and_shift_forward(params, dtype_of(x), getCurrentCUDAStream()));
    return laid_out_as(x, output);
  };
  const auto pytorch = [&] {
    const Tensor out = shift ? at::addcmul(beside(x, *shift), x, beside(x, scale)) : x * beside(x, scale);
    return laid_out_as(x, other ? out + *other : out);
  };
  if (x.numel() == 0) return empty_like_map(x);
  return fastest(kind_of(other ? "scale_and_shift with a sum" : "scale_and_shift", x, scale), ours, pytorch);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Gradients scale_and_shift_backward_cuda(const Tensor& grad_output, const Tensor& x, const Tensor& scale,
                                        bool has_shift) {
  check_scale_and_shift(x, scale, OptionalTensor(), OptionalTensor());
  check_grad_output(grad_output, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::ScalarType sums = accumulation_type(x);
  const auto options = x.options().dtype(sums);
  const auto ours = [&]() -> Gradients {
    const Tensor input = as_channels_last(x), grad = as_channels_last(grad_output), factors = as_parameter(scale, x);
    const Tensor grad_input = empty_channels_last(input), grad_scale = at::empty(scale.sizes(), options);
    const Tensor grad_shift = has_shift ? at::empty({x.size(1)}, options) : Tensor();
    ScaleAndShiftParams params = params_of(input, factors);
    const Tensor partial_sums = at::empty({params.strips, params.batch, has_shift ? 2 : 1, params.channels}, options);
    params.grad_output = grad.const_data_ptr();
    params.grad_input = grad_input.mutable_data_ptr();
    params.partial_sums = partial_sums.mutable_data_ptr();
    params.grad_scale = grad_scale.mutable_data_ptr();
    params.grad_shift = has_shift ? grad_shift.mutable_data_ptr() : nullptr;
    C10_CUDA_CHECK(launch_scale_and_shift_backward(params, dtype_of(x), getCurrentCUDAStream()));
    return {laid_out_as(x, grad_input), grad_scale, grad_shift};
  };
  const auto pytorch = [&]() -> Gradients {
    const auto sum = [&](const Tensor& map, bool by_image) {
      return by_image ? map.sum({2, 3}, /*keepdim=*/false, sums) : map.sum({0, 2, 3}, /*keepdim=*/false, sums);
    };
    return {laid_out_as(x, grad_output * beside(x, scale)), sum(grad_output * x, scale.dim() == 2),
            has_shift ? sum(grad_output, false) : Tensor()};
  };
  if (x.numel() == 0) {
    return {empty_like_map(x), at::zeros(scale.sizes(), options),
            has_shift ? at::zeros({x.size(1)}, options) : Tensor()};
  }
  return fastest(kind_of("scale_and_shift backward", x, scale), ours, pytorch);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) {
  // ScaleAndShiftParams::strips of a map of this size, for tools that count bytes without a GPU.
  m.def("_scale_and_shift_strips(int[] size) -> int", [](at::IntArrayRef size) {
    const Tensor map = at::empty(size, at::TensorOptions(at::kMeta));
    return params_of(map, map).strips;
  });
}

TORCH_LIBRARY_IMPL(overlock_mm, CUDA, m) {
  m.impl("scale_and_shift", &scale_and_shift_cuda);
  m.impl("_scale_and_shift_backward", &scale_and_shift_backward_cuda);
}

}  // namespace overlock_mm
