// Runs the launchers of layer_norm_launch.cu. Numbers: dtype, positions, channels. Arrays: input, weight, bias, eps
// (one float64), output, mean, rstd, grad_output, other_grad, grad_input, grad_weight, grad_bias. What has no output,
// or no grad_output, is not launched.
#include "case.h"
#include "layer_norm_launch.h"

int main(int count, char** arguments) {
  using namespace cuda_emulation;
  return run_case(count, arguments, [](Case& given) {
    const auto dtype = static_cast<overlock_mm::Dtype>(given.numbers[0]);
    overlock_mm::LayerNormParams params{};
    params.positions = given.numbers[1];
    params.channels = given.numbers[2];
    params.input = given.arrays[0].data;
    params.weight = given.arrays[1].data;
    params.bias = given.arrays[2].data;
    params.eps = *static_cast<const double*>(given.arrays[3].data);
    params.output = given.arrays[4].data;
    params.mean = given.arrays[5].data;
    params.rstd = given.arrays[6].data;
    params.grad_output = given.arrays[7].data;
    params.other_grad = given.arrays[8].data;
    params.grad_input = given.arrays[9].data;
    params.grad_weight = given.arrays[10].data;
    params.grad_bias = given.arrays[11].data;

    cudaError_t error = cudaSuccess;
    if (params.output) error = launch_layer_norm_forward(params, dtype, nullptr);
    if (error != cudaSuccess || !params.grad_output) return error;
    params.partials = layer_norm_partials(params, dtype);
    const int64_t size = dtype == overlock_mm::Dtype::float64 ? 8 : 4;
    const Array partial_sums(params.partials * 2 * params.channels * size);
    params.partial_sums = partial_sums.data;
    return launch_layer_norm_backward(params, dtype, nullptr);
  });
}
