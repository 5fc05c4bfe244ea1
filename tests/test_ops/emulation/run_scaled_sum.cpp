// Runs the launchers of scaled_sum_launch.cu. Numbers: dtype, batch, positions, channels, channels of the map that
// input is a slice of, the first one of the slice. Arrays: that map, scale, shift, other, other_scale, other_shift,
// output, grad_output, grad_input, grad_other, grad_scales, grad_shift.
#include "case.h"
#include "scaled_sum_launch.h"

int main(int count, char** arguments) {
  using namespace cuda_emulation;
  return run_case(count, arguments, [](Case& given) {
    const auto dtype = static_cast<overlock_mm::Dtype>(given.numbers[0]);
    const bool is_half = dtype == overlock_mm::Dtype::float16 || dtype == overlock_mm::Dtype::bfloat16;
    const int64_t size = dtype == overlock_mm::Dtype::float64 ? 8 : 4;
    overlock_mm::ScaledSumParams params{};
    params.batch = given.numbers[1];
    params.positions = given.numbers[2];
    params.channels = given.numbers[3];
    params.input_step = given.numbers[4];
    params.input = static_cast<const char*>(given.arrays[0].data) + given.numbers[5] * (is_half ? 2 : size);
    params.scale = given.arrays[1].data;
    params.shift = given.arrays[2].data;
    params.other = given.arrays[3].data;
    params.other_scale = given.arrays[4].data;
    params.other_shift = given.arrays[5].data;
    params.output = given.arrays[6].data;
    params.grad_output = given.arrays[7].data;
    params.grad_input = given.arrays[8].data;
    params.grad_other = given.arrays[9].data;
    params.grad_scale = given.arrays[10].data;
    params.grad_shift = given.arrays[11].data;
    params.strips = scale_and_shift_strips(params);

    const cudaError_t error = launch_scaled_sum_forward(params, dtype, nullptr);
    if (error != cudaSuccess) return error;
    const Array partial_sums(params.strips * params.batch * 3 * params.channels * size);
    params.partial_sums = partial_sums.data;
    return launch_scaled_sum_backward(params, dtype, nullptr);
  });
}
