// Static depth-wise convolutions and response norms for tensors on the CPU.
#include <ATen/Context.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "../depthwise_tensors.h"
#include "dispatch.h"
#include "maps_cpu.h"

namespace overlock_mm {
namespace {

using cpu::in_parallel;

/// Call function(kernels) with those for float or double.
template <typename Function>
void with_kernels(at::ScalarType dtype, Function function) {
  if (dtype == at::kDouble) {
    function(cpu::best_table<cpu::MapKernels<double>>());
  } else {
    function(cpu::best_table<cpu::MapKernels<float>>());
  }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ------------------------------------------------------------------------------------------------------------ layout

/// Matrices of (rows, columns) at `from`, laid out by columns at `to`.
void transpose_into(const Tensor& from, const Tensor& to, int64_t batch, int64_t rows, int64_t columns) {
  const TransposeParams p{batch, rows, columns, from.data_ptr(), to.data_ptr()};
  const int64_t blocks = divide_up(rows, p.kBlock) * divide_up(columns, p.kBlock);
  with_kernels(from.scalar_type(), [&](const auto& kernel) {
    in_parallel(batch * blocks, [&](int64_t begin, int64_t end) { kernel.transpose(p, begin, end); });
  });
}

/// A map of float32 or float64 in that layout. (ATen's copy from one layout into the other takes ten times as long as
/// moving the bytes, and a hundred times where the lines of an image lie a power of two apart.)
Tensor in_layout(const Tensor& map, at::MemoryFormat format) {
  const bool to_channels_last = format == at::MemoryFormat::ChannelsLast;
  const at::MemoryFormat other = to_channels_last ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
  if (map.is_contiguous(format) || !map.is_contiguous(other) || map.numel() == 0) return map.contiguous(format);
  const Tensor out = at::empty(map.sizes(), map.options(), format);
  const int64_t channels = map.size(1), positions = map.size(2) * map.size(3);
  if (to_channels_last) {
    transpose_into(map, out, map.size(0), channels, positions);
  } else {
    transpose_into(map, out, map.size(0), positions, channels);
  }
  return out;
}

Tensor transpose_cpu(const Tensor& matrices) {
  check_matrices(matrices);
  const int64_t rows = matrices.size(-2), columns = matrices.size(-1);
  at::DimVector shape(matrices.sizes());
  std::swap(shape[shape.size() - 1], shape[shape.size() - 2]);
  const Tensor out = at::empty(shape, matrices.options());
  if (out.numel() > 0) transpose_into(matrices, out, out.numel() / (rows * columns), rows, columns);
  return out;
}

/// Maps as the kernels take them: channels_last, half types through float32.
Tensor as_input(const Tensor& map) { return in_layout(map.to(accumulation_type(map)), at::MemoryFormat::ChannelsLast); }

Tensor empty_output(const Tensor& input) {
  return at::empty(input.sizes(), input.options(), at::MemoryFormat::ChannelsLast);
}

/// Results as the meta kernels say: of the dtype and layout of `like`.
Tensor as_output(const Tensor& map, const Tensor& like) {
  return in_layout(map, memory_format_of(like)).to(like.scalar_type());
}

/// Which kernels are streamed.
bool streams(int64_t kernel_size, int64_t dilation) { return kernel_size == 3 && dilation == 1; }

/// Whether the streamed kernels take the map as it is: they read and write bfloat16 too.
bool streams_bfloat16(const Tensor& map, const Tensor& weight, int64_t dilation) {
  return streams(weight.size(2), dilation) && map.scalar_type() == at::kBFloat16 &&
         map.is_contiguous(at::MemoryFormat::ChannelsLast);
}

Tensor as_parameter(const Tensor& parameter, const Tensor& input) {
  return parameter.to(accumulation_type(input)).contiguous();
}

// -------------------------------------------------------------------------------------------------------------- sums

/// Parts of an image for sums: their number depends on the shape alone, so that every number of threads adds up in the
/// same order. `items` there are without parts; a part has `least` lines or more.
int64_t strips_for_sums(int64_t items, int64_t height, int64_t least) {
  return std::max<int64_t>(1, std::min(divide_up(32, std::max<int64_t>(items, 1)), height / least));
}

ResponseNormParams params_of(const Tensor& input) {
  ResponseNormParams p{};
  p.batch = input.size(0);
  p.channels = input.size(1);
  p.positions = input.size(2) * input.size(3);
  p.strips = strips_for_sums(p.batch, p.positions, 64);
  p.input = input.data_ptr();
  return p;
}

/// Sums over parts of the map, (B, strips, C): of input * other, and of other. Without other, of the squares alone.
std::pair<Tensor, Tensor> sums_of_products(const Tensor& input, const Tensor& other) {
  ResponseNormParams p = params_of(input);
  const auto options = at::TensorOptions(input.scalar_type());
  const Tensor sums = at::empty({p.batch, p.strips, p.channels}, options);
  p.sums = sums.data_ptr();
  Tensor plain;
  if (other.defined()) {
    plain = at::empty_like(sums);
    p.other = other.data_ptr();
    p.plain_sums = plain.data_ptr();
  }
  with_kernels(input.scalar_type(), [&](const auto& kernel) {
    in_parallel(p.batch * p.strips, [&](int64_t begin, int64_t end) { kernel.channel_sums(p, begin, end); });
  });
  return {sums, plain};
}

/// Sums over images and positions, (C). (Those of ATen depend on the number of threads.)
Tensor sum_of_channels(const Tensor& map) { return sums_of_products(map, map).second.flatten(0, 1).sum(0); }

// -------------------------------------------------------------------------------------------------------- one branch

bool streams(const DepthwiseParams& p) { return streams(p.kernel_size, p.dilation); }

DepthwiseParams params_of(const Tensor& input, const Tensor& weight, int64_t dilation, bool residual, bool gelu) {
  DepthwiseParams p{};
  p.batch = input.size(0);
  p.channels = input.size(1);
  p.height = input.size(2);
  p.width = input.size(3);
  p.kernel_size = weight.size(2);
  p.dilation = dilation;
  p.residual = residual;
  p.gelu = gelu;
  p.bfloat16 = input.scalar_type() == at::kBFloat16;
  p.input = input.data_ptr();
  p.weight = weight.data_ptr();
  return p;
}

/// Parts of an image for a forward: enough for all threads, and small enough for a core's cache. No result depends on
/// it.
int64_t strips_for_outputs(int64_t items, int64_t height, int64_t least, int64_t bytes_of_line, int64_t border) {
  constexpr int64_t cache = 512 * 1024;
  const int64_t for_threads = divide_up(4 * at::get_num_threads(), std::max<int64_t>(items, 1));
  const int64_t lines = std::max(cache / bytes_of_line - 2 * border, std::max<int64_t>(2 * border, 1));
  return std::max<int64_t>(1, std::min(std::max(for_threads, divide_up(height, lines)), divide_up(height, least)));
}

/// Kernels of which oneDNN's forward, which is PyTorch's, is as fast in channels_last as those here, or faster
/// (tools/benchmarks/bench_depthwise.py): it has one for kernels up to 8 that reach no further than 13 positions, and
/// another for large ones. Between them, for a plain 3x3, and on small maps, it is up to three times slower.
bool library_is_fast(int64_t kernel_size, int64_t dilation, int64_t positions) {
  const int64_t extent = (kernel_size - 1) * dilation + 1;
  return at::hasMKLDNN() && at::globalContext().userEnabledMkldnn() && positions >= 512 &&
         !streams(kernel_size, dilation) &&
         ((kernel_size <= 8 && extent <= 13) || (kernel_size >= 14 && dilation == 1));
}

bool library_is_fast(const Tensor& input, const DepthwiseParams& p) {
  return input.scalar_type() == at::kFloat && library_is_fast(p.kernel_size, p.dilation, p.height * p.width);
}

/// The same for arguments of bfloat16, all of them, as a model has that is cast. (Under autocast parameters stay
/// float32.) Its forward, that is: PyTorch's gradient of a dilated kernel is wrong there (torch 2.11).
bool library_is_fast_in_bfloat16(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                 int64_t dilation) {
#if defined(__x86_64__)
  // oneDNN takes bfloat16 from AVX-512 on, and is up to 50 times slower where the processor does not.
  static const bool has_bfloat16 = __builtin_cpu_supports("avx512bf16");
#else
  constexpr bool has_bfloat16 = false;  // not measured
#endif
  return has_bfloat16 && input.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16 &&
         (!bias || bias->scalar_type() == at::kBFloat16) && memory_format_of(input) == at::MemoryFormat::ChannelsLast &&
         library_is_fast(weight.size(2), dilation, input.size(2) * input.size(3));
}

Tensor convolve_by_library(const Tensor& input, const Tensor& weight, const Tensor& bias, int64_t dilation,
                           bool residual) {
  // It is called with what autocast has been through already.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  Tensor kernel = weight;
  const int64_t middle = weight.size(2) / 2;
  if (residual) {
    kernel = weight.clone();
    kernel.select(3, middle).select(2, middle).add_(1);
  }
  const OptionalTensor shift = bias.defined() ? OptionalTensor(bias) : OptionalTensor();
  return at::conv2d(input, kernel, shift, 1, middle * dilation, dilation, input.size(1))
      .contiguous(at::MemoryFormat::ChannelsLast);
}

/// Of each strip but the first, the line before it and its first, (B, 2 (strips - 1), W, C), copied.
Tensor borders_of_strips(const Tensor& input, int64_t strips) {
  std::vector<int64_t> lines;
  for (int64_t strip = 1; strip < strips; ++strip) {
    const int64_t first = strip * input.size(2) / strips;
    lines.insert(lines.end(), {first - 1, first});
  }
  return input.permute({0, 2, 3, 1}).index_select(1, at::tensor(lines, at::kLong)).contiguous();
}

/// `input` and `weight` as the kernels take them.
Tensor convolve(const Tensor& input, const Tensor& weight, const Tensor& bias, int64_t dilation, bool residual,
                bool gelu) {
  if (input.numel() == 0) return empty_output(input);
  DepthwiseParams p = params_of(input, weight, dilation, residual, gelu);
  if (!gelu && library_is_fast(input, p)) return convolve_by_library(input, weight, bias, dilation, residual);
  const Tensor output = empty_output(input);
  p.bias = bias.defined() ? bias.data_ptr() : nullptr;
  p.output = output.data_ptr();
  with_kernels(input.scalar_type(), [&](const auto& kernel) {
    if (streams(p)) {
      p.strips = std::max<int64_t>(1, std::min(divide_up(4 * at::get_num_threads(), p.batch), divide_up(p.height, 8)));
      in_parallel(p.batch * p.strips, [&](int64_t begin, int64_t end) { kernel.stream(p, begin, end); });
      return;
    }
    const int64_t blocks = divide_up(p.channels, kernel.lanes), border = p.kernel_size / 2 * p.dilation;
    const int64_t bytes_of_line = (p.width + 2 * border) * kernel.lanes * input.element_size();
    p.strips = strips_for_outputs(p.batch * blocks, p.height, 4, bytes_of_line, border);
    in_parallel(p.batch * p.strips * blocks, [&](int64_t begin, int64_t end) { kernel.convolve(p, begin, end); });
  });
  return output;
}

/// Gradient of a kernel, (C, 1, k, k).
Tensor weight_gradient(const Tensor& grad_output, const Tensor& input, const Tensor& weight, int64_t dilation) {
  DepthwiseParams p = params_of(input, weight, dilation, false, false);
  p.grad_output = grad_output.data_ptr();
  Tensor partial;
  with_kernels(input.scalar_type(), [&](const auto& kernel) {
    // Of blocks of 16 channels, whatever the lanes.
    p.strips = strips_for_sums(p.batch * divide_up(p.channels, 16), p.height, p.kernel_size / 2 * p.dilation + 1);
    partial = at::empty({p.batch * p.strips, p.channels, 1, p.kernel_size, p.kernel_size}, weight.options());
    p.grad_weight = partial.data_ptr();
    const int64_t blocks = divide_up(p.channels, kernel.lanes);
    in_parallel(p.batch * p.strips * blocks,
                [&](int64_t begin, int64_t end) { kernel.weight_gradient(p, begin, end); });
  });
  return partial.sum(0);
}

Tensor depthwise_conv2d_cpu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, int64_t dilation,
                            bool residual, bool gelu) {
  check_depthwise(input, weight, bias, dilation, gelu);
  if (!residual && !gelu && input.numel() > 0 && library_is_fast_in_bfloat16(input, weight, bias, dilation))
    return convolve_by_library(input, weight, bias.value_or(Tensor()), dilation, /*residual=*/false);
  const Tensor map = streams_bfloat16(input, weight, dilation) ? input : as_input(input);
  return as_output(convolve(map, as_parameter(weight, input), bias ? as_parameter(*bias, input) : Tensor(), dilation,
                            residual, gelu),
                   input);
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward_cpu(const Tensor& grad_output, const Tensor& input,
                                                                 const Tensor& weight, int64_t dilation, bool residual,
                                                                 bool gelu, std::array<bool, 3> output_mask) {
  check_depthwise(input, weight, OptionalTensor(), dilation, gelu);
  check_grad_output(grad_output, input);
  const Tensor kernel_weight = as_parameter(weight, input);
  Tensor map = input, grad = grad_output, grad_input, grad_weight, grad_bias;
  if (!streams_bfloat16(map, weight, dilation) || !streams_bfloat16(grad, weight, dilation)) {
    map = as_input(map);
    grad = as_input(grad);
  }
  if (input.numel() == 0) {
    if (output_mask[0]) grad_input = empty_output(map);
    if (output_mask[1]) grad_weight = at::zeros_like(kernel_weight);
    if (output_mask[2]) grad_bias = at::zeros({weight.size(0)}, kernel_weight.options());
  } else if (DepthwiseParams p = params_of(map, kernel_weight, dilation, residual, gelu); streams(p)) {
    p.grad_output = grad.data_ptr();
    p.strips = strips_for_sums(p.batch, p.height, 8);
    Tensor partial_weight, partial_bias;
    if (output_mask[0]) {
      grad_input = empty_output(map);
      p.grad_input = grad_input.data_ptr();
    }
    if (output_mask[1]) {
      partial_weight = at::empty({p.batch * p.strips, p.channels, 1, 3, 3}, kernel_weight.options());
      p.grad_weight = partial_weight.data_ptr();
    }
    if (output_mask[2]) {
      partial_bias = at::empty({p.batch * p.strips, p.channels}, kernel_weight.options());
      p.grad_bias = partial_bias.data_ptr();
    }
    with_kernels(map.scalar_type(), [&](const auto& kernel) {
      in_parallel(p.batch * p.strips, [&](int64_t begin, int64_t end) { kernel.stream_backward(p, begin, end); });
    });
    if (output_mask[1]) grad_weight = partial_weight.sum(0);
    if (output_mask[2]) grad_bias = partial_bias.sum(0);
  } else {
    // The gradient of the input is the convolution with the kernel turned round.
    if (output_mask[0])
      grad_input = convolve(grad, kernel_weight.flip({2, 3}), Tensor(), dilation, residual, /*gelu=*/false);
    if (output_mask[1]) grad_weight = weight_gradient(grad, map, kernel_weight, dilation);
    if (output_mask[2]) grad_bias = sum_of_channels(grad);
  }
  if (output_mask[0]) grad_input = as_output(grad_input, input);
  return {grad_input, grad_weight, grad_bias};
}

// ----------------------------------------------------------------------------------------- branches with batch norms

BranchParams params_of(const Tensor& input, const Tensor& weights, at::IntArrayRef kernel_sizes,
                       at::IntArrayRef dilations) {
  BranchParams p{};
  p.batch = input.size(0);
  p.channels = input.size(1);
  p.height = input.size(2);
  p.width = input.size(3);
  p.branches = kernel_sizes.size();
  for (int i = 0; i < p.branches; ++i) {
    p.kernel_size[i] = kernel_sizes[i];
    p.dilation[i] = dilations[i];
  }
  p.reach = kernel_sizes[0] / 2;
  p.input = input.data_ptr();
  p.weights = weights.data_ptr();
  return p;
}

/// What the statistics of the batch make of the branches: one convolution.
struct FoldedBranches {
  Tensor kernel, bias;    ///< (C, 1, K, K), (C), as the map
  Tensor mean, variance;  ///< (branches, C), likewise; the variance biased
};

/// From means and sums of squared distances of strips, (B, strips, branches, C). By hand: the operators that it takes
/// otherwise, some hundred, are up to half of all the time on a small map.
FoldedBranches fold_branches(const BranchParams& p, const Tensor& weights, const Tensor& means, const Tensor& squares,
                             const Tensor& norm_weights, const Tensor& norm_biases, double eps) {
  const int64_t side = 2 * p.reach + 1, channels = p.channels, parts = p.batch * p.strips;
  const Tensor gammas = norm_weights.to(at::kDouble).contiguous(), betas = norm_biases.to(at::kDouble).contiguous();
  const double *gamma = gammas.const_data_ptr<double>(), *beta = betas.const_data_ptr<double>();
  const double positions = double(p.batch * p.height * p.width);
  const int64_t of_all = p.branches * channels;
  FoldedBranches folded;
  folded.kernel = at::empty({channels, 1, side, side}, weights.options());
  folded.bias = at::empty({channels}, weights.options());
  folded.mean = at::empty({p.branches, channels}, weights.options());
  folded.variance = at::empty_like(folded.mean);
  AT_DISPATCH_FLOATING_TYPES(weights.scalar_type(), "fold_branches", [&] {
    const scalar_t *tap = weights.const_data_ptr<scalar_t>(), *part_means = means.const_data_ptr<scalar_t>(),
                   *part_squares = squares.const_data_ptr<scalar_t>();
    scalar_t *kernel = folded.kernel.mutable_data_ptr<scalar_t>(), *bias = folded.bias.mutable_data_ptr<scalar_t>(),
             *to_mean = folded.mean.mutable_data_ptr<scalar_t>(),
             *to_variance = folded.variance.mutable_data_ptr<scalar_t>();
    // Statistics of the strips put together, (branches, C).
    std::vector<double> mean(of_all), variance(of_all), share(parts);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t strip = part % p.strips;
      share[part] = double(((strip + 1) * p.height / p.strips - strip * p.height / p.strips) * p.width) / positions;
      for (int64_t i = 0; i < of_all; ++i) mean[i] += share[part] * part_means[part * of_all + i];
    }
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t i = 0; i < of_all; ++i) {
        const double distance = part_means[part * of_all + i] - mean[i];
        variance[i] += part_squares[part * of_all + i] / positions + distance * distance * share[part];
      }
    }
    std::copy(mean.begin(), mean.end(), to_mean);
    std::copy(variance.begin(), variance.end(), to_variance);

    std::vector<double> sum(side * side);
    for (int64_t c = 0; c < channels; ++c, kernel += side * side) {
      std::fill(sum.begin(), sum.end(), 0.0);
      double shift = 0;
      for (int64_t b = 0; b < p.branches; ++b) {
        const int64_t at = b * channels + c;
        const double scale = gamma[at] / std::sqrt(variance[at] + eps);
        shift += beta[at] - mean[at] * scale;
        const int64_t k = p.kernel_size[b], d = p.dilation[b], margin = p.reach - k / 2 * d;
        for (int64_t ky = 0; ky < k; ++ky) {
          for (int64_t kx = 0; kx < k; ++kx) sum[(margin + ky * d) * side + margin + kx * d] += scale * *tap++;
        }
      }
      bias[c] = scalar_t(shift);
      for (int64_t i = 0; i < side * side; ++i) kernel[i] = scalar_t(sum[i]);
    }
  });
  return folded;
}

