// Runs response norms, forward, forward again or backward. Numbers: dtype, batch, channels, positions, whether the
// forward is made again from its scale. Arrays: x, gamma, beta, output, response, scale; for a backward also
// grad_output, grad_x and the gradients of gamma and beta.
#include "case.h"
#include "response_norm_launch.h"

namespace {

using namespace overlock_mm;
using cuda_emulation::Array;
using cuda_emulation::Case;

cudaError_t run(Case& the_case) {
  const auto dtype = static_cast<Dtype>(the_case.numbers[0]);
  const int64_t accumulator = dtype == Dtype::float64 ? 8 : 4;
  ResponseNormGradientsParams p{};
  p.batch = the_case.numbers[1];
  p.channels = the_case.numbers[2];
  p.positions = the_case.numbers[3];
  p.strips = response_norm_strips(p);
  const auto data = [&](size_t i) { return the_case.arrays[i].data; };
  const bool again = the_case.numbers[4] != 0, backward = the_case.arrays.size() > 6;
  const int64_t per_image = p.batch * p.channels * accumulator;
  const Array sums(per_image * p.strips), plain_sums(per_image * p.strips), slope(per_image);
  const Array grads_of_images(2 * per_image);
  ResponseFactorsParams factors{p.batch, p.channels, p.strips, 1e-6,    sums.data, nullptr,
                                data(1), data(4),    data(5),  nullptr, nullptr};
  p.input = data(0);
  p.sums = sums.data;
  if (backward) {
    p.other = data(6);
    factors.plain_sums = p.plain_sums = plain_sums.data;
    factors.slope = slope.data;
    factors.grads_of_images = grads_of_images.data;
  }
  cudaError_t error = again ? cudaSuccess : launch_channel_sums(p, dtype, nullptr);
  if (error == cudaSuccess && !again) error = launch_response_factors(factors, dtype, nullptr);
  if (backward) {
    std::swap(p.input, p.other);
    p.other_scale = slope.data;
    p.grads_of_images = grads_of_images.data;
    p.grad_gamma = data(8);
    p.grad_beta = data(9);
  } else {
    p.shift = data(2);
  }
  p.scale = data(5);
  p.output = data(backward ? 7 : 3);
  if (error != cudaSuccess) return error;
  return backward ? launch_response_norm_gradients(p, dtype, nullptr) : launch_scale_and_shift(p, dtype, nullptr);
}

}  // namespace

int main(int count, char** arguments) { return cuda_emulation::run_case(count, arguments, run); }
