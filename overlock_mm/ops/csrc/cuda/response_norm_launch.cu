// Which kernel of response_norm_kernels.cuh runs with how many threads and how much shared memory.
#include <algorithm>
#include <type_traits>

#include "launch.cuh"
#include "response_norm_kernels.cuh"
#include "response_norm_launch.h"

namespace overlock_mm {
namespace {

using namespace response_norm_kernels;

// Blocks that keep the largest devices busy. More would only write more partial sums.
constexpr int64_t kBlocks = 2048;
constexpr int64_t kLeastPositions = 64;  // of a strip
constexpr int kThreads = kWarps * kWarp;

int64_t channel_blocks(const ResponseNormParams& params) { return ceil_div(params.channels, kWarp); }
bool is_empty(const ResponseNormParams& params) { return params.batch * params.channels * params.positions == 0; }

int64_t strip_blocks(const ResponseNormParams& params) { return params.batch * params.strips * channel_blocks(params); }

/// Calls body with a null pointer to the accumulation type.
template <typename Body>
cudaError_t for_accumulator(Dtype dtype, const Body& body) {
  return dtype == Dtype::float64 ? body(static_cast<double*>(nullptr)) : body(static_cast<float*>(nullptr));
}

}  // namespace

int64_t response_norm_strips(const ResponseNormParams& params) {
  if (is_empty(params)) return 1;
  const int64_t wanted = ceil_div(kBlocks, params.batch * channel_blocks(params));
  return std::min(wanted, ceil_div(params.positions, kLeastPositions));
}

cudaError_t launch_channel_sums(const ResponseNormParams& params, Dtype dtype, cudaStream_t stream) {
  if (is_empty(params)) return cudaSuccess;
  return for_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int64_t kBytes = kThreads * sizeof(typename Accumulator<T>::type);
    const auto kernel = params.other ? channel_sums_kernel<T, true> : channel_sums_kernel<T, false>;
    return launch(kernel, strip_blocks(params), kThreads, kBytes, params, stream);
  });
}

cudaError_t launch_scale_and_shift(const ResponseNormParams& params, Dtype dtype, cudaStream_t stream) {
  if (is_empty(params)) return cudaSuccess;
  return for_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch(scale_and_shift_kernel<T>, strip_blocks(params), kThreads, 0, params, stream);
  });
}

cudaError_t launch_response_factors(const ResponseFactorsParams& params, Dtype dtype, cudaStream_t stream) {
  if (params.batch * params.channels == 0) return cudaSuccess;
  return for_accumulator(dtype, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    const auto kernel = params.plain_sums ? response_gradients_kernel<A> : response_factors_kernel<A>;
    return launch(kernel, params.batch, kFactorThreads, kFactorThreads * sizeof(A), params, stream);
  });
}

cudaError_t launch_response_norm_gradients(const ResponseNormGradientsParams& params, Dtype dtype,
                                           cudaStream_t stream) {
  if (is_empty(params)) return cudaSuccess;
  return for_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t blocks = strip_blocks(params) + ceil_div(2 * params.channels, kThreads);
    return launch(response_norm_gradients_kernel<T>, blocks, kThreads, 0, params, stream);
  });
}

}  // namespace overlock_mm
