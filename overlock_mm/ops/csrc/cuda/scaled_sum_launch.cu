// Which kernel of scaled_sum_kernels.cuh runs, and on which parts of the map.
#include "launch.cuh"
#include "scaled_sum_kernels.cuh"
#include "sums.cuh"

namespace overlock_mm {
namespace {

using namespace scaled_sum_kernels;

template <typename T>
cudaError_t forward(const ScaledSumParams& params, cudaStream_t stream) {
  return with_size_of_both<T>(params, [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    return launch(scaled_sum_forward_kernel<T, kSize>, blocks_of<kSize>(params), kThreads, 0, params, stream);
  });
}

template <typename T>
cudaError_t backward(const ScaledSumParams& params, cudaStream_t stream) {
  using A = typename Accumulator<T>::type;
  const cudaError_t error = with_size_of_both<T>(params, [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    return launch(scaled_sum_backward_kernel<T, kSize>, blocks_of<kSize>(params), kThreads,
                  kSize * kThreads * static_cast<int64_t>(sizeof(A)), params, stream);
  });
  if (error != cudaSuccess) return error;
  SumParams totals{};
  totals.partials = params.strips * params.batch;
  totals.first = 2 * params.channels;
  totals.second = params.channels;
  totals.partial_sums = params.partial_sums;
  totals.first_out = params.grad_scale;
  totals.second_out = params.grad_shift;
  return launch_sum_of_partials<A>(totals, stream);
}

}  // namespace

cudaError_t launch_scaled_sum_forward(const ScaledSumParams& params, Dtype dtype, cudaStream_t stream) {
  if (is_empty(params)) return cudaSuccess;
  return for_dtype(dtype, [&](auto* type) { return forward<std::remove_pointer_t<decltype(type)>>(params, stream); });
}

cudaError_t launch_scaled_sum_backward(const ScaledSumParams& params, Dtype dtype, cudaStream_t stream) {
  if (is_empty(params)) return cudaSuccess;
  return for_dtype(dtype, [&](auto* type) { return backward<std::remove_pointer_t<decltype(type)>>(params, stream); });
}

}  // namespace overlock_mm
