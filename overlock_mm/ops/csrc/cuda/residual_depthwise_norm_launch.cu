// Which kernel of residual_depthwise_norm_kernels.cuh runs with how many threads and how much shared memory.
#include <type_traits>

#include "launch.cuh"
#include "residual_depthwise_norm_kernels.cuh"
#include "residual_depthwise_norm_launch.h"

namespace overlock_mm {
namespace {

using namespace residual_depthwise_norm_kernels;

}  // namespace

void residual_depthwise_norm_tiling(ResidualDepthwiseNormParams* params) { divide_for_walk(params); }

cudaError_t launch_residual_depthwise(const ResidualDepthwiseNormParams& params, Dtype dtype, cudaStream_t stream) {
  if (is_empty(params)) return cudaSuccess;
  return for_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto kernel = params.grad_output ? residual_depthwise_kernel<T, true, true>
                        : params.gelu      ? residual_depthwise_kernel<T, true, false>
                                           : residual_depthwise_kernel<T, false, false>;
    return launch_walk<typename Accumulator<T>::type>(kernel, 1, params, stream);
  });
}

cudaError_t launch_residual_depthwise_gradients(const ResidualDepthwiseNormParams& params, Dtype dtype,
                                                cudaStream_t stream) {
  if (is_empty(params)) return cudaSuccess;
  return for_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch_walk<typename Accumulator<T>::type>(residual_depthwise_gradients_kernel<T>, kDerivatives, params,
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