std::tuple<Tensor, Tensor, Tensor> branch_norms_cpu(const Tensor& input, const Tensor& weights,
                                                    const Tensor& norm_weights, const Tensor& norm_biases,
                                                    at::IntArrayRef kernel_sizes, at::IntArrayRef dilations,
                                                    double eps) {
  check_branches(input, weights, norm_weights, kernel_sizes, dilations);
  check_parameter("norm_biases", norm_biases, input, norm_weights.sym_sizes());
  const Tensor map = as_input(input), kernels_of_branches = as_parameter(weights, input);
  TORCH_CHECK_VALUE(map.numel() > 0, "input must not be empty, got shape ", shape_of(input));
  BranchParams p = params_of(map, kernels_of_branches, kernel_sizes, dilations);
  p.strips = strips_for_sums(p.batch * divide_up(p.channels, 16), p.height, 2 * p.reach + 1);
  const Tensor means = at::empty({p.batch * p.strips, p.branches, p.channels}, at::TensorOptions(map.scalar_type())),
               squares = at::empty_like(means);
  p.means = means.data_ptr();
  p.squares = squares.data_ptr();
  with_kernels(map.scalar_type(), [&](const auto& kernel) {
    in_parallel(p.batch * p.strips * divide_up(p.channels, kernel.lanes),
                [&](int64_t begin, int64_t end) { kernel.branch_statistics(p, begin, end); });
  });
  const FoldedBranches folded = fold_branches(p, kernels_of_branches, means, squares, norm_weights, norm_biases, eps);
  const Tensor output = convolve(map, folded.kernel, folded.bias, /*dilation=*/1, /*residual=*/false, /*gelu=*/false);
  return {as_output(output, input), folded.mean, folded.variance};
}

