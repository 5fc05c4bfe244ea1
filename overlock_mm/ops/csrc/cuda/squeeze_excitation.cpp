// Squeeze-excitation for tensors on a GPU, by the kernels here or by PyTorch's, whichever is faster.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "choice.h"
#include "scale_and_shift.h"
#include "squeeze_excitation_launch.h"

namespace overlock_mm {
namespace {

using c10::cuda::getCurrentCUDAStream;
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

/// The small layers, with their tensors as the kernels take them, for a map in channels_last.
struct Layers {
  Tensor reduce_weight, expand_weight;
  SqueezeExcitationParams params{};

  Layers(const GatedMapParams& map, const Tensor& x, const Tensor& reduce_weight, const Tensor& expand_weight)
      : reduce_weight(as_parameter(reduce_weight, x)), expand_weight(as_parameter(expand_weight, x)) {
    params.batch = map.batch;
    params.positions = map.positions;
    params.channels = map.channels;
    params.hidden = reduce_weight.size(0);
    params.strips = map.strips;
    params.reduce_weight = this->reduce_weight.const_data_ptr();
    params.expand_weight = this->expand_weight.const_data_ptr();
  }

  Tensor empty(at::IntArrayRef sizes) const { return at::empty(sizes, reduce_weight.options()); }
  Tensor empty_of_channels() const { return empty({params.batch, params.channels}); }
  Tensor empty_of_hidden() const { return empty({params.batch, params.hidden}); }
  Tensor empty_sums() const { return empty({params.strips, params.batch, params.channels}); }
};

/// The maps, as the kernels take them. `other` may be undefined.
struct Maps {
  Tensor input, other;
  GatedMapParams params{};

  Maps(const Tensor& x, const OptionalTensor& other)
      : input(as_channels_last(x)), other(other ? as_channels_last(*other) : Tensor()) {
    static_cast<ScaleAndShiftParams&>(params) = scale_and_shift_params(input);
    params.by_image = true;
  }

  Dtype dtype() const { return dtype_of(input); }
  bool is_gated() const { return other.defined(); }

  /// input * gate, and * silu(other).
  Tensor gated(const Tensor& gate) const {
    const Tensor output = empty_channels_last(input);
    GatedMapParams scaling = params;
    scaling.scale = gate.const_data_ptr();
    scaling.output = output.mutable_data_ptr();
    if (is_gated()) {
      scaling.other = other.const_data_ptr();
      C10_CUDA_CHECK(launch_gated_forward(scaling, dtype(), getCurrentCUDAStream()));
    } else {
      C10_CUDA_CHECK(launch_scale_and_shift_forward(scaling, dtype(), getCurrentCUDAStream()));
    }
    return output;
  }

  /// Sums over positions: of the map, or of its gradient with respect to the gate.
  void launch_sums(const Tensor& grad, const Tensor& partial_sums) const {
    GatedMapParams sums = params;
    sums.partial_sums = partial_sums.mutable_data_ptr();
    if (grad.defined()) sums.grad_output = grad.const_data_ptr();
    if (grad.defined() && is_gated()) {
      sums.other = other.const_data_ptr();
      C10_CUDA_CHECK(launch_gated_sums(sums, dtype(), getCurrentCUDAStream()));
    } else {
      C10_CUDA_CHECK(launch_sums_over_positions(sums, dtype(), getCurrentCUDAStream()));
    }
  }

