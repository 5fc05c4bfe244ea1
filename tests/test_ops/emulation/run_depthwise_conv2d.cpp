// Runs the launchers of depthwise_conv2d_launch.cu. Numbers: dtype, batch, channels, height, width, kernel size,
// dilation, residual. Arrays: input, weight, bias, output, grad_output, grad_input, grad_weight, grad_bias. Without an
// output there is no forward, without grad_output no backward.
#include "case.h"
#include "depthwise_conv2d_launch.h"

int main(int count, char** arguments) {
  using namespace cuda_emulation;
  return run_case(count, arguments, [](Case& given) {
    const auto dtype = static_cast<overlock_mm::Dtype>(given.numbers[0]);
    overlock_mm::DepthwiseParams params{};
    params.batch = given.numbers[1];
    params.channels = given.numbers[2];
    params.height = given.numbers[3];
    params.width = given.numbers[4];
    params.kernel_size = given.numbers[5];
    params.dilation = given.numbers[6];
    params.residual = given.numbers[7] != 0;
    params.input = given.arrays[0].data;
    params.weight = given.arrays[1].data;
    params.bias = given.arrays[2].data;
    params.output = given.arrays[3].data;
    params.grad_output = given.arrays[4].data;
    params.grad_input = given.arrays[5].data;
    params.grad_weight = given.arrays[6].data;
    params.grad_bias = given.arrays[7].data;

    cudaError_t error = cudaSuccess;
    if (params.output) error = launch_depthwise_forward(params, dtype, nullptr);
    if (error != cudaSuccess || !params.grad_output) return error;
    error = depthwise_partials(params, dtype, &params.partials);
    const int64_t size = dtype == overlock_mm::Dtype::float64 ? 8 : 4;
    const int64_t sums = params.channels * (params.kernel_size * params.kernel_size + 1);
    const Array partial_sums(params.partials * sums * size);
    params.partial_sums = partial_sums.data;
    return error == cudaSuccess ? launch_depthwise_backward(params, dtype, nullptr) : error;
  });
}
