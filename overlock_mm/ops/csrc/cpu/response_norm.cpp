// Global response norms for tensors on the CPU.
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "../checks.h"
#include "launch.h"

namespace overlock_mm {
namespace cpu {
namespace {

ResponseNormParams params_of(const Tensor& input) {
  ResponseNormParams p{};
  p.batch = input.size(0);
  p.channels = input.size(1);
  p.positions = input.size(2) * input.size(3);
  p.strips = strips_for_sums(p.batch, p.positions, 64);
  p.bfloat16 = input.scalar_type() == at::kBFloat16;
  p.input = input.const_data_ptr();
  return p;
}

/// Sums over parts of the map, (B, strips, C): of input * other, and of other. Without other, of the squares alone.
std::pair<Tensor, Tensor> sums_of_products(const Tensor& input, const Tensor& other) {
  ResponseNormParams p = params_of(input);
  const auto options = at::TensorOptions(accumulation_type(input));
  const Tensor sums = at::empty({p.batch, p.strips, p.channels}, options);
  p.sums = sums.mutable_data_ptr();
  Tensor plain;
  if (other.defined()) {
    plain = at::empty_like(sums);
    p.other = other.const_data_ptr();
    p.plain_sums = plain.mutable_data_ptr();
  }
  with_kernels<ResponseNormKernels>(input.scalar_type(), [&](const auto& kernels) {
    in_parallel(p.batch * p.strips, [&](int64_t begin, int64_t end) { kernels.channel_sums(p, begin, end); });
  });
  return {sums, plain};
}

}  // namespace

Tensor launch_channel_sums(const Tensor& map) { return sums_of_products(map, map).second.flatten(0, 1).sum(0); }

Tensor launch_scale_and_shift(const Tensor& input, const Tensor& scale, const Tensor& other, const Tensor& other_scale,
                              const Tensor& shift, const Tensor& output) {
  ResponseNormParams p = params_of(input);
  p.output = output.mutable_data_ptr();
  p.scale = scale.const_data_ptr();
  if (other.defined()) {
    p.other = other.const_data_ptr();
    p.other_scale = other_scale.const_data_ptr();
  }
  if (shift.defined()) p.shift = shift.const_data_ptr();
  with_kernels<ResponseNormKernels>(input.scalar_type(), [&](const auto& kernels) {
    in_parallel(p.batch * p.strips, [&](int64_t begin, int64_t end) { kernels.scale_and_shift(p, begin, end); });
  });
  return output;
}

std::pair<Tensor, Tensor> response_and_scale(const Tensor& squares, const Tensor& gamma, double eps) {
  const int64_t batch = squares.size(0), strips = squares.size(1), channels = squares.size(2);
  const Tensor response = at::zeros({batch, channels}, squares.options()), scale = at::empty_like(response);
  AT_DISPATCH_FLOATING_TYPES(squares.scalar_type(), "response_and_scale", [&] {
    const scalar_t *from = squares.const_data_ptr<scalar_t>(), *weight = gamma.const_data_ptr<scalar_t>();
    scalar_t *norm = response.mutable_data_ptr<scalar_t>(), *to = scale.mutable_data_ptr<scalar_t>();
    for (int64_t image = 0; image < batch; ++image, norm += channels, to += channels) {
      for (int64_t strip = 0; strip < strips; ++strip, from += channels) {
        for (int64_t c = 0; c < channels; ++c) norm[c] += from[c];
      }
      double sum = 0;
      for (int64_t c = 0; c < channels; ++c) {
        norm[c] = std::sqrt(norm[c]);
        sum += norm[c];
      }
      const scalar_t inverse_mean = scalar_t(1 / (sum / double(channels) + eps));
      for (int64_t c = 0; c < channels; ++c) to[c] = weight[c] * (norm[c] * inverse_mean) + 1;
    }
  });
  return {response, scale};
}

}  // namespace cpu

namespace {

using namespace cpu;

struct ResponseGradients {
  Tensor scale, slope;  ///< (B, C): the gradient of the input is scale * grad_output + slope * input
  Tensor gamma, beta;   ///< (C)
};

/// Of sums over parts, (B, strips, C), of input * grad_output, and of grad_output.
ResponseGradients response_gradients(const Tensor& products, const Tensor& sums, const Tensor& gamma,
                                     const Tensor& response, double eps) {
  const int64_t batch = products.size(0), strips = products.size(1), channels = products.size(2);
  ResponseGradients out{at::empty_like(response), at::empty_like(response), at::empty_like(gamma),
                        at::empty_like(gamma)};
  AT_DISPATCH_FLOATING_TYPES(products.scalar_type(), "response_gradients", [&] {
    const scalar_t *product = products.const_data_ptr<scalar_t>(), *sum = sums.const_data_ptr<scalar_t>(),
                   *weight = gamma.const_data_ptr<scalar_t>(), *norm = response.const_data_ptr<scalar_t>();
    scalar_t *scale = out.scale.mutable_data_ptr<scalar_t>(), *slope = out.slope.mutable_data_ptr<scalar_t>();
    std::vector<double> products_of_image(channels), grad_gamma(channels), grad_beta(channels);
    for (int64_t image = 0; image < batch; ++image, norm += channels, scale += channels, slope += channels) {
      std::fill(products_of_image.begin(), products_of_image.end(), 0.0);
      for (int64_t strip = 0; strip < strips; ++strip, product += channels, sum += channels) {
        for (int64_t c = 0; c < channels; ++c) {
          products_of_image[c] += product[c];
          grad_beta[c] += sum[c];
        }
      }
      double mean = 0, grad_mean = 0;
      for (int64_t c = 0; c < channels; ++c) mean += norm[c];
      mean = mean / double(channels) + eps;
      for (int64_t c = 0; c < channels; ++c) grad_mean += products_of_image[c] * weight[c] * norm[c];
      grad_mean /= mean * mean * double(channels);
      for (int64_t c = 0; c < channels; ++c) {
        const double normed = norm[c] / mean;
        grad_gamma[c] += products_of_image[c] * normed;
        scale[c] = scalar_t(weight[c] * normed + 1);
        // Through the response itself, and through the mean over channels that divides it. The norm of a map of zeros
        // has no slope.
        slope[c] =
            norm[c] > 0 ? scalar_t((products_of_image[c] * weight[c] / mean - grad_mean) / norm[c]) : scalar_t(0);
      }
    }
    std::copy(grad_gamma.begin(), grad_gamma.end(), out.gamma.mutable_data_ptr<scalar_t>());
    std::copy(grad_beta.begin(), grad_beta.end(), out.beta.mutable_data_ptr<scalar_t>());
  });
  return out;
}

/// A map as the kernels take it, normalised.
Tensor launch_normed(const Tensor& input, const Tensor& scale, const Tensor& beta) {
  return launch_scale_and_shift(input, scale, Tensor(), Tensor(), as_parameter(beta, input), empty_output(input));
}

std::tuple<Tensor, Tensor, Tensor> response_norm_cpu(const Tensor& x, const Tensor& gamma, const Tensor& beta,
                                                     double eps) {
  check_response_norm(x, gamma, beta);
  const Tensor input = as_map(x), squares = sums_of_products(input, Tensor()).first;
  const auto [response, scale] = response_and_scale(squares, as_parameter(gamma, x), eps);
  return {as_output(launch_normed(input, scale, beta), x), scale, response};
}

std::tuple<Tensor, Tensor> global_response_norm_cpu(const Tensor& x, const Tensor& gamma, const Tensor& beta,
                                                    double eps) {
  const auto [output, scale, response] = response_norm_cpu(x, gamma, beta, eps);
  return {output, scale};
}

Tensor response_normed_cpu(const Tensor& x, const Tensor& scale, const Tensor& beta) {
  check_response_normed(x, scale, beta);
  return as_output(launch_normed(as_map(x), as_parameter(scale, x), beta), x);
}

std::tuple<Tensor, Tensor, Tensor> response_norm_backward_cpu(const Tensor& grad_output, const Tensor& x,
                                                              const Tensor& gamma, const Tensor& response, double eps) {
  check_response_norm_backward(grad_output, x, gamma, response);
  const auto [input, grad] = as_maps(x, grad_output);
  const auto [products, sums] = sums_of_products(input, grad);
  const ResponseGradients gradients =
      response_gradients(products, sums, as_parameter(gamma, x), as_parameter(response, x), eps);
  const Tensor grad_input =
      launch_scale_and_shift(grad, gradients.scale, input, gradients.slope, Tensor(), empty_output(input));
  return {as_output(grad_input, x), gradients.gamma, gradients.beta};
}

}  // namespace

TORCH_LIBRARY_IMPL(overlock_mm, CPU, m) {
  m.impl("global_response_norm", &global_response_norm_cpu);
  m.impl("_response_normed", &response_normed_cpu);
  m.impl("_response_norm", &response_norm_cpu);
  m.impl("_response_norm_backward", &response_norm_backward_cpu);
}

}  // namespace overlock_mm