/// What a thread may take for its channels of a whole batch.
constexpr int64_t kMostBytesOfThread = 64 * 1024 * 1024;

std::tuple<Tensor, Tensor, Tensor, Tensor> branch_norms_backward_cpu(const Tensor& grad_output, const Tensor& input,
                                                                     const Tensor& weights, const Tensor& norm_weights,
                                                                     const Tensor& mean, const Tensor& variance,
                                                                     at::IntArrayRef kernel_sizes,
                                                                     at::IntArrayRef dilations, double eps) {
  check_branches(input, weights, norm_weights, kernel_sizes, dilations);
  check_grad_output(grad_output, input);
  check_parameter("mean", mean, input, norm_weights.sym_sizes());
  check_parameter("variance", variance, input, norm_weights.sym_sizes());
  const Tensor map = as_input(input), grad = as_input(grad_output), kernels_of_branches = as_parameter(weights, input);
  const at::ScalarType dtype = map.scalar_type();
  BranchParams p = params_of(map, kernels_of_branches, kernel_sizes, dilations);
  const double positions = double(p.batch) * p.height * p.width;
  const Tensor grad_mean = sum_of_channels(grad) / positions;

  const Tensor inverse_deviation = (variance.to(at::kDouble) + eps).rsqrt();
  const Tensor scale = (norm_weights.to(at::kDouble) * inverse_deviation).to(dtype),
               slope_of_product = (inverse_deviation * inverse_deviation / positions).to(dtype),
               means = mean.to(dtype).contiguous();
  const Tensor grad_input = empty_output(map),
               products = at::empty({p.batch, p.branches, p.channels}, kernels_of_branches.options()),
               partial = at::empty({p.batch, p.channels, p.taps()}, kernels_of_branches.options());
  p.grad_output = grad.data_ptr();
  p.grad_mean = grad_mean.data_ptr();
  p.mean = means.data_ptr();
  p.scale = scale.data_ptr();
  p.slope_of_product = slope_of_product.data_ptr();
  p.products = products.data_ptr();
  p.grad_weights = partial.data_ptr();
  with_kernels(dtype, [&](const auto& kernel) {
    const int64_t blocks = divide_up(p.channels, kernel.lanes);
    const int64_t threads = at::get_num_threads();
    const int64_t bytes = 4 * (p.height + 2 * p.reach) * (p.width + 2 * p.reach) * kernel.lanes * map.element_size();
    // One pass in place of two, which make the outputs of the branches twice (4 parts of work and not 3), unless
    // threads were idle, or it took much memory. The results are the same.
    const int64_t one_pass = 3 * p.batch * divide_up(blocks, threads), two = 4 * divide_up(p.batch * blocks, threads);
    p.whole_batch = p.batch == 1 || (one_pass <= two && p.batch * bytes <= kMostBytesOfThread);
    const int64_t items = p.whole_batch ? blocks : p.batch * blocks;
    const auto pass = [&] {
      in_parallel(items, [&](int64_t begin, int64_t end) { kernel.branch_gradients(p, begin, end); });
    };
    if (!p.whole_batch) pass();
    p.grad_input = grad_input.data_ptr();
    pass();
  });
  const Tensor grad_norm_weights = products.to(at::kDouble).sum(0) * inverse_deviation;
  const Tensor grad_norm_biases = (grad_mean * positions).expand({p.branches, p.channels}).contiguous();
  return {as_output(grad_input, input), partial.sum(0), grad_norm_weights.to(dtype), grad_norm_biases};
}

