// Branch norms for tensors on the CPU.
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "../checks.h"
#include "launch.h"

namespace overlock_mm {
namespace {

using namespace cpu;

/// The taps of all branches side by side, (C, taps).
Tensor side_by_side(at::TensorList weights, const Tensor& x) {
  std::vector<Tensor> flat;
  for (const Tensor& weight : weights) flat.push_back(weight.flatten(1));
  return at::cat(flat, 1).to(accumulation_type(x));
}

/// Parameters of the norms, (branches, C), in float64.
Tensor stack_as_double(at::TensorList parameters) { return at::stack(parameters).to(at::kDouble); }

BranchNormsParams params_of(const Tensor& input, const Tensor& taps, at::TensorList weights,
                            at::IntArrayRef dilations) {
  BranchNormsParams p{};
  p.batch = input.size(0);
  p.channels = input.size(1);
  p.height = input.size(2);
  p.width = input.size(3);
  p.branches = weights.size();
  for (int i = 0; i < p.branches; ++i) {
    p.kernel_size[i] = weights[i].size(2);
    p.dilation[i] = p.kernel_size[i] == 1 ? 1 : dilations[i];  // of one tap, it may be any number
  }
  p.reach = weights[0].size(2) / 2;
  p.input = input.const_data_ptr();
  p.weights = taps.const_data_ptr();
  return p;
}

/// Statistics of the branches over the batch, (branches, C); the variance is the biased one.
struct Statistics {
  std::vector<double> mean, variance;
};

/// From means and sums of squared distances of strips, (B, strips, branches, C).
template <typename T>
Statistics merge_statistics(const BranchNormsParams& p, const T* means, const T* squares) {
  const int64_t size = p.branches * p.channels, parts = p.batch * p.strips;
  const double positions = double(p.batch * p.height * p.width);
  Statistics merged{std::vector<double>(size), std::vector<double>(size)};
  std::vector<double> share(parts);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t strip = part % p.strips;
    share[part] = double(((strip + 1) * p.height / p.strips - strip * p.height / p.strips) * p.width) / positions;
    for (int64_t i = 0; i < size; ++i) merged.mean[i] += share[part] * means[part * size + i];
  }
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t i = 0; i < size; ++i) {
      const double distance = means[part * size + i] - merged.mean[i];
      merged.variance[i] += squares[part * size + i] / positions + distance * distance * share[part];
    }
  }
  return merged;
}

/// The one kernel, (C, K, K), and the bias, (C), that the branches are, given their statistics.
template <typename T>
void fold_branches(const BranchNormsParams& p, const Statistics& statistics, const T* tap, const double* gamma,
                   const double* beta, double eps, T* kernel, T* bias) {
  const int64_t side = 2 * p.reach + 1;
  std::vector<double> sum(side * side);
  for (int64_t c = 0; c < p.channels; ++c, kernel += side * side) {
    std::fill(sum.begin(), sum.end(), 0.0);
    double shift = 0;
    for (int64_t b = 0; b < p.branches; ++b) {
      const int64_t at = b * p.channels + c;
      const double scale = gamma[at] / std::sqrt(statistics.variance[at] + eps);
      shift += beta[at] - statistics.mean[at] * scale;
      const int64_t k = p.kernel_size[b], d = p.dilation[b], margin = p.reach - k / 2 * d;
      for (int64_t ky = 0; ky < k; ++ky) {
        for (int64_t kx = 0; kx < k; ++kx) sum[(margin + ky * d) * side + margin + kx * d] += scale * *tap++;
      }
    }
    bias[c] = T(shift);
    for (int64_t i = 0; i < side * side; ++i) kernel[i] = T(sum[i]);
  }
}

std::tuple<Tensor, Tensor, Tensor> branch_norms_cpu(const Tensor& x, at::TensorList weights,
                                                    at::TensorList norm_weights, at::TensorList norm_biases,
                                                    at::IntArrayRef dilations, double eps) {
  check_branch_norms(x, weights, norm_weights, dilations);
  check_norm_parameters("norm_biases", norm_biases, x, weights.size());
  TORCH_CHECK_VALUE(x.numel() > x.size(1), "x must have more than one value for each channel, got shape ", shape_of(x));
  const Tensor input = as_input(x), taps = side_by_side(weights, x);
  BranchNormsParams p = params_of(input, taps, weights, dilations);
  p.strips = strips_for_sums(p.batch * divide_up(p.channels, 16), p.height, 2 * p.reach + 1);
  const Tensor means = at::empty({p.batch * p.strips, p.branches, p.channels}, taps.options()),
               squares = at::empty_like(means);
  p.means = means.mutable_data_ptr();
  p.squares = squares.mutable_data_ptr();
  with_kernels<BranchNormsKernels>(input.scalar_type(), [&](const auto& kernels) {
    in_parallel(p.batch * p.strips * divide_up(p.channels, kernels.lanes),
                [&](int64_t begin, int64_t end) { kernels.statistics(p, begin, end); });
  });

  // By hand: with torch it would be about a hundred operators, up to half of the time on a small map.
  const Tensor gammas = stack_as_double(norm_weights), betas = stack_as_double(norm_biases);
  const Tensor kernel = at::empty({p.channels, 1, 2 * p.reach + 1, 2 * p.reach + 1}, taps.options()),
               bias = at::empty({p.channels}, taps.options()),
               mean = at::empty({p.branches, p.channels}, taps.options()), variance = at::empty_like(mean);
  AT_DISPATCH_FLOATING_TYPES(taps.scalar_type(), "branch_norms", [&] {
    const Statistics statistics =
        merge_statistics(p, means.const_data_ptr<scalar_t>(), squares.const_data_ptr<scalar_t>());
    std::copy(statistics.mean.begin(), statistics.mean.end(), mean.mutable_data_ptr<scalar_t>());
    std::copy(statistics.variance.begin(), statistics.variance.end(), variance.mutable_data_ptr<scalar_t>());
    fold_branches(p, statistics, taps.const_data_ptr<scalar_t>(), gammas.const_data_ptr<double>(),
                  betas.const_data_ptr<double>(), eps, kernel.mutable_data_ptr<scalar_t>(),
                  bias.mutable_data_ptr<scalar_t>());
  });
  const Tensor output = launch_depthwise_conv2d(input, kernel, bias, /*dilation=*/1, /*residual=*/false);
  return {as_output(output, x), mean, variance};
}

