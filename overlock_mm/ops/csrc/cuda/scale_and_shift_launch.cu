// Which kernel of scale_and_shift_kernels.cuh runs, and on which parts of the map.
#include "launch.cuh"
#include "scale_and_shift_kernels.cuh"
#include "sums.cuh"

namespace overlock_mm {
namespace {

using namespace scale_and_shift_kernels;

template <typename T>
cudaError_t forward(const ScaleAndShiftParams& params, cudaStream_t stream) {
  return with_size<T>(params, [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    const auto kernel =
        params.other ? scale_and_shift_forward_kernel<T, kSize, true> : scale_and_shift_forward_kernel<T, kSize, false>;
    return launch(kernel, blocks_of<kSize>(params), kThreads, 0, params, stream);
  });
}

template <typename T>
cudaError_t backward(const ScaleAndShiftParams& params, cudaStream_t stream) {
  using A = typename Accumulator<T>::type;
  const cudaError_t error = with_size<T>(params, [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    return launch(scale_and_shift_backward_kernel<T, kSize>, blocks_of<kSize>(params), kThreads,
                  kSize * kThreads * static_cast<int64_t>(sizeof(A)), params, stream);
  });
  if (error != cudaSuccess) return error;
  SumParams totals{};
  totals.partials = params.by_image ? params.strips : params.strips * params.batch;
  totals.first = params.by_image ? params.batch * params.channels : params.channels;
  totals.second = params.grad_shift ? params.channels : 0;
  totals.partial_sums = params.partial_sums;
  totals.first_out = params.grad_scale;
  totals.second_out = params.grad_shift;
  return launch_sum_of_partials<A>(totals, stream);
}

template <typename T>
cudaError_t sums_over_positions(const ScaleAndShiftParams& params, cudaStream_t stream) {
  using A = typename Accumulator<T>::type;
  return with_size<T>(params, [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    const auto kernel =
        params.grad_output ? sums_over_positions_kernel<T, kSize, true> : sums_over_positions_kernel<T, kSize, false>;
    return launch(kernel, blocks_of<kSize>(params), kThreads, kSize * kThreads * static_cast<int64_t>(sizeof(A)),
                  params, stream);
  });
}

}  // namespace

/// For 128 bytes of channels of float32, so that both sizes of a thread have the same.
int64_t scale_and_shift_strips(const ScaleAndShiftParams& params) {
  if (is_empty(params)) return 1;
  constexpr int64_t kLeastPositions = 4 * kThreads / kLanes;  // of a strip
  const int64_t blocks = params.batch * ceil_div(params.channels, 32);
  return parts_of(ceil_div(params.positions, kLeastPositions), blocks);
}

cudaError_t launch_scale_and_shift_forward(const ScaleAndShiftParams& params, Dtype dtype, cudaStream_t stream) {
  if (is_empty(params)) return cudaSuccess;
  return for_dtype(dtype, [&](auto* type) { return forward<std::remove_pointer_t<decltype(type)>>(params, stream); });
}

cudaError_t launch_scale_and_shift_backward(const ScaleAndShiftParams& params, Dtype dtype, cudaStream_t stream) {
  if (is_empty(params)) return cudaSuccess;
  return for_dtype(dtype, [&](auto* type) { return backward<std::remove_pointer_t<decltype(type)>>(params, stream); });
}

cudaError_t launch_sums_over_positions(const ScaleAndShiftParams& params, Dtype dtype, cudaStream_t stream) {
  if (is_empty(params)) return cudaSuccess;
  return for_dtype(
      dtype, [&](auto* type) { return sums_over_positions<std::remove_pointer_t<decltype(type)>>(params, stream); });
}

}  // namespace overlock_mm
