// Branch norms for tensors on a GPU, by the kernels here or by PyTorch's operators, whichever are faster.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../checks.h"
#include "branch_norms_launch.h"
#include "choice.h"
#include "depthwise_conv2d.h"
#include "tensors.h"

namespace overlock_mm {
namespace {

using c10::cuda::getCurrentCUDAStream;

/// Sizes, branches and dtype.
CudaBranchNormsParams params_of(at::IntArrayRef size, at::IntArrayRef kernel_sizes, at::IntArrayRef dilations,
                                Dtype dtype) {
  CudaBranchNormsParams p{};
  p.dtype = dtype;
  p.batch = size[0];
  p.channels = size[1];
  p.height = size[2];
  p.width = size[3];
  p.branches = static_cast<int>(kernel_sizes.size());
  for (int b = 0; b < p.branches; ++b) {
    p.kernel_size[b] = kernel_sizes[b];
    p.dilation[b] = kernel_sizes[b] == 1 ? 1 : dilations[b];  // of one tap, it may be any number
  }
  return p;
}

std::vector<int64_t> sizes_of(at::TensorList weights) {
  std::vector<int64_t> sizes;
  for (const Tensor& weight : weights) sizes.push_back(weight.size(2));
  return sizes;
}

/// Images whose branches' gradients are in memory at a time. They are the backward's largest buffer.
int64_t images_at_a_time(const CudaBranchNormsParams& p, int64_t element_size) {
  constexpr int64_t kMostBytes = int64_t{256} << 20;
  return std::clamp<int64_t>(kMostBytes / (p.branches * p.image_size() * element_size), 1, p.batch);
}

/// The map and the branches, as the kernels take them.
struct Arguments {
  Tensor input;
  CudaBranchNormsParams params;

  Arguments(const Tensor& x, at::TensorList weights, at::IntArrayRef dilations)
      : input(as_channels_last(x)), params(params_of(x.sizes(), sizes_of(weights), dilations, dtype_of(x))) {
    params.input = input.const_data_ptr();
    add(weights, params.weights);
    if (x.numel()) C10_CUDA_CHECK(branch_norms_parts(params, &parts_));
    params.parts = parts_.sums;
    params.weight_parts = parts_.weights;
  }

  void add(at::TensorList parameters, const void** pointers) {
    for (const Tensor& parameter : parameters) {
      kept_.push_back(as_parameter(parameter, input));
      *pointers++ = kept_.back().const_data_ptr();
    }
  }
  /// Statistics, which are of the accumulation type.
  void* keep(const Tensor& statistics) {
    kept_.push_back(as_parameter(statistics, input));
    return const_cast<void*>(kept_.back().const_data_ptr());
  }

  /// Of the accumulation type.
  Tensor empty(at::IntArrayRef size) const { return at::empty(size, input.options().dtype(accumulation_type(input))); }
  Tensor empty_statistics() const { return empty({params.branches, params.channels}); }

