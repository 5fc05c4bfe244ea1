// Scaled sums for tensors on a GPU, by the kernels here or by PyTorch's, whichever is faster.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "choice.h"
#include "scale_and_shift.h"
#include "scaled_sum_launch.h"

namespace overlock_mm {
namespace {

using c10::cuda::getCurrentCUDAStream;

/// From a position of a map to the next, if its channels are neighbours: in channels_last, and in a slice of channels
/// of such a map. Otherwise 0.
int64_t step_of(const Tensor& map) {
  const int64_t step = map.stride(3), line = step * map.size(3);
  const bool is_regular = map.stride(2) == line && map.stride(0) == line * map.size(2);
  return map.stride(1) == 1 && is_regular ? step : 0;
}

/// The tensors, as the kernels take them.
struct Operands {
  Tensor input, other, scale, other_scale;
  ScaledSumParams params{};

  Operands(const Tensor& x, const Tensor& scale, const Tensor& other, const Tensor& other_scale)
      : input(step_of(x) ? x : as_channels_last(x)),
        other(as_channels_last(other)),
        scale(as_parameter(scale, x)),
        other_scale(as_parameter(other_scale, x)) {
    static_cast<ScaleAndShiftParams&>(params) = scale_and_shift_params(input);
    params.input_step = step_of(x) ? step_of(x) : x.size(1);
    params.other = this->other.const_data_ptr();
    params.scale = this->scale.const_data_ptr();
    params.other_scale = this->other_scale.const_data_ptr();
  }
};

Tensor scaled_sum_cuda(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& other,
                       const Tensor& other_scale, const Tensor& other_shift) {
  check_scaled_sum(x, scale, shift, other, other_scale, other_shift);
  const c10::cuda::CUDAGuard guard(x.device());
  if (x.numel() == 0) return empty_channels_last(x);
  const auto ours = [&] {
    Operands operands(x, scale, other, other_scale);
    const Tensor shifts = as_parameter(shift, x), other_shifts = as_parameter(other_shift, x);
    const Tensor output = empty_channels_last(x);
    operands.params.shift = shifts.const_data_ptr();
    operands.params.other_shift = other_shifts.const_data_ptr();
    operands.params.output = output.mutable_data_ptr();
    C10_CUDA_CHECK(launch_scaled_sum_forward(operands.params, dtype_of(x), getCurrentCUDAStream()));
    return output;
  };
  const auto pytorch = [&] {
    return as_channels_last(at::addcmul(beside(x, shift), x, beside(x, scale)) +
                            at::addcmul(beside(x, other_shift), other, beside(x, other_scale)));
  };
  return fastest(kind_of_call("scaled_sum", other), ours, pytorch);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Gradients scaled_sum_backward_cuda(const Tensor& grad_output, const Tensor& x, const Tensor& scale, const Tensor& other,
                                   const Tensor& other_scale) {
  check_scaled_sum(x, scale, scale, other, other_scale, other_scale);
  check_grad_output(grad_output, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::ScalarType sums = accumulation_type(x);
  const auto options = x.options().dtype(sums);
  const int64_t channels = x.size(1);
  if (x.numel() == 0) {
    return {empty_channels_last(x), empty_channels_last(x), at::zeros({2, channels}, options),
            at::zeros({channels}, options)};
  }
  const auto ours = [&]() -> Gradients {
    Operands operands(x, scale, other, other_scale);
    const Tensor grad = as_channels_last(grad_output);
    const Tensor grad_x = empty_channels_last(x), grad_other = empty_channels_last(x);
    const Tensor grad_scales = at::empty({2, channels}, options), grad_shift = at::empty({channels}, options);
    ScaledSumParams& params = operands.params;
    const Tensor partial_sums = at::empty({params.strips, params.batch, 3, channels}, options);
    params.grad_output = grad.const_data_ptr();
    params.grad_input = grad_x.mutable_data_ptr();
    params.grad_other = grad_other.mutable_data_ptr();
    params.partial_sums = partial_sums.mutable_data_ptr();
    params.grad_scale = grad_scales.mutable_data_ptr();
    params.grad_shift = grad_shift.mutable_data_ptr();
    C10_CUDA_CHECK(launch_scaled_sum_backward(params, dtype_of(x), getCurrentCUDAStream()));
    return {grad_x, grad_other, grad_scales, grad_shift};
  };
  const auto pytorch = [&]() -> Gradients {
    const auto sum = [&](const Tensor& map) { return map.sum({0, 2, 3}, /*keepdim=*/false, sums); };
    return {as_channels_last(grad_output * beside(x, scale)), as_channels_last(grad_output * beside(x, other_scale)),
            at::stack({sum(grad_output * x), sum(grad_output * other)}), sum(grad_output)};
  };
  return fastest(kind_of_call("scaled_sum backward", other), ours, pytorch);
}

}  // namespace

TORCH_LIBRARY_IMPL(overlock_mm, CUDA, m) {
  m.impl("scaled_sum", &scaled_sum_cuda);
  m.impl("_scaled_sum_backward", &scaled_sum_backward_cuda);
}

}  // namespace overlock_mm
