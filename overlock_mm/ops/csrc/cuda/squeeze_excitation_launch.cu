// How many threads of squeeze_excitation_kernels.cuh run.
#include "launch.cuh"
#include "squeeze_excitation_kernels.cuh"

namespace overlock_mm {
namespace {

using namespace squeeze_excitation_kernels;

template <typename A>
cudaError_t launch_images(void (*kernel)(SqueezeExcitationParams), const SqueezeExcitationParams& params,
                          cudaStream_t stream) {
  const int64_t numbers = kGateThreads + params.channels + params.hidden;
  return launch(kernel, params.batch, kGateThreads, numbers * static_cast<int64_t>(sizeof(A)), params, stream);
}

/// Calls body with a null pointer to the accumulation type.
template <typename Body>
cudaError_t for_accumulator(const SqueezeExcitationParams& params, Dtype dtype, const Body& body) {
  if (params.batch * params.positions * params.channels == 0) return cudaSuccess;
  return dtype == Dtype::float64 ? body(static_cast<double*>(nullptr)) : body(static_cast<float*>(nullptr));
}

/// Calls body with null pointers to the dtype's type, and with an integral constant: the channels of a thread.
template <typename Body>
cudaError_t for_map(const GatedMapParams& params, Dtype dtype, const Body& body) {
  if (params.batch * params.positions * params.channels == 0) return cudaSuccess;
  return for_dtype(dtype, [&](auto* type) {
    return with_size<std::remove_pointer_t<decltype(type)>>(params, [&](auto size) { return body(type, size); });
  });
}

}  // namespace

cudaError_t launch_gates(const SqueezeExcitationParams& params, Dtype dtype, cudaStream_t stream) {
  return for_accumulator(params, dtype, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    return launch_images<A>(gates_kernel<A>, params, stream);
  });
}

cudaError_t launch_gate_gradients(const SqueezeExcitationParams& params, Dtype dtype, cudaStream_t stream) {
  return for_accumulator(params, dtype, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    return launch_images<A>(gate_gradients_kernel<A>, params, stream);
  });
}

cudaError_t launch_weight_gradients(const SqueezeExcitationParams& params, Dtype dtype, cudaStream_t stream) {
  return for_accumulator(params, dtype, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    const int64_t parameters = 2 * params.channels * params.hidden + params.channels + params.hidden;
    return launch(weight_gradients_kernel<A>, ceil_div(parameters, kGateThreads), kGateThreads, 0, params, stream);
  });
}

cudaError_t launch_gated_forward(const GatedMapParams& params, Dtype dtype, cudaStream_t stream) {
  return for_map(params, dtype, [&](auto* type, auto size) {
    constexpr int kSize = decltype(size)::value;
    const auto kernel = gated_forward_kernel<std::remove_pointer_t<decltype(type)>, kSize>;
    return launch(kernel, blocks_of<kSize>(params), kThreads, 0, params, stream);
  });
}

cudaError_t launch_gated_sums(const GatedMapParams& params, Dtype dtype, cudaStream_t stream) {
  return for_map(params, dtype, [&](auto* type, auto size) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kSize = decltype(size)::value;
    constexpr int64_t kBytes = kSize * kThreads * sizeof(typename Accumulator<T>::type);
    return launch(gated_sums_kernel<T, kSize>, blocks_of<kSize>(params), kThreads, kBytes, params, stream);
  });
}

cudaError_t launch_gated_gradients(const GatedMapParams& params, Dtype dtype, cudaStream_t stream) {
  return for_map(params, dtype, [&](auto* type, auto size) {
    constexpr int kSize = decltype(size)::value;
    const auto kernel = gated_gradients_kernel<std::remove_pointer_t<decltype(type)>, kSize>;
    return launch(kernel, blocks_of<kSize>(params), kThreads, 0, params, stream);
  });
}

}  // namespace overlock_mm
