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
  p.bfloat16 = input.scalar_type() == at::kBFloat16;
  p.input = input.const_data_ptr();
  p.weights = taps.const_data_ptr();
  return p;
}

/// A map as the kernels take it: those of some processors take bfloat16.
Tensor as_branch_input(const Tensor& x) {
  return best_table<BranchNormsKernels<float>>().take_bfloat16 ? as_map(x) : as_input(x);
}

/// A gradient, in the dtype of that map.
Tensor as_branch_gradient(const Tensor& grad_output, const Tensor& input) {
  const bool narrow = input.scalar_type() == at::kBFloat16;
  return narrow ? grad_output.to(at::kBFloat16).contiguous(at::MemoryFormat::ChannelsLast) : as_input(grad_output);
}

/// The map and the branches as the kernels take them. The parameters point to these tensors.
struct Arguments {
  Arguments(const Tensor& x, at::TensorList weights, at::IntArrayRef dilations)
      : input(as_branch_input(x)), taps(side_by_side(weights, x)), params(params_of(input, taps, weights, dilations)) {}

  /// (branches, C) or another shape, of the kernels' dtype.
  Tensor empty(at::IntArrayRef shape) const { return at::empty(shape, taps.options()); }
  Tensor cast(const Tensor& tensor) const { return tensor.to(taps.scalar_type()).contiguous(); }

  const Tensor input, taps;
  BranchNormsParams params;
};

double positions_of(const BranchNormsParams& p) { return double(p.batch) * p.height * p.width; }

/// Statistics of the branches, (branches, C); the variance is the biased one.
struct Statistics {
  std::vector<double> mean, variance;
};

