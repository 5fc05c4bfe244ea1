// Runs the launchers of scale_and_shift_launch.cu. Numbers: dtype, batch, positions, channels, whether each image has
// its own scale. Arrays: input, scale, shift, other, output, grad_output, grad_input, grad_scale, grad_shift.
#include "case.h"
#include "scale_and_shift_launch.h"

int main(int count, char** arguments) {
  using namespace cuda_emulation;
  return run_case(count, arguments, [](Case& given) {
    const auto dtype = static_cast<overlock_mm::Dtype>(given.numbers[0]);
    overlock_mm::ScaleAndShiftParams params{};
    params.batch = given.numbers[1];
    params.positions = given.numbers[2];
    params.channels = given.numbers[3];
    params.by_image = given.numbers[4] != 0;
    params.input = given.arrays[0].data;
    params.scale = given.arrays[1].data;
    params.shift = given.arrays[2].data;
    params.other = given.arrays[3].data;
    params.output = given.arrays[4].data;
    params.grad_output = given.arrays[5].data;
    params.grad_input = given.arrays[6].data;
    params.grad_scale = given.arrays[7].data;
    params.grad_shift = given.arrays[8].data;
    params.strips = scale_and_shift_strips(params);

    const cudaError_t error = launch_scale_and_shift_forward(params, dtype, nullptr);
    if (error != cudaSuccess) return error;
    const int64_t size = dtype == overlock_mm::Dtype::float64 ? 8 : 4;
    const Array partial_sums(params.strips * params.batch * 2 * params.channels * size);
    params.partial_sums = partial_sums.data;
    return launch_scale_and_shift_backward(params, dtype, nullptr);
  });
}
