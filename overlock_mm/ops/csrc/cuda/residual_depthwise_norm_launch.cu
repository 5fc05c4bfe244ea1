// Which kernel of residual_depthwise_norm_kernels.cuh runs with how many threads and how much shared memory.
#include <algorithm>
#include <type_traits>

#include "launch.cuh"
#include "residual_depthwise_norm_kernels.cuh"
#include "residual_depthwise_norm_launch.h"

namespace overlock_mm {
namespace {

using namespace residual_depthwise_norm_kernels;

// Lines of a tile. Of fewer lines more is halo; but there must be warps enough for a large device.
constexpr int64_t kMostRows = 32, kLeastRows = 6, kEnoughWarps = 3072;

int64_t channel_blocks(const ResidualDepthwiseNormParams& params) { return ceil_div(params.channels, kWarp); }

bool is_empty(const ResidualDepthwiseNormParams& params) {
  return params.batch * params.channels * params.height * params.width == 0;
}

int64_t tiles_of_image(const ResidualDepthwiseNormParams& params, int64_t rows) {
  return ceil_div(params.height, rows) * ceil_div(params.width, kRun);
}

/// A kernel for the tiles, with `numbers` of shared memory for each thread, and at least the weights.
template <typename A>
cudaError_t launch_tiles(void (*kernel)(ResidualDepthwiseNormParams), int numbers,
                         const ResidualDepthwiseNormParams& params, cudaStream_t stream) {
  const int threads = static_cast<int>(params.warps) * kWarp;
  const int64_t shared = std::max(threads * numbers, kWarp * kTaps);
  return launch(kernel, params.batch * params.strips * channel_blocks(params), threads, shared * sizeof(A), params,
                stream);
}

}  // namespace

void residual_depthwise_norm_tiling(ResidualDepthwiseNormParams* params) {
  params->rows = params->warps = params->strips = 1;
  if (is_empty(*params)) return;
  int64_t parts = ceil_div(params->height, kMostRows);
  const auto rows = [&] { return ceil_div(params->height, parts); };
  const int64_t copies = params->batch * channel_blocks(*params);
  while (rows() >= 2 * kLeastRows && tiles_of_image(*params, rows()) * copies < kEnoughWarps) ++parts;
  params->rows = rows();
  const int64_t tiles = tiles_of_image(*params, params->rows);
  params->strips = ceil_div(tiles, kMaxWarps);
  params->warps = ceil_div(tiles, params->strips);
}

cudaError_t launch_residual_depthwise(const ResidualDepthwiseNormParams& params, Dtype dtype, cudaStream_t stream) {
  if (is_empty(params)) return cudaSuccess;
  return for_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto kernel = params.grad_output ? residual_depthwise_kernel<T, true, true>
                        : params.gelu      ? residual_depthwise_kernel<T, true, false>
                                           : residual_depthwise_kernel<T, false, false>;
    return launch_tiles<typename Accumulator<T>::type>(kernel, 1, params, stream);
  });
}

cudaError_t launch_residual_depthwise_gradients(const ResidualDepthwiseNormParams& params, Dtype dtype,
                                                cudaStream_t stream) {
  if (is_empty(params)) return cudaSuccess;
  return for_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch_tiles<typename Accumulator<T>::type>(residual_depthwise_gradients_kernel<T>, kDerivatives, params,
                                                       stream);
  });
}

cudaError_t launch_parameter_gradients(const ResidualDepthwiseNormParams& params, Dtype dtype, cudaStream_t stream) {
  if (is_empty(params)) return cudaSuccess;
  const auto launch_sums = [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    constexpr int kThreads = kMaxWarps * kWarp;
    return launch(parameter_gradients_kernel<A>, (kSums + 2) * channel_blocks(params), kThreads, kThreads * sizeof(A),
                  params, stream);
  };
  return dtype == Dtype::float64 ? launch_sums(static_cast<double*>(nullptr))
                                 : launch_sums(static_cast<float*>(nullptr));
}

}  // namespace overlock_mm
