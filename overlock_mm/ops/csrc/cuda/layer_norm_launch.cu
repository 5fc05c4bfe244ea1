// Which kernel of layer_norm_kernels.cuh runs, with how many threads for a position.
#include <type_traits>

#include "launch.cuh"
#include "layer_norm_kernels.cuh"
#include "sums.cuh"

namespace overlock_mm {
namespace {

using namespace layer_norm_kernels;

/// Calls body with an integral constant: the threads of a position.
template <typename T, typename Body>
auto with_lanes(const LayerNormParams& params, const Body& body) {
  const int64_t vectors = ceil_div(params.channels, Channels<T>::kSize);
  if (vectors <= 8) return body(std::integral_constant<int, 8>{});
  if (vectors <= 16) return body(std::integral_constant<int, 16>{});
  return body(std::integral_constant<int, 32>{});
}

/// Shared memory of a group of threads in the backward.
template <typename T>
int64_t bytes_of_group(int64_t channels) {
  return 2 * channels * static_cast<int64_t>(sizeof(typename Accumulator<T>::type));
}

template <typename T>
cudaError_t forward(const LayerNormParams& params, cudaStream_t stream) {
  return with_lanes<T>(params, [&](auto lanes) {
    constexpr int kLanes = decltype(lanes)::value;
    return launch(layer_norm_forward_kernel<T, kLanes>, ceil_div(params.positions, kThreads / kLanes), kThreads, 0,
                  params, stream);
  });
}

/// As many threads as have room for their sums, in whole warps.
template <typename T>
cudaError_t backward(const LayerNormParams& params, cudaStream_t stream) {
  int64_t limit = 0;
  cudaError_t error = shared_memory_limit(&limit);
  if (error != cudaSuccess) return error;
  error = with_lanes<T>(params, [&](auto lanes) {
    constexpr int kLanes = decltype(lanes)::value;
    int threads = kThreads;
    const auto bytes = [&] { return threads / kLanes * bytes_of_group<T>(params.channels); };
    while (threads > kWarp && bytes() > limit) threads /= 2;
    return launch(layer_norm_backward_kernel<T, kLanes>, params.partials, threads, bytes(), params, stream);
  });
  if (error != cudaSuccess) return error;
  const SumParams totals{params.partials,     params.channels,    params.channels,
                         params.partial_sums, params.grad_weight, params.grad_bias};
  return launch_sum_of_partials<typename Accumulator<T>::type>(totals, stream);
}

template <typename T>
int64_t partials_for(const LayerNormParams& params) {
  return with_lanes<T>(params, [&](auto lanes) {
    constexpr int kGroups = kThreads / decltype(lanes)::value;
    return parts_of(ceil_div(params.positions, kGroups), 1);
  });
}

}  // namespace

int64_t layer_norm_partials(const LayerNormParams& params, Dtype dtype) {
  int64_t partials = 1;
  if (params.positions == 0) return partials;
  for_dtype(dtype, [&](auto* type) {
    partials = partials_for<std::remove_pointer_t<decltype(type)>>(params);
    return cudaSuccess;
  });
  return partials;
}

cudaError_t launch_layer_norm_forward(const LayerNormParams& params, Dtype dtype, cudaStream_t stream) {
  if (params.positions == 0) return cudaSuccess;
  return for_dtype(dtype, [&](auto* type) { return forward<std::remove_pointer_t<decltype(type)>>(params, stream); });
}

cudaError_t launch_layer_norm_backward(const LayerNormParams& params, Dtype dtype, cudaStream_t stream) {
  if (params.positions == 0) return cudaSuccess;
  return for_dtype(dtype, [&](auto* type) { return backward<std::remove_pointer_t<decltype(type)>>(params, stream); });
}

}  // namespace overlock_mm