/// From means and sums of squared distances of strips, (B, strips, branches, C).
template <typename T>
Statistics merge_statistics(const BranchNormsParams& p, const T* means, const T* squares) {
  const int64_t size = p.branches * p.channels, parts = p.batch * p.strips;
  const double positions = positions_of(p);
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

Statistics launch_statistics(const Arguments& arguments) {
  BranchNormsParams p = arguments.params;
  p.strips = strips_for_sums(p.batch * divide_up(p.channels, 16), p.height, 2 * p.reach + 1);
  const Tensor means = arguments.empty({p.batch * p.strips, p.branches, p.channels}), squares = at::empty_like(means);
  p.means = means.mutable_data_ptr();
  p.squares = squares.mutable_data_ptr();
  with_kernels<BranchNormsKernels>(means.scalar_type(), [&](const auto& kernels) {
    in_parallel(p.batch * p.strips * divide_up(p.channels, kernels.lanes),
                [&](int64_t begin, int64_t end) { kernels.statistics(p, begin, end); });
  });
  return AT_DISPATCH_FLOATING_TYPES(means.scalar_type(), "branch_norms", [&] {
    return merge_statistics(p, means.const_data_ptr<scalar_t>(), squares.const_data_ptr<scalar_t>());
  });
}

std::tuple<Tensor, Tensor> to_tensors(const Statistics& statistics, const Arguments& arguments) {
  const BranchNormsParams& p = arguments.params;
  const Tensor mean = arguments.empty({p.branches, p.channels}), variance = at::empty_like(mean);
  AT_DISPATCH_FLOATING_TYPES(mean.scalar_type(), "branch_norms", [&] {
    std::copy(statistics.mean.begin(), statistics.mean.end(), mean.mutable_data_ptr<scalar_t>());
    std::copy(statistics.variance.begin(), statistics.variance.end(), variance.mutable_data_ptr<scalar_t>());
  });
  return {mean, variance};
}

std::vector<double> to_vector(const Tensor& statistic) {
  const Tensor values = statistic.to(at::kDouble).contiguous();
  const double* const from = values.const_data_ptr<double>();
  return {from, from + values.numel()};
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

/// The output, given the statistics, as a kernel makes it.
Tensor launch_normalised(const Arguments& arguments, const Statistics& statistics, at::TensorList norm_weights,
                         at::TensorList norm_biases, double eps) {
  // By hand: with torch it would be about a hundred operators, up to half of the time on a small map.
  const BranchNormsParams& p = arguments.params;
  const Tensor gammas = stack_as_double(norm_weights), betas = stack_as_double(norm_biases);
  const Tensor kernel = arguments.empty({p.channels, 1, 2 * p.reach + 1, 2 * p.reach + 1}),
               bias = arguments.empty({p.channels});
  AT_DISPATCH_FLOATING_TYPES(kernel.scalar_type(), "branch_norms", [&] {
    fold_branches(p, statistics, arguments.taps.const_data_ptr<scalar_t>(), gammas.const_data_ptr<double>(),
                  betas.const_data_ptr<double>(), eps, kernel.mutable_data_ptr<scalar_t>(),
                  bias.mutable_data_ptr<scalar_t>());
  });
  return launch_depthwise_conv2d(arguments.input, kernel, bias, /*dilation=*/1, /*residual=*/false);
}

std::tuple<Tensor, Tensor, Tensor> branch_norms_cpu(const Tensor& x, at::TensorList weights,
                                                    at::TensorList norm_weights, at::TensorList norm_biases,
                                                    at::IntArrayRef dilations, double eps) {
  check_branch_norms(x, weights, norm_weights, dilations);
  check_norm_parameters("norm_biases", norm_biases, x, weights.size());
  TORCH_CHECK_VALUE(x.numel() > x.size(1), "x must have more than one value for each channel, got shape ", shape_of(x));
  const Arguments arguments(x, weights, dilations);
  const Statistics statistics = launch_statistics(arguments);
  const Tensor output = launch_normalised(arguments, statistics, norm_weights, norm_biases, eps);
  const auto [mean, variance] = to_tensors(statistics, arguments);
  return {as_output(output, x), mean, variance};
}

std::tuple<Tensor, Tensor> branch_statistics_cpu(const Tensor& x, at::TensorList weights, at::IntArrayRef dilations) {
  check_branches(x, weights, dilations);
  const Arguments arguments(x, weights, dilations);
  const int64_t size = x.numel() ? 0 : weights.size() * x.size(1);
  const Statistics zeros{std::vector<double>(size), std::vector<double>(size)};
  return to_tensors(x.numel() ? launch_statistics(arguments) : zeros, arguments);
}

Tensor branch_norms_given_cpu(const Tensor& x, at::TensorList weights, at::TensorList norm_weights,
                              at::TensorList norm_biases, const Tensor& mean, const Tensor& variance,
                              at::IntArrayRef dilations, double eps) {
  check_branch_norms_given(x, weights, norm_weights, norm_biases, mean, variance, dilations);
  const Arguments arguments(x, weights, dilations);
  const Statistics statistics{to_vector(mean), to_vector(variance)};
  return as_output(launch_normalised(arguments, statistics, norm_weights, norm_biases, eps), x);
}

// Gradients.

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

void launch_gradient_kernel(const BranchNormsParams& p, at::ScalarType dtype) {
  with_kernels<BranchNormsKernels>(dtype, [&](const auto& kernels) {
    in_parallel((p.whole_batch ? 1 : p.batch) * divide_up(p.channels, kernels.lanes),
                [&](int64_t begin, int64_t end) { kernels.gradients(p, begin, end); });
  });
}

/// Sums over this process of (grad_output - grad_mean) * (y - mean), (B, branches, C), where y is a branch's output.
Tensor launch_products(const Arguments& arguments, const Tensor& grad, const Tensor& grad_mean, const Tensor& mean) {
  BranchNormsParams p = arguments.params;
  const Tensor products = arguments.empty({p.batch, p.branches, p.channels});
  p.grad_output = grad.const_data_ptr();
  p.grad_mean = grad_mean.const_data_ptr();
  p.mean = mean.const_data_ptr();
  p.products = products.mutable_data_ptr();
  launch_gradient_kernel(p, products.scalar_type());
  return products;
}

/// Sums over the images of (B, branches, C), in the order in which a work item of the whole batch adds them up.
Tensor sum_over_images(const Tensor& products) {
  Tensor sum = at::zeros(products.sizes().slice(1), products.options());
  for (int64_t i = 0; i < products.size(0); ++i) sum += products[i];
  return sum;
}

/// Factors of the norms, (branches, C), in float64.
Tensor inverse_deviations(const Tensor& variance, double eps) { return (variance.to(at::kDouble) + eps).rsqrt(); }

/// (B, C, taps) summed over the images, the branches one after the other: (C * taps).
Tensor weights_one_after_the_other(const Tensor& partial, const BranchNormsParams& p) {
  const Tensor side_by_side = partial.sum(0);
  std::vector<Tensor> flat;
  int64_t first = 0;
  for (int b = 0; b < p.branches; ++b) {
    const int64_t taps = p.kernel_size[b] * p.kernel_size[b];
    flat.push_back(side_by_side.narrow(1, first, taps).flatten());
    first += taps;
  }
  return at::cat(flat);
}

struct MapGradients {
  Tensor input;     ///< a map
  Tensor weights;   ///< (C * taps)
  Tensor products;  ///< (B, branches, C)
};

/// The gradients for `positions` in the batch, given the products over the batch, or making them if `product` is
/// undefined. Then the batch is that of this process.
MapGradients launch_gradients(const Arguments& arguments, const Tensor& grad, const Tensor& grad_mean,
                              at::TensorList norm_weights, const Tensor& mean, const Tensor& inverse_deviation,
                              const Tensor& product, double positions) {
  BranchNormsParams p = arguments.params;
  const Tensor scale = arguments.cast(stack_as_double(norm_weights) * inverse_deviation),
               slope_of_product = arguments.cast(inverse_deviation * inverse_deviation / positions);
  const MapGradients gradients{empty_output(arguments.input), arguments.empty({p.batch, p.channels, p.taps()}),
                               arguments.empty({p.batch, p.branches, p.channels})};
  p.whole_batch = !product.defined();
  p.grad_output = grad.const_data_ptr();
  p.grad_mean = grad_mean.const_data_ptr();
  p.mean = mean.const_data_ptr();
  p.scale = scale.const_data_ptr();
  p.slope_of_product = slope_of_product.const_data_ptr();
  if (product.defined()) p.product = product.const_data_ptr();
  p.products = gradients.products.mutable_data_ptr();
  p.grad_input = gradients.input.mutable_data_ptr();
  p.grad_weights = gradients.weights.mutable_data_ptr();
  launch_gradient_kernel(p, scale.scalar_type());
  return {gradients.input, weights_one_after_the_other(gradients.weights, p), gradients.products};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> branch_norms_backward_cpu(const Tensor& grad_output, const Tensor& x,
                                                                     at::TensorList weights,
                                                                     at::TensorList norm_weights, const Tensor& mean,
                                                                     const Tensor& variance, at::IntArrayRef dilations,
                                                                     double eps) {
  check_branch_norms_backward(grad_output, x, weights, norm_weights, mean, variance, dilations);
  const Arguments arguments(x, weights, dilations);
  const BranchNormsParams& p = arguments.params;
  const double positions = positions_of(p);
  const Tensor grad = as_branch_gradient(grad_output, arguments.input),
               grad_mean = launch_channel_sums(grad) / positions, means = arguments.cast(mean),
               inverse_deviation = inverse_deviations(variance, eps);
  bool in_one_pass = false;
  with_kernels<BranchNormsKernels>(grad.scalar_type(), [&](const auto& kernels) {
    in_one_pass = takes_whole_batch(p, kernels.lanes, arguments.taps.element_size());
  });
  Tensor products, product;
  if (!in_one_pass) {
    products = launch_products(arguments, grad, grad_mean, means);
    product = sum_over_images(products);
  }
  const MapGradients gradients =
      launch_gradients(arguments, grad, grad_mean, norm_weights, means, inverse_deviation, product, positions);
  if (in_one_pass) products = gradients.products;
  const Tensor grad_norm_weights = products.to(at::kDouble).sum(0) * inverse_deviation;
  const Tensor grad_norm_biases = (grad_mean * positions).expand({p.branches, p.channels}).contiguous();
  return {as_output(gradients.input, x), gradients.weights, arguments.cast(grad_norm_weights), grad_norm_biases};
}

std::tuple<Tensor, Tensor> branch_norms_sums_cpu(const Tensor& grad_output, const Tensor& x, at::TensorList weights,
                                                 const Tensor& mean, at::IntArrayRef dilations) {
  check_branch_norms_sums(grad_output, x, weights, mean, dilations);
  const Arguments arguments(x, weights, dilations);
  const Tensor grad = as_branch_gradient(grad_output, arguments.input);
  // The mean of grad_output over all processes is not known yet.
  const Tensor no_mean = at::zeros({arguments.params.channels}, arguments.taps.options());
  const Tensor products = launch_products(arguments, grad, no_mean, arguments.cast(mean));
  return {launch_channel_sums(grad), sum_over_images(products)};
}

std::tuple<Tensor, Tensor> branch_norms_gradients_cpu(const Tensor& grad_output, const Tensor& x,
                                                      at::TensorList weights, at::TensorList norm_weights,
                                                      const Tensor& mean, const Tensor& variance,
                                                      const Tensor& grad_mean, const Tensor& product_mean,
                                                      at::IntArrayRef dilations, double eps) {
  check_branch_norms_gradients(grad_output, x, weights, norm_weights, mean, variance, grad_mean, product_mean,
                               dilations);
  const Arguments arguments(x, weights, dilations);
  const BranchNormsParams& p = arguments.params;
  if (x.numel() == 0) return {empty_like_map(x), at::zeros({p.channels * p.taps()}, arguments.taps.options())};
  // Means and not sums: as if there were one position.
  const MapGradients gradients = launch_gradients(
      arguments, as_branch_gradient(grad_output, arguments.input), arguments.cast(grad_mean), norm_weights,
      arguments.cast(mean), inverse_deviations(variance, eps), arguments.cast(product_mean), /*positions=*/1);
  return {as_output(gradients.input, x), gradients.weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(overlock_mm, CPU, m) {
  m.impl("branch_norms", &branch_norms_cpu);
  m.impl("_branch_norms_backward", &branch_norms_backward_cpu);
  m.impl("_branch_statistics", &branch_statistics_cpu);
  m.impl("_branch_norms_given", &branch_norms_given_cpu);
  m.impl("_branch_norms_sums", &branch_norms_sums_cpu);
  m.impl("_branch_norms_gradients", &branch_norms_gradients_cpu);
}

}  // namespace overlock_mm
