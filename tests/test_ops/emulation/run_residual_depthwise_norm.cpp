// Runs residual depth-wise convolutions with response norms. Numbers: dtype, batch, channels, height, width, whether
// there is a GELU, whether u is written before it is normalised, as in place, and whether the forward is made again
// from its scale. Arrays: x, weight, bias, gamma, beta, output, response, scale; for a backward also grad_output,
// grad_x, and the gradients of weight, bias, gamma and beta.
#include "case.h"
#include "residual_depthwise_norm_launch.h"
#include "response_norm_launch.h"

namespace {

using namespace overlock_mm;
using cuda_emulation::Array;
using cuda_emulation::Case;

cudaError_t run(Case& the_case) {
  const auto dtype = static_cast<Dtype>(the_case.numbers[0]);
  const int64_t accumulator = dtype == Dtype::float64 ? 8 : 4;
  ResidualDepthwiseNormParams p{};
  p.batch = the_case.numbers[1];
  p.channels = the_case.numbers[2];
  p.height = the_case.numbers[3];
  p.width = the_case.numbers[4];
  p.gelu = the_case.numbers[5] != 0;
  const bool inplace = the_case.numbers[6] != 0, again = the_case.numbers[7] != 0;
  const bool backward = the_case.arrays.size() > 8;
  residual_depthwise_norm_tiling(&p);
  const auto data = [&](size_t i) { return the_case.arrays[i].data; };
  const int64_t per_image = p.batch * p.channels * accumulator;
  const Array sums(per_image * p.strips), plain_sums(per_image * p.strips), slope(per_image);
  const Array grads_of_images(2 * per_image), partial_sums(10 * per_image * p.strips), u(the_case.arrays[0].size);
  p.input = data(0);
  p.weight = data(1);
  p.bias = data(2);
  p.sums = sums.data;
  if (inplace) p.output = u.data;
  if (backward) {
    p.grad_output = data(8);
    p.plain_sums = plain_sums.data;
  }
  cudaError_t error = again ? cudaSuccess : launch_residual_depthwise(p, dtype, nullptr);
  const ResponseFactorsParams factors{p.batch, p.channels, p.strips, 1e-6,       sums.data,           p.plain_sums,
                                      data(3), data(6),    data(7),  slope.data, grads_of_images.data};
  if (error == cudaSuccess && !again) error = launch_response_factors(factors, dtype, nullptr);
  p.scale = data(7);
  if (backward) {
    p.slope = slope.data;
    p.grad_input = data(9);
    p.partial_sums = partial_sums.data;
    p.grads_of_images = grads_of_images.data;
    p.grad_weight = data(10);
    p.grad_bias = data(11);
    p.grad_gamma = data(12);
    p.grad_beta = data(13);
    if (error == cudaSuccess) error = launch_residual_depthwise_gradients(p, dtype, nullptr);
    return error == cudaSuccess ? launch_parameter_gradients(p, dtype, nullptr) : error;
  }
  p.shift = data(4);
  p.output = data(5);
  if (inplace) {
    ResponseNormParams norm{};
    norm.batch = p.batch;
    norm.channels = p.channels;
    norm.positions = p.height * p.width;
    norm.strips = response_norm_strips(norm);
    norm.input = u.data;
    norm.scale = p.scale;
    norm.shift = p.shift;
    norm.output = p.output;
    return error == cudaSuccess ? launch_scale_and_shift(norm, dtype, nullptr) : error;
  }
  p.sums = nullptr;
  return error == cudaSuccess ? launch_residual_depthwise(p, dtype, nullptr) : error;
}

}  // namespace

int main(int count, char** arguments) { return cuda_emulation::run_case(count, arguments, run); }