// ---------------------------------------------------------------------------------------------------- response norms

/// input * scale + other * other_scale + shift, with scales (B, C) and shift (C), in `output`, which may be the input.
Tensor combine(const Tensor& input, const Tensor& scale, const Tensor& other, const Tensor& other_scale,
               const Tensor& shift, const Tensor& output) {
  ResponseNormParams p = params_of(input);
  p.output = output.data_ptr();
  p.scale = scale.data_ptr();
  if (other.defined()) {
    p.other = other.data_ptr();
    p.other_scale = other_scale.data_ptr();
  }
  if (shift.defined()) p.shift = shift.data_ptr();
  with_kernels(input.scalar_type(), [&](const auto& kernel) {
    in_parallel(p.batch * p.strips, [&](int64_t begin, int64_t end) { kernel.combine(p, begin, end); });
  });
  return output;
}

/// Of sums of squares, (B, strips, C): the response, (B, C), and what the norm multiplies with, (B, C).
std::pair<Tensor, Tensor> response_and_scale(const Tensor& squares, const Tensor& gamma, double eps) {
  const int64_t batch = squares.size(0), strips = squares.size(1), channels = squares.size(2);
  const Tensor response = at::zeros({batch, channels}, squares.options()), scale = at::empty_like(response);
  AT_DISPATCH_FLOATING_TYPES(squares.scalar_type(), "response_and_scale", [&] {
    const scalar_t *from = squares.const_data_ptr<scalar_t>(), *weight = gamma.const_data_ptr<scalar_t>();
    scalar_t *of_image = response.mutable_data_ptr<scalar_t>(), *to = scale.mutable_data_ptr<scalar_t>();
    for (int64_t image = 0; image < batch; ++image, of_image += channels, to += channels) {
      for (int64_t strip = 0; strip < strips; ++strip, from += channels) {
        for (int64_t c = 0; c < channels; ++c) of_image[c] += from[c];
      }
      double sum = 0;
      for (int64_t c = 0; c < channels; ++c) {
        of_image[c] = std::sqrt(of_image[c]);
        sum += of_image[c];
      }
      const scalar_t inverse_mean = scalar_t(1 / (sum / double(channels) + eps));
      for (int64_t c = 0; c < channels; ++c) to[c] = weight[c] * (of_image[c] * inverse_mean) + 1;
    }
  });
  return {response, scale};
}

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
    std::vector<double> of_image(channels), grad_gamma(channels), grad_beta(channels);
    for (int64_t image = 0; image < batch; ++image, norm += channels, scale += channels, slope += channels) {
      std::fill(of_image.begin(), of_image.end(), 0.0);
      for (int64_t strip = 0; strip < strips; ++strip, product += channels, sum += channels) {
        for (int64_t c = 0; c < channels; ++c) {
          of_image[c] += product[c];
          grad_beta[c] += sum[c];
        }
      }
      double mean = 0, of_mean = 0;
      for (int64_t c = 0; c < channels; ++c) mean += norm[c];
      mean = mean / double(channels) + eps;
      for (int64_t c = 0; c < channels; ++c) of_mean += of_image[c] * weight[c] * norm[c];
      of_mean /= mean * mean * double(channels);
      for (int64_t c = 0; c < channels; ++c) {
        const double normed = norm[c] / mean;
        grad_gamma[c] += of_image[c] * normed;
        scale[c] = scalar_t(weight[c] * normed + 1);
        // By the response itself, and by the mean over channels that it is divided by. The norm of a map of zeros has
        // no slope.
        slope[c] = norm[c] > 0 ? scalar_t((of_image[c] * weight[c] / mean - of_mean) / norm[c]) : scalar_t(0);
      }
    }
    std::copy(grad_gamma.begin(), grad_gamma.end(), out.gamma.mutable_data_ptr<scalar_t>());
    std::copy(grad_beta.begin(), grad_beta.end(), out.beta.mutable_data_ptr<scalar_t>());
  });
  return out;
}

