// Which kernel of depthwise_conv2d_kernels.cuh runs, on what tiles and with how much shared memory.
#include <algorithm>

#include "depthwise_conv2d_kernels.cuh"
#include "launch.cuh"
#include "sums.cuh"

namespace overlock_mm {
namespace {

using namespace depthwise_kernels;

int64_t tiles_of(const DepthwiseParams& params, const Tiling& tiling) {
  return params.batch * tiling.vertical * tiling.horizontal;
}

/// Shared memory of the staged kernels, in bytes.
template <typename T, int kKernel>
struct Bytes {
  static constexpr int64_t kSize = sizeof(typename Accumulator<T>::type), kChannels = kBlockChannels<T>;

  static int64_t tile(const Tiling& tiling, int halo) {
    return kChannels * Planes(tiling.rows + halo, tiling.runs * run_of(kKernel) + halo).stride;
  }
  static int64_t forward(const Tiling& tiling) {
    return kSize * (kChannels * kKernel * whole_vectors(kKernel) + tile(tiling, kKernel - 1));
  }
  static int64_t backward_weight(const Tiling& tiling) {
    const int64_t sums = kSlices<T, kKernel> * kChannels * (kKernel * kKernel + 1);
    return kSize * std::max(tile(tiling, kKernel - 1) + tile(tiling, 0), sums);
  }
};

/// The tiling with the least work that fits: a thread has a run in the forward, and staging a byte takes as long as
/// kStaging multiply-adds (128 of them a cycle in a multiprocessor, and about 32 bytes from the second-level cache).
/// None, with 0 rows, if no tile fits.
template <typename T, int kKernel>
Tiling choose_tiling(const DepthwiseParams& params, int64_t limit, int64_t (*bytes)(const Tiling&)) {
  constexpr int64_t kRun = run_of(kKernel), kChannels = kBlockChannels<T>, kStaging = 4;
  const int64_t height = params.height, all_runs = ceil_div(params.width, kRun);
  Tiling best{};
  int64_t least = 0;
  for (int64_t horizontal = all_runs; horizontal >= 1; --horizontal) {
    const int64_t runs = ceil_div(all_runs, horizontal), most_rows = kMaxThreads / kChannels / runs;
    if (most_rows == 0) break;
    for (int64_t vertical = ceil_div(height, most_rows); vertical <= height; vertical *= 2) {
      Tiling tiling{};
      tiling.rows = static_cast<int>(ceil_div(height, vertical));
      tiling.runs = static_cast<int>(runs);
      tiling.vertical = static_cast<int>(ceil_div(height, tiling.rows));
      tiling.horizontal = static_cast<int>(ceil_div(all_runs, runs));
      tiling.blocks = static_cast<int>(ceil_div(params.channels, kChannels));
      tiling.threads = static_cast<int>(ceil_div(kChannels * tiling.rows * runs, kWarp) * kWarp);
      if (bytes(tiling) > limit) continue;
      const int64_t staged =
          (tiling.rows + kKernel - 1) * (runs * kRun + kKernel - 1) * kChannels * static_cast<int64_t>(sizeof(T));
      const int64_t work =
          tiling.vertical * tiling.horizontal * (tiling.threads * kRun * kKernel * kKernel + kStaging * staged);
      if (best.rows == 0 || work < least) {
        best = tiling;
        least = work;
      }
      break;
    }
  }
  return best;
}

/// Whether the direct kernels alone take it: they count lines and columns in 64 bits.
bool is_dilated_or_huge(const DepthwiseParams& params) {
  constexpr int64_t kLargest = int64_t{1} << 24;
  return params.dilation != 1 || params.height > kLargest || params.width > kLargest;
}

/// Calls body with an integral constant, the kernel size, if there is a staged kernel: body returns whether it could
/// launch it.
template <typename T, typename Body>
bool try_staged(const DepthwiseParams& params, const Body& body) {
  if constexpr (!std::is_same_v<T, double>) {
    if (is_dilated_or_huge(params)) return false;
    switch (params.kernel_size) {
      case 3:
        return body(std::integral_constant<int, 3>{});
      case 5:
        return body(std::integral_constant<int, 5>{});
      case 7:
        return body(std::integral_constant<int, 7>{});
      case 9:
        return body(std::integral_constant<int, 9>{});
      case 11:
        return body(std::integral_constant<int, 11>{});
      case 13:
        return body(std::integral_constant<int, 13>{});
      case 15:
        return body(std::integral_constant<int, 15>{});
      case 17:
        return body(std::integral_constant<int, 17>{});
      default:
        return false;
    }
  }
  return false;
}

template <typename T>
cudaError_t forward(const DepthwiseParams& params, cudaStream_t stream) {
  int64_t limit = 0;
  cudaError_t error = shared_memory_limit(&limit);
  if (error != cudaSuccess) return error;
  const bool staged = try_staged<T>(params, [&](auto kernel_size) {
    constexpr int kKernel = decltype(kernel_size)::value;
    const auto bytes = Bytes<T, kKernel>::forward;
    const StagedParams all{params, choose_tiling<T, kKernel>(params, limit, bytes)};
    if (all.tiling.rows == 0) return false;
    error = launch(depthwise_forward_kernel<T, kKernel>, tiles_of(params, all.tiling) * all.tiling.blocks,
                   all.tiling.threads, bytes(all.tiling), all, stream);
    return true;
  });
  if (staged) return error;
  const int64_t outputs = params.batch * params.height * params.width * params.channels;
  return launch(depthwise_direct_forward_kernel<T>, ceil_div(outputs, kMaxThreads), kMaxThreads, 0, params, stream);
}

int64_t direct_partials(const DepthwiseParams& params) {
  const int64_t sums = params.channels * (params.kernel_size * params.kernel_size + 1);
  return parts_of(params.batch * params.height, ceil_div(sums, kMaxThreads));
}

constexpr int kWalkedKernel = 3;

/// Whether the gradients of the parameters take a walk.
bool is_walked(const DepthwiseParams& params) {
  return params.kernel_size == kWalkedKernel && !is_dilated_or_huge(params);
}

WalkParams walk_of(const DepthwiseParams& params) {
  WalkParams walk{};
  walk.batch = params.batch;
  walk.channels = params.channels;
  walk.height = params.height;
  walk.width = params.width;
  walks::divide_for_walk(&walk);
  walk.convolution = params;
  return walk;
}

template <typename T>
int64_t partials_for(const DepthwiseParams& params, int64_t limit) {
  if (is_walked(params)) return params.batch * walk_of(params).strips;
  int64_t partials = 0;
  const bool staged = try_staged<T>(params, [&](auto kernel_size) {
    constexpr int kKernel = decltype(kernel_size)::value;
    const Tiling tiling = choose_tiling<T, kKernel>(params, limit, Bytes<T, kKernel>::backward_weight);
    if (tiling.rows == 0) return false;
    partials = parts_of(tiles_of(params, tiling), tiling.blocks);
    return true;
  });
  return staged ? partials : direct_partials(params);
}

/// Partial sums of the gradients of the parameters, by the staged or the direct kernel.
template <typename T>
cudaError_t partial_sums(const DepthwiseParams& params, cudaStream_t stream) {
  int64_t limit = 0;
  cudaError_t error = shared_memory_limit(&limit);
  if (error != cudaSuccess) return error;
  const bool staged = try_staged<T>(params, [&](auto kernel_size) {
    constexpr int kKernel = decltype(kernel_size)::value;
    if constexpr (kKernel == kWalkedKernel) {
      return false;  // the walk takes all that a staged kernel could
    } else {
      const auto bytes = Bytes<T, kKernel>::backward_weight;
      const StagedParams all{params, choose_tiling<T, kKernel>(params, limit, bytes)};
      if (all.tiling.rows == 0) return false;
      error = launch(depthwise_backward_weight_kernel<T, kKernel>, params.partials * all.tiling.blocks,
                     kBackwardThreads<T, kKernel>, bytes(all.tiling), all, stream);
      return true;
    }
  });
  if (staged) return error;
  const int64_t sums = params.channels * (params.kernel_size * params.kernel_size + 1);
  return launch(depthwise_direct_backward_weight_kernel<T>, ceil_div(params.partials * sums, kMaxThreads), kMaxThreads,
                0, params, stream);
}

template <typename T>
cudaError_t backward(const DepthwiseParams& params, cudaStream_t stream) {
  using A = typename Accumulator<T>::type;
  const bool walked = params.grad_weight && is_walked(params);
  cudaError_t error = cudaSuccess;
  if (params.grad_input && !walked) {
    DepthwiseParams of_input = params;
    of_input.input = params.grad_output;
    of_input.bias = nullptr;
    of_input.output = params.grad_input;
    of_input.flipped = true;
    error = forward<T>(of_input, stream);
  }
  if (error != cudaSuccess || !params.grad_weight) return error;
  error = walked ? walks::launch_walk<A>(depthwise_walk_kernel<T>, walks::kTaps + 1, walk_of(params), stream)
                 : partial_sums<T>(params, stream);
  if (error != cudaSuccess) return error;
  const int64_t taps = params.kernel_size * params.kernel_size;
  const SumParams totals{params.partials,     params.channels * taps, params.channels,
                         params.partial_sums, params.grad_weight,     params.grad_bias};
  return launch_sum_of_partials<A>(totals, stream);
}

bool is_empty(const DepthwiseParams& params) {
  return params.batch * params.channels * params.height * params.width == 0;
}

}  // namespace

int64_t depthwise_partials(const DepthwiseParams& params, Dtype dtype, int64_t shared_memory) {
  int64_t partials = 1;
  if (is_empty(params)) return partials;
  for_dtype(dtype, [&](auto* type) {
    partials = partials_for<std::remove_pointer_t<decltype(type)>>(params, shared_memory);
    return cudaSuccess;
  });
  return partials;
}

cudaError_t depthwise_partials(const DepthwiseParams& params, Dtype dtype, int64_t* partials) {
  int64_t limit = 0;
  const cudaError_t error = shared_memory_limit(&limit);
  *partials = depthwise_partials(params, dtype, limit);
  return error;
}

cudaError_t launch_depthwise_forward(const DepthwiseParams& params, Dtype dtype, cudaStream_t stream) {
  if (is_empty(params)) return cudaSuccess;
  return for_dtype(dtype, [&](auto* type) { return forward<std::remove_pointer_t<decltype(type)>>(params, stream); });
}

cudaError_t launch_depthwise_backward(const DepthwiseParams& params, Dtype dtype, cudaStream_t stream) {
  if (is_empty(params)) return cudaSuccess;
  return for_dtype(dtype, [&](auto* type) { return backward<std::remove_pointer_t<decltype(type)>>(params, stream); });
}

}  // namespace overlock_mm