  /// Of input and other, which is undefined without other.
  std::pair<Tensor, Tensor> gradients(const Tensor& grad, const Tensor& gate, const Tensor& grad_mean) const {
    const Tensor grad_input = empty_channels_last(input),
                 grad_other = is_gated() ? empty_channels_last(input) : Tensor();
    GatedMapParams scaling = params;
    scaling.scale = gate.const_data_ptr();
    scaling.shift = grad_mean.const_data_ptr();
    if (is_gated()) {
      scaling.other = other.const_data_ptr();
      scaling.grad_output = grad.const_data_ptr();
      scaling.grad_input = grad_input.mutable_data_ptr();
      scaling.grad_other = grad_other.mutable_data_ptr();
      C10_CUDA_CHECK(launch_gated_gradients(scaling, dtype(), getCurrentCUDAStream()));
    } else {
      scaling.input = grad.const_data_ptr();
      scaling.output = grad_input.mutable_data_ptr();
      C10_CUDA_CHECK(launch_scale_and_shift_forward(scaling, dtype(), getCurrentCUDAStream()));
    }
    return {grad_input, grad_other};
  }
};

std::string kind_of(const char* name, const Tensor& x, const OptionalTensor& other) {
  return kind_of_call(std::string(name) + (other ? " with another map" : ""), x);
}

Tensor gated_by_pytorch(const Tensor& x, const Tensor& gate, const OptionalTensor& other) {
  const Tensor out = x * beside(x, gate);
  return laid_out_as(x, other ? out * at::silu(*other) : out);
}

Tensor gated_cuda(const Tensor& x, const Tensor& gate, const OptionalTensor& other) {
  check_gated(x, gate, other);
  const c10::cuda::CUDAGuard guard(x.device());
  if (x.numel() == 0) return empty_like_map(x);
  const auto ours = [&] { return laid_out_as(x, Maps(x, other).gated(as_parameter(gate, x))); };
  const auto pytorch = [&] { return gated_by_pytorch(x, gate, other); };
  return fastest(kind_of("gated", x, other), ours, pytorch);
}

Results squeeze_excitation_with_means_cuda(const Tensor& x, const Tensor& reduce_weight, const Tensor& reduce_bias,
                                           const Tensor& expand_weight, const Tensor& expand_bias,
                                           const OptionalTensor& other) {
  check_squeeze_excitation(x, reduce_weight, reduce_bias, expand_weight, expand_bias, other);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::ScalarType sums = accumulation_type(x);
  if (x.numel() == 0) {
    const auto zeros = [&](int64_t n) { return at::zeros({x.size(0), n}, x.options().dtype(sums)); };
    return {empty_like_map(x), zeros(x.size(1)), zeros(x.size(1)), zeros(reduce_bias.size(0))};
  }
  const auto ours = [&]() -> Results {
    const Maps maps(x, other);
    Layers layers(maps.params, x, reduce_weight, expand_weight);
    const Tensor partial_sums = layers.empty_sums();
    maps.launch_sums(Tensor(), partial_sums);
    layers.params.partial_sums = partial_sums.const_data_ptr();
    const Tensor reduced = as_parameter(reduce_bias, x), expanded = as_parameter(expand_bias, x);
    const Tensor gate = layers.empty_of_channels(), mean = layers.empty_of_channels();
    const Tensor squeezed = layers.empty_of_hidden();
    layers.params.reduce_bias = reduced.const_data_ptr();
    layers.params.expand_bias = expanded.const_data_ptr();
    layers.params.gate = gate.mutable_data_ptr();
    layers.params.mean = mean.mutable_data_ptr();
    layers.params.squeezed = squeezed.mutable_data_ptr();
    C10_CUDA_CHECK(launch_gates(layers.params, maps.dtype(), getCurrentCUDAStream()));
    return {laid_out_as(x, maps.gated(gate)), gate, mean, squeezed};
  };
  const auto pytorch = [&]() -> Results {
    const Tensor mean = x.mean({2, 3}, /*keepdim=*/false, sums);
    const Tensor squeezed = at::linear(mean, reduce_weight.to(sums), reduce_bias.to(sums));
    const Tensor gate = at::linear(at::gelu(squeezed), expand_weight.to(sums), expand_bias.to(sums)).sigmoid();
    return {gated_by_pytorch(x, gate, other), gate, mean, squeezed};
  };
  return fastest(kind_of("squeeze_excitation", x, other), ours, pytorch);
}

std::tuple<Tensor, Tensor> squeeze_excitation_cuda(const Tensor& x, const Tensor& reduce_weight,
                                                   const Tensor& reduce_bias, const Tensor& expand_weight,
                                                   const Tensor& expand_bias, const OptionalTensor& other) {
  const auto [output, gate, mean, squeezed] =
      squeeze_excitation_with_means_cuda(x, reduce_weight, reduce_bias, expand_weight, expand_bias, other);
  return {output, gate};
}

Gradients squeeze_excitation_backward_cuda(const Tensor& grad_output, const Tensor& x, const Tensor& reduce_weight,
                                           const Tensor& expand_weight, const OptionalTensor& other, const Tensor& gate,
                                           const Tensor& mean, const Tensor& squeezed) {
  check_gated(x, gate, other);
  check_grad_output(grad_output, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::ScalarType sums = accumulation_type(x);
  const int64_t channels = x.size(1), hidden = reduce_weight.size(0);
  if (x.numel() == 0) {
    const auto zeros = [&](at::IntArrayRef shape) { return at::zeros(shape, x.options().dtype(sums)); };
    return {empty_like_map(x),         zeros({hidden, channels}), zeros({hidden}),
            zeros({channels, hidden}), zeros({channels}),         other ? empty_like_map(x) : Tensor()};
  }
  const auto ours = [&]() -> Gradients {
    const Maps maps(x, other);
    Layers layers(maps.params, x, reduce_weight, expand_weight);
    const Tensor grad = as_channels_last(grad_output), gates = gate.contiguous(), means = mean.contiguous();
    const Tensor hidden_numbers = squeezed.contiguous(), partial_sums = layers.empty_sums();
    maps.launch_sums(grad, partial_sums);
    const Tensor grad_mean = layers.empty_of_channels(), grad_expanded = layers.empty_of_channels();
    const Tensor grad_squeezed = layers.empty_of_hidden();
    const Tensor grad_reduce_weight = layers.empty({hidden, channels}), grad_reduce_bias = layers.empty({hidden});
    const Tensor grad_expand_weight = layers.empty({channels, hidden}), grad_expand_bias = layers.empty({channels});
    SqueezeExcitationParams& params = layers.params;
    params.partial_sums = partial_sums.const_data_ptr();
    params.gate = const_cast<void*>(gates.const_data_ptr());
    params.mean = const_cast<void*>(means.const_data_ptr());
    params.squeezed = const_cast<void*>(hidden_numbers.const_data_ptr());
    params.grad_mean = grad_mean.mutable_data_ptr();
    params.grad_squeezed = grad_squeezed.mutable_data_ptr();
    params.grad_expanded = grad_expanded.mutable_data_ptr();
    params.grad_reduce_weight = grad_reduce_weight.mutable_data_ptr();
    params.grad_reduce_bias = grad_reduce_bias.mutable_data_ptr();
    params.grad_expand_weight = grad_expand_weight.mutable_data_ptr();
    params.grad_expand_bias = grad_expand_bias.mutable_data_ptr();
    C10_CUDA_CHECK(launch_gate_gradients(params, maps.dtype(), getCurrentCUDAStream()));
    C10_CUDA_CHECK(launch_weight_gradients(params, maps.dtype(), getCurrentCUDAStream()));
    const auto [grad_x, grad_other] = maps.gradients(grad, gates, grad_mean);
    return {laid_out_as(x, grad_x), grad_reduce_weight, grad_reduce_bias,
            grad_expand_weight,     grad_expand_bias,   other ? laid_out_as(x, grad_other) : Tensor()};
  };
  const auto pytorch = [&]() -> Gradients {
    const Tensor activated = other ? at::silu(*other) : Tensor();
    const Tensor grad_scaled = other ? grad_output * activated : grad_output;
    const Tensor grad_gate = (grad_scaled * x).sum({2, 3}, /*keepdim=*/false, sums);
    const Tensor grad_expanded = grad_gate * gate * (1 - gate);
    const Tensor grad_squeezed = at::gelu_backward(at::mm(grad_expanded, expand_weight.to(sums)), squeezed);
    const Tensor grad_mean = at::mm(grad_squeezed, reduce_weight.to(sums)) / (x.size(2) * x.size(3));
    const Tensor grad_x = at::addcmul(beside(x, grad_mean), grad_scaled, beside(x, gate));
    Tensor grad_other;
    if (other) grad_other = laid_out_as(x, at::silu_backward(grad_output * x * beside(x, gate), *other));
    return {laid_out_as(x, grad_x), at::mm(grad_squeezed.t(), mean),
            grad_squeezed.sum(0),   at::mm(grad_expanded.t(), at::gelu(squeezed)),
            grad_expanded.sum(0),   grad_other};
  };
  return fastest(kind_of("squeeze_excitation backward", x, other), ours, pytorch);
}

}  // namespace

TORCH_LIBRARY_IMPL(overlock_mm, CUDA, m) {
  m.impl("squeeze_excitation", &squeeze_excitation_cuda);
  m.impl("_gated", &gated_cuda);
  m.impl("_squeeze_excitation", &squeeze_excitation_with_means_cuda);
  m.impl("_squeeze_excitation_backward", &squeeze_excitation_backward_cuda);
}

}  // namespace overlock_mm