/// Of `map`, as the kernels take it, in `output`, which may be the map. The squares of the norm are summed on the way
/// out of the convolution.
void residual_depthwise_norm(const Tensor& map, const Tensor& weight, const OptionalTensor& bias, const Tensor& gamma,
                             const Tensor& beta, double eps, bool gelu, const Tensor& output) {
  if (map.numel() == 0) return;
  const Tensor kernel_weight = as_parameter(weight, map), shift = bias ? as_parameter(*bias, map) : Tensor();
  DepthwiseParams p = params_of(map, kernel_weight, /*dilation=*/1, /*residual=*/true, gelu);
  p.strips = strips_for_sums(p.batch, p.height, 8);
  const Tensor squares = at::empty({p.batch, p.strips, p.channels}, kernel_weight.options());
  Tensor borders;
  if (output.data_ptr() == map.data_ptr() && p.strips > 1) {
    borders = borders_of_strips(map, p.strips);
    p.borders = borders.data_ptr();
  }
  p.bias = shift.defined() ? shift.data_ptr() : nullptr;
  p.squares = squares.data_ptr();
  p.output = output.data_ptr();
  with_kernels(map.scalar_type(), [&](const auto& kernel) {
    in_parallel(p.batch * p.strips, [&](int64_t begin, int64_t end) { kernel.stream(p, begin, end); });
  });
  const Tensor scale = response_and_scale(squares, as_parameter(gamma, map), eps).second;
  combine(output, scale, Tensor(), Tensor(), as_parameter(beta, map), output);
}