 private:
  BranchNormsParts parts_{};
  std::vector<Tensor> kept_;
};

// Forward.

using Statistics = std::tuple<Tensor, Tensor>;

Statistics run_statistics(const Arguments& arguments) {
  CudaBranchNormsParams p = arguments.params;
  const Tensor mean = arguments.empty_statistics(), variance = arguments.empty_statistics();
  const Tensor counts = at::empty({p.parts}, mean.options().dtype(at::kLong)),
               means = arguments.empty({p.parts, p.branches, p.channels}), squares = at::empty_like(means);
  p.partial_counts = counts.mutable_data_ptr<int64_t>();
  p.partial_means = means.mutable_data_ptr();
  p.partial_squares = squares.mutable_data_ptr();
  p.mean = mean.mutable_data_ptr();
  p.variance = variance.mutable_data_ptr();
  C10_CUDA_CHECK(launch_branch_statistics(p, getCurrentCUDAStream()));
  return {mean, variance};
}

/// The output, given the statistics: one convolution.
Tensor run_normalised(Arguments& arguments, const Statistics& statistics, at::TensorList norm_weights,
                      at::TensorList norm_biases, double eps) {
  CudaBranchNormsParams& p = arguments.params;
  const int64_t side = p.kernel_size[0];
  const Tensor kernel = arguments.empty({p.channels, 1, side, side}), bias = arguments.empty({p.channels});
  arguments.add(norm_weights, p.norm_weights);
  arguments.add(norm_biases, p.norm_biases);
  p.mean = arguments.keep(std::get<0>(statistics));
  p.variance = arguments.keep(std::get<1>(statistics));
  p.eps = eps;
  p.kernel = kernel.mutable_data_ptr();
  p.bias = bias.mutable_data_ptr();
  C10_CUDA_CHECK(launch_branch_fold(p, getCurrentCUDAStream()));
  return launch_depthwise_conv2d(arguments.input, kernel, bias, /*dilation=*/1, /*residual=*/false);
}

Statistics branch_statistics_cuda(const Tensor& x, at::TensorList weights, at::IntArrayRef dilations) {
  check_branches(x, weights, dilations);
  const c10::cuda::CUDAGuard guard(x.device());
  const Arguments arguments(x, weights, dilations);
  if (x.numel() == 0) return {arguments.empty_statistics().zero_(), arguments.empty_statistics().zero_()};
  return run_statistics(arguments);
}

Tensor branch_norms_given_cuda(const Tensor& x, at::TensorList weights, at::TensorList norm_weights,
                               at::TensorList norm_biases, const Tensor& mean, const Tensor& variance,
                               at::IntArrayRef dilations, double eps) {
  check_branch_norms_given(x, weights, norm_weights, norm_biases, mean, variance, dilations);
  const c10::cuda::CUDAGuard guard(x.device());
  if (x.numel() == 0) return empty_like_map(x);
  Arguments arguments(x, weights, dilations);
  return laid_out_as(x, run_normalised(arguments, {mean, variance}, norm_weights, norm_biases, eps));
}

// Backward.

struct Sums {
  Tensor grad_sum, products;                   ///< (C), (branches, C)
  Tensor grad_norm_weights, grad_norm_biases;  ///< (branches, C), where they are wanted
};

/// Sums over the map, over `divisor`. With the variance, the gradients of the norms too.
Sums run_sums(Arguments& arguments, const Tensor& grad, const Tensor& mean, double divisor, const Tensor& variance,
              double eps) {
  CudaBranchNormsParams& p = arguments.params;
  const Tensor partial = arguments.empty({p.parts, p.branches + 1, p.channels});
  Sums sums{arguments.empty({p.channels}), arguments.empty_statistics(), {}, {}};
  p.grad_output = grad.const_data_ptr();
  p.mean = arguments.keep(mean);
  p.divisor = divisor;
  p.partial_products = partial.mutable_data_ptr();
  p.grad_sum = sums.grad_sum.mutable_data_ptr();
  p.products = sums.products.mutable_data_ptr();
  if (variance.defined()) {
    sums.grad_norm_weights = arguments.empty_statistics();
    sums.grad_norm_biases = arguments.empty_statistics();
    p.variance = arguments.keep(variance);
    p.eps = eps;
    p.grad_norm_weights = sums.grad_norm_weights.mutable_data_ptr();
    p.grad_norm_biases = sums.grad_norm_biases.mutable_data_ptr();
  }
  C10_CUDA_CHECK(launch_branch_products(p, getCurrentCUDAStream()));
  return sums;
}

/// Gradients of the map and of the weights, a few images at a time.
std::tuple<Tensor, Tensor> run_gradients(Arguments& arguments, const Tensor& grad, at::TensorList norm_weights,
                                         const Tensor& mean, const Tensor& variance, const Tensor& grad_mean,
                                         const Tensor& product_mean, double eps) {
  CudaBranchNormsParams& all = arguments.params;
  arguments.add(norm_weights, all.norm_weights);
  all.mean = arguments.keep(mean);
  all.variance = arguments.keep(variance);
  all.grad_mean = arguments.keep(grad_mean);
  all.product_mean = arguments.keep(product_mean);
  all.eps = eps;
  const int64_t images = images_at_a_time(all, grad.element_size()), launches = (all.batch - 1) / images + 1;
  const Tensor grad_input = empty_channels_last(arguments.input),
               weights = arguments.empty({all.channels * all.taps()}),
               partial = arguments.empty({launches, all.weight_parts, all.channels * all.taps()}),
               grad_branches = at::empty({all.branches * images * all.image_size()}, grad.options());
  for (int64_t i = 0; i < launches; ++i) {
    const int64_t first = i * images, count = std::min(images, all.batch - first);
    const Tensor of_partial = partial[i], of_grad_input = grad_input.narrow(0, first, count);
    CudaBranchNormsParams p = all;
    p.batch = count;
    p.input = arguments.input.narrow(0, first, count).const_data_ptr();
    p.grad_output = grad.narrow(0, first, count).const_data_ptr();
    p.grad_branches = grad_branches.mutable_data_ptr();
    p.grad_input = of_grad_input.mutable_data_ptr();
    p.partial_grad_weights = of_partial.mutable_data_ptr();
    C10_CUDA_CHECK(launch_branch_gradients(p, getCurrentCUDAStream()));
  }
  all.partial_grad_weights = partial.mutable_data_ptr();
  all.grad_weights = weights.mutable_data_ptr();
  C10_CUDA_CHECK(launch_branch_weight_sums(all, launches * all.weight_parts, getCurrentCUDAStream()));
  return {grad_input, weights};
}

std::tuple<Tensor, Tensor> branch_norms_sums_cuda(const Tensor& grad_output, const Tensor& x, at::TensorList weights,
                                                  const Tensor& mean, at::IntArrayRef dilations) {
  check_branch_norms_sums(grad_output, x, weights, mean, dilations);
  const c10::cuda::CUDAGuard guard(x.device());
  Arguments arguments(x, weights, dilations);
  if (x.numel() == 0) return {arguments.empty({x.size(1)}).zero_(), arguments.empty_statistics().zero_()};
  const Sums sums = run_sums(arguments, as_channels_last(grad_output), mean, /*divisor=*/1, Tensor(), /*eps=*/0);
  return {sums.grad_sum, sums.products};
}

std::tuple<Tensor, Tensor> branch_norms_gradients_cuda(const Tensor& grad_output, const Tensor& x,
                                                       at::TensorList weights, at::TensorList norm_weights,
                                                       const Tensor& mean, const Tensor& variance,
                                                       const Tensor& grad_mean, const Tensor& product_mean,
                                                       at::IntArrayRef dilations, double eps) {
  check_branch_norms_gradients(grad_output, x, weights, norm_weights, mean, variance, grad_mean, product_mean,
                               dilations);
  const c10::cuda::CUDAGuard guard(x.device());
  Arguments arguments(x, weights, dilations);
  if (x.numel() == 0) return {empty_like_map(x), arguments.empty({x.size(1) * arguments.params.taps()}).zero_()};
  const auto [grad_input, grad_weights] = run_gradients(arguments, as_channels_last(grad_output), norm_weights, mean,
                                                        variance, grad_mean, product_mean, eps);
  return {laid_out_as(x, grad_input), grad_weights};
}

// Both in one call, for the statistics of this process. PyTorch's operators make one branch after the other.

/// The output of branch b.
Tensor convolve(const Tensor& x, const Tensor& weight, int64_t dilation) {
  const int64_t padding = dilation * (weight.size(2) / 2);
  return at::conv2d(x, weight.to(x.scalar_type()), {}, 1, padding, dilation, /*groups=*/x.size(1));
}

std::string kind_of_branches(const char* name, const Tensor& x, at::TensorList weights) {
  return kind_of_call(name, x, weights[0].size(2), /*dilation=*/1) + ", " + std::to_string(weights.size()) +
         " branches";
}

std::tuple<Tensor, Tensor, Tensor> branch_norms_cuda(const Tensor& x, at::TensorList weights,
                                                     at::TensorList norm_weights, at::TensorList norm_biases,
                                                     at::IntArrayRef dilations, double eps) {
  check_branch_norms(x, weights, norm_weights, dilations);
  check_norm_parameters("norm_biases", norm_biases, x, weights.size());
  TORCH_CHECK_VALUE(x.numel() > x.size(1), "x must have more than one value for each channel, got shape ", shape_of(x));
  const c10::cuda::CUDAGuard guard(x.device());
  using Results = std::tuple<Tensor, Tensor, Tensor>;
  const auto ours = [&]() -> Results {
    Arguments arguments(x, weights, dilations);
    const Statistics statistics = run_statistics(arguments);
    const Tensor output = run_normalised(arguments, statistics, norm_weights, norm_biases, eps);
    return {laid_out_as(x, output), std::get<0>(statistics), std::get<1>(statistics)};
  };
  const auto pytorch = [&]() -> Results {
    const at::ScalarType sums = accumulation_type(x);
    std::vector<Tensor> means, variances;
    Tensor output;
    for (size_t b = 0; b < weights.size(); ++b) {
      const Tensor y = convolve(x, weights[b], dilations[b]);
      const auto [out, mean, inverse_deviation] =
          at::native_batch_norm(y, norm_weights[b].to(sums).contiguous(), norm_biases[b].to(sums).contiguous(), {}, {},
                                /*training=*/true, /*momentum=*/0, eps);
      output = output.defined() ? output.add_(out) : out;
      means.push_back(mean);
      variances.push_back((inverse_deviation.to(at::kDouble).pow(-2) - eps).clamp_min(0).to(sums));
    }
    return {laid_out_as(x, output), at::stack(means), at::stack(variances)};
  };
  return fastest(kind_of_branches("branch_norms", x, weights), ours, pytorch);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> branch_norms_backward_cuda(const Tensor& grad_output, const Tensor& x,
                                                                      at::TensorList weights,
                                                                      at::TensorList norm_weights, const Tensor& mean,
                                                                      const Tensor& variance, at::IntArrayRef dilations,
                                                                      double eps) {
  check_branch_norms_backward(grad_output, x, weights, norm_weights, mean, variance, dilations);
  const c10::cuda::CUDAGuard guard(x.device());
  using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;
  const auto ours = [&]() -> Results {
    Arguments arguments(x, weights, dilations);
    const Tensor grad = as_channels_last(grad_output);
    const double positions = static_cast<double>(arguments.params.positions());
    const Sums means = run_sums(arguments, grad, mean, positions, variance, eps);
    const auto [grad_input, grad_weights] =
        run_gradients(arguments, grad, norm_weights, mean, variance, means.grad_sum, means.products, eps);
    return {laid_out_as(x, grad_input), grad_weights, means.grad_norm_weights, means.grad_norm_biases};
  };
  const auto pytorch = [&]() -> Results {
    const at::ScalarType sums = accumulation_type(x);
    const int64_t channels = x.size(1);
    const Tensor inverse_deviations = (variance + eps).rsqrt();
    std::vector<Tensor> grad_weights, grad_scales, grad_shifts;
    Tensor grad_x;
    for (size_t b = 0; b < weights.size(); ++b) {
      const Tensor y = convolve(x, weights[b], dilations[b]);
      const auto [grad_y, grad_scale, grad_shift] = at::native_batch_norm_backward(
          grad_output, y, norm_weights[b].to(sums).contiguous(), {}, {}, mean[b], inverse_deviations[b],
          /*train=*/true, eps, {true, true, true});
      const int64_t padding = dilations[b] * (weights[b].size(2) / 2);
      const auto [of_x, of_weight, of_bias] = at::convolution_backward(
          grad_y, x, weights[b].to(x.scalar_type()), c10::nullopt, {1, 1}, {padding, padding},
          {dilations[b], dilations[b]}, /*transposed=*/false, {0, 0}, channels, {true, true, false});
      grad_x = grad_x.defined() ? grad_x.add_(of_x) : of_x;
      grad_weights.push_back(of_weight.flatten().to(sums));
      grad_scales.push_back(grad_scale.to(sums));
      grad_shifts.push_back(grad_shift.to(sums));
    }
    return {laid_out_as(x, grad_x), at::cat(grad_weights), at::stack(grad_scales), at::stack(grad_shifts)};
  };
  return fastest(kind_of_branches("branch_norms backward", x, weights), ours, pytorch);
}

/// Parts of sums, parts of the weights' gradients, images in one launch of the gradients, and whether the kernels are
/// the tiled ones: for tools that count bytes without a GPU.
std::vector<int64_t> parts_of_call(at::IntArrayRef size, at::IntArrayRef kernel_sizes, at::IntArrayRef dilations,
                                   at::ScalarType dtype, int64_t shared_memory) {
  const Tensor map = at::empty(size, at::TensorOptions(at::kMeta).dtype(dtype));
  const CudaBranchNormsParams p = params_of(size, kernel_sizes, dilations, dtype_of(map));
  const BranchNormsParts parts = branch_norms_parts(p, shared_memory);
  return {parts.sums, parts.weights, images_at_a_time(p, map.element_size()), parts.tiled};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) {
  m.def(
      "_branch_norms_parts(int[] size, int[] kernel_sizes, int[] dilations, ScalarType dtype, int shared_memory) -> "
      "int[]",
      &parts_of_call);
}

TORCH_LIBRARY_IMPL(overlock_mm, CUDA, m) {
  m.impl("branch_norms", &branch_norms_cuda);
  m.impl("_branch_norms_backward", &branch_norms_backward_cuda);
  m.impl("_branch_statistics", &branch_statistics_cuda);
  m.impl("_branch_norms_given", &branch_norms_given_cuda);
  m.impl("_branch_norms_sums", &branch_norms_sums_cuda);
  m.impl("_branch_norms_gradients", &branch_norms_gradients_cuda);
}

}  // namespace overlock_mm
