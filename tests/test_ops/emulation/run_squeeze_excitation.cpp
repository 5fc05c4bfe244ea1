// Runs the launchers of squeeze_excitation_launch.cu, with those of scale_and_shift_launch.cu around them. Numbers:
// dtype, batch, positions, channels, hidden. Arrays: input, reduce_weight, reduce_bias, expand_weight, expand_bias,
// output, gate, mean, squeezed, grad_output, grad_input, grad_mean, grad_squeezed, grad_expanded, grad_reduce_weight,
// grad_reduce_bias, grad_expand_weight, grad_expand_bias, other, grad_other.
#include "case.h"
#include "scale_and_shift_launch.h"
#include "squeeze_excitation_launch.h"

int main(int count, char** arguments) {
  using namespace cuda_emulation;
  return run_case(count, arguments, [](Case& given) {
    const auto dtype = static_cast<overlock_mm::Dtype>(given.numbers[0]);
    const auto array = [&](int i) { return given.arrays[static_cast<size_t>(i)].data; };
    overlock_mm::ScaleAndShiftParams map{};
    map.batch = given.numbers[1];
    map.positions = given.numbers[2];
    map.channels = given.numbers[3];
    map.by_image = true;
    map.strips = scale_and_shift_strips(map);
    const int64_t size = dtype == overlock_mm::Dtype::float64 ? 8 : 4;
    const Array partial_sums(map.strips * map.batch * map.channels * size);
    overlock_mm::SqueezeExcitationParams params{};
    params.batch = map.batch;
    params.positions = map.positions;
    params.channels = map.channels;
    params.hidden = given.numbers[4];
    params.strips = map.strips;
    params.reduce_weight = array(1);
    params.reduce_bias = array(2);
    params.expand_weight = array(3);
    params.expand_bias = array(4);
    params.partial_sums = partial_sums.data;
    params.gate = array(6);
    params.mean = array(7);
    params.squeezed = array(8);
    params.grad_mean = array(11);
    params.grad_squeezed = array(12);
    params.grad_expanded = array(13);
    params.grad_reduce_weight = array(14);
    params.grad_reduce_bias = array(15);
    params.grad_expand_weight = array(16);
    params.grad_expand_bias = array(17);

    const auto sums = [&](const void* grad_output) {
      overlock_mm::GatedMapParams of_map{};
      static_cast<overlock_mm::ScaleAndShiftParams&>(of_map) = map;
      of_map.input = array(0);
      of_map.grad_output = grad_output;
      of_map.partial_sums = partial_sums.data;
      of_map.other = array(18);
      const bool is_gated = of_map.other && grad_output;
      return is_gated ? launch_gated_sums(of_map, dtype, nullptr) : launch_sums_over_positions(of_map, dtype, nullptr);
    };
    const auto scaled = [&](const void* from, const void* shift, void* to) {
      overlock_mm::GatedMapParams scaling{};
      static_cast<overlock_mm::ScaleAndShiftParams&>(scaling) = map;
      scaling.scale = params.gate;
      scaling.shift = shift;
      scaling.other = array(18);
      scaling.input = scaling.other ? array(0) : from;
      scaling.grad_output = scaling.other ? from : nullptr;
      scaling.output = scaling.grad_input = to;
      scaling.grad_other = array(19);
      if (!scaling.other) return launch_scale_and_shift_forward(scaling, dtype, nullptr);
      return shift ? launch_gated_gradients(scaling, dtype, nullptr) : launch_gated_forward(scaling, dtype, nullptr);
    };
    cudaError_t error = sums(nullptr);
    if (error == cudaSuccess) error = launch_gates(params, dtype, nullptr);
    if (error == cudaSuccess) error = scaled(array(0), nullptr, array(5));
    if (error == cudaSuccess) error = sums(array(9));
    if (error == cudaSuccess) error = launch_gate_gradients(params, dtype, nullptr);
    if (error == cudaSuccess) error = launch_weight_gradients(params, dtype, nullptr);
    if (error == cudaSuccess) error = scaled(array(9), params.grad_mean, array(10));
    return error;
  });
}