/// Whether a work item of the backward is a channel block of the whole batch, in one pass. Else it is one of an image,
/// and there are two passes, which make the outputs of the branches twice (4 parts of work and not 3). One pass is
/// better unless threads would be idle, or it would take much memory. The results are the same.
bool takes_whole_batch(const BranchNormsParams& p, int64_t lanes, int64_t element_size) {
  constexpr int64_t most_bytes_of_thread = 64 * 1024 * 1024;
  const int64_t blocks = divide_up(p.channels, lanes), threads = at::get_num_threads();
  const int64_t bytes = 4 * (p.height + 2 * p.reach) * (p.width + 2 * p.reach) * lanes * element_size;
  const int64_t one_pass = 3 * p.batch * divide_up(blocks, threads);
  const int64_t two_passes = 4 * divide_up(p.batch * blocks, threads);
  return p.batch == 1 || (one_pass <= two_passes && p.batch * bytes <= most_bytes_of_thread);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> branch_norms_backward_cpu(const Tensor& grad_output, const Tensor& x,
                                                                     at::TensorList weights,
                                                                     at::TensorList norm_weights, const Tensor& mean,
                                                                     const Tensor& variance, at::IntArrayRef dilations,
                                                                     double eps) {
  check_branch_norms_backward(grad_output, x, weights, norm_weights, mean, variance, dilations);
  const Tensor input = as_input(x), grad = as_input(grad_output), taps = side_by_side(weights, x);
  const at::ScalarType dtype = input.scalar_type();
  BranchNormsParams p = params_of(input, taps, weights, dilations);
  const double positions = double(p.batch) * p.height * p.width;
  const Tensor grad_mean = launch_channel_sums(grad) / positions;

  const Tensor inverse_deviation = (variance.to(at::kDouble) + eps).rsqrt();
  const Tensor scale = (stack_as_double(norm_weights) * inverse_deviation).to(dtype),
               slope_of_product = (inverse_deviation * inverse_deviation / positions).to(dtype),
               means = mean.to(dtype).contiguous();
  const Tensor grad_input = empty_output(input),
               products = at::empty({p.batch, p.branches, p.channels}, taps.options()),
               partial = at::empty({p.batch, p.channels, p.taps()}, taps.options());
  p.grad_output = grad.const_data_ptr();
  p.grad_mean = grad_mean.const_data_ptr();
  p.mean = means.const_data_ptr();
  p.scale = scale.const_data_ptr();
  p.slope_of_product = slope_of_product.const_data_ptr();
  p.products = products.mutable_data_ptr();
  p.grad_weights = partial.mutable_data_ptr();
  with_kernels<BranchNormsKernels>(dtype, [&](const auto& kernels) {
    p.whole_batch = takes_whole_batch(p, kernels.lanes, input.element_size());
    const int64_t items = (p.whole_batch ? 1 : p.batch) * divide_up(p.channels, kernels.lanes);
    const auto pass = [&] {
      in_parallel(items, [&](int64_t begin, int64_t end) { kernels.gradients(p, begin, end); });
    };
    if (!p.whole_batch) pass();
    p.grad_input = grad_input.mutable_data_ptr();
    pass();
  });
  const Tensor grad_norm_weights = products.to(at::kDouble).sum(0) * inverse_deviation;
  const Tensor grad_norm_biases = (grad_mean * positions).expand({p.branches, p.channels}).contiguous();
  return {as_output(grad_input, x), partial.sum(0), grad_norm_weights.to(dtype), grad_norm_biases};
}

}  // namespace

TORCH_LIBRARY_IMPL(overlock_mm, CPU, m) {
  m.impl("branch_norms", &branch_norms_cpu);
  m.impl("_branch_norms_backward", &branch_norms_backward_cpu);
}

}  // namespace overlock_mm