Tensor residual_depthwise_norm_cpu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                   const Tensor& gamma, const Tensor& beta, double eps, bool gelu) {
  check_residual_depthwise_norm(input, weight, bias, gamma, beta);
  const Tensor map = as_input(input), output = empty_output(map);
  residual_depthwise_norm(map, weight, bias, gamma, beta, eps, gelu, output);
  return as_output(output, input);
}

void residual_depthwise_norm_inplace_cpu(Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                         const Tensor& gamma, const Tensor& beta, double eps, bool gelu) {
  check_residual_depthwise_norm(input, weight, bias, gamma, beta);
  const Tensor map = as_input(input);
  residual_depthwise_norm(map, weight, bias, gamma, beta, eps, gelu, map);
  if (map.is_same(input)) return;
  const bool back = input.is_contiguous() && input.scalar_type() == map.scalar_type() && input.numel() > 0;
  if (back) {
    transpose_into(map, input, input.size(0), input.size(2) * input.size(3), input.size(1));
  } else {
    input.copy_(map);
  }
}

std::tuple<Tensor, Tensor> response_norm_cpu(const Tensor& input, const Tensor& gamma, const Tensor& beta, double eps) {
  check_map("input", input);
  check_parameter("gamma", gamma, input, {input.sym_size(1)});
  check_parameter("beta", beta, input, {input.sym_size(1)});
  const Tensor map = as_input(input);
  const auto [response, scale] =
      response_and_scale(sums_of_products(map, Tensor()).first, as_parameter(gamma, input), eps);
  return {as_output(combine(map, scale, Tensor(), Tensor(), as_parameter(beta, input), empty_output(map)), input),
          response};
}

