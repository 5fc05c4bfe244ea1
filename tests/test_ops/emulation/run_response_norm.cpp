// Runs response norms, forward or backward. Numbers: dtype, batch, channels, positions. Arrays: x, gamma, beta, output,
// response; for a backward also grad_output, grad_x and the gradients of gamma and beta.
#include "case.h"
#include "response_norm_launch.h"

namespace {

using namespace overlock_mm;
using cuda_emulation::Array;
using cuda_emulation::Case;

cudaError_t run(Case& the_case) {
  const auto dtype = static_cast<Dtype>(the_case.numbers[0]);
  const int64_t accumulator = dtype == Dtype::float64 ? 8 : 4;
  ResponseNormParams p{};
  p.batch = the_case.numbers[1];
  p.channels = the_case.numbers[2];
  p.positions = the_case.numbers[3];
  p.strips = response_norm_strips(p);
  const auto data = [&](size_t i) { return the_case.arrays[i].data; };
  const bool backward = the_case.arrays.size() > 5;
  const int64_t per_image = p.batch * p.channels * accumulator;
  const Array sums(per_image * p.strips), plain_sums(per_image * p.strips), scale(per_image), slope(per_image);
  const Array grads_of_images(2 * per_image);
  ResponseFactorsParams factors{p.batch, p.channels, p.strips,   1e-6,    sums.data, nullptr,
                                data(1), data(4),    scale.data, nullptr, nullptr};
  p.input = data(0);
  p.sums = sums.data;
  if (backward) {
    p.other = data(5);
    factors.plain_sums = p.plain_sums = plain_sums.data;
    factors.slope = slope.data;
    factors.grads_of_images = grads_of_images.data;
  }
  cudaError_t error = launch_channel_sums(p, dtype, nullptr);
  if (error == cudaSuccess) error = launch_response_factors(factors, dtype, nullptr);
  if (backward) {
    std::swap(p.input, p.other);
    p.other_scale = slope.data;
  } else {
    p.shift = data(2);
  }
  p.scale = scale.data;
  p.output = data(backward ? 6 : 3);
  if (error == cudaSuccess) error = launch_scale_and_shift(p, dtype, nullptr);
  if (error == cudaSuccess && backward) error = launch_sum_over_images(factors, data(7), data(8), dtype, nullptr);
  return error;
}

}  // namespace

int main(int count, char** arguments) { return cuda_emulation::run_case(count, arguments, run); }