std::tuple<Tensor, Tensor, Tensor> response_norm_backward_cpu(const Tensor& grad_output, const Tensor& input,
                                                              const Tensor& gamma, const Tensor& response, double eps) {
  check_map("input", input);
  check_grad_output(grad_output, input);
  check_parameter("gamma", gamma, input, {input.sym_size(1)});
  check_parameter("response", response, input, {input.sym_size(0), input.sym_size(1)});
  const Tensor map = as_input(input), grad = as_input(grad_output), weight = as_parameter(gamma, input);
  const auto [products, sums] = sums_of_products(map, grad);
  const ResponseGradients of =
      response_gradients(products, sums, weight, response.to(map.scalar_type()).contiguous(), eps);
  const Tensor grad_input = combine(grad, of.scale, map, of.slope, Tensor(), empty_output(map));
  return {as_output(grad_input, input), of.gamma, of.beta};
}

}  // namespace

TORCH_LIBRARY_IMPL(overlock_mm, CPU, m) {
  m.impl("_transpose", &transpose_cpu);
  m.impl("_depthwise_conv2d", &depthwise_conv2d_cpu);
  m.impl("_depthwise_conv2d_backward", &depthwise_conv2d_backward_cpu);
  m.impl("_branch_norms", &branch_norms_cpu);
  m.impl("_branch_norms_backward", &branch_norms_backward_cpu);
  m.impl("_residual_depthwise_norm", &residual_depthwise_norm_cpu);
  m.impl("_residual_depthwise_norm_", &residual_depthwise_norm_inplace_cpu);
  m.impl("_response_norm", &response_norm_cpu);
  m.impl("_response_norm_backward", &response_norm_backward_cpu);
}

}  // namespace overlock_mm
