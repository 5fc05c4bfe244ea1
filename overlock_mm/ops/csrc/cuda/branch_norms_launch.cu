// Which kernel of branch norms runs with how many thread blocks and how much shared memory.
#include <algorithm>
#include <type_traits>

#include "branch_norms_general_kernels.cuh"
#include "branch_norms_kernels.cuh"
#include "branch_norms_launch.h"
#include "launch.cuh"
#include "sums.cuh"

namespace overlock_mm {
namespace {

using namespace branch_norms_kernels;

int64_t channel_blocks(const CudaBranchNormsParams& p) { return ceil_div(p.channels, kChannels); }

/// With the tiles that read least, of 32, 16 or 8 columns.
Tiling tiling_of(const CudaBranchNormsParams& p, int depth) {
  const int64_t halo = 2 * p.reach(0);
  const auto staged = [&](const Tiling& tiling) {
    return tiling.count * (tiling.rows + halo) * (tiling.columns + halo);
  };
  Tiling best(p, 4, depth);
  for (const int runs_of_row : {2, 1}) {
    const Tiling tiling(p, runs_of_row, depth);
    if (staged(tiling) < staged(best)) best = tiling;
  }
  return best;
}

/// In the order of branches.
TapLayout taps_by_branches(const BranchList& list) {
  TapLayout layout{};
  int row = 0, first = 0;
  for (int b = 0; b < list.count; ++b) {
    for (int i = 0; i < list.kernel_size[b]; ++i, first += pitch_of_taps(list.kernel_size[b]))
      layout.rows[row++] = first;
  }
  return layout;
}

/// In the order in which the rows of the window use them.
TapLayout taps_by_window(const BranchList& list) {
  TapLayout layout{};
  int used[CudaBranchNormsParams::kMostBranches] = {}, first = 0;
  for (int row = 0; row < list.kernel_size[0]; ++row) {
    for (int b = 0; b < list.count; ++b) {
      if (!(rows_of_branch(list, b) >> row & 1)) continue;
      layout.rows[sizes_before(list, b).rows + used[b]++] = first;
      first += pitch_of_taps(list.kernel_size[b]);
    }
  }
  return layout;
}

bool has_branches(const CudaBranchNormsParams& p, const BranchList& list) {
  if (p.branches != list.count) return false;
  for (int b = 0; b < list.count; ++b) {
    if (p.kernel_size[b] != list.kernel_size[b] || p.dilation[b] != list.dilation[b]) return false;
  }
  return true;
}

template <int kList>
int64_t outputs_bytes(const Tiling& tiling) {
  return (outputs_planes(tiling) + kChannels * Branches<kList>::kTaps) * static_cast<int64_t>(sizeof(float));
}

template <int kList>
int64_t inputs_bytes(const Tiling& tiling) {
  return (inputs_planes(tiling) + 2 * kChannels * Branches<kList>::kTaps) * static_cast<int64_t>(sizeof(float));
}

/// Calls body(Constant<list>) for the list that these branches are, if there is one and its tiles fit in shared memory.
template <int kList = 0, typename Body>
bool try_list([[maybe_unused]] const CudaBranchNormsParams& p, [[maybe_unused]] int64_t limit,
              [[maybe_unused]] const Body& body) {
  if constexpr (kList < kLists) {
    if (!has_branches(p, kBranchLists[kList])) return try_list<kList + 1>(p, limit, body);
    const int64_t bytes =
        std::max(outputs_bytes<kList>(tiling_of(p, kOutputsDepth)), inputs_bytes<kList>(tiling_of(p, kInputsDepth)));
    constexpr int64_t kLargest = int64_t{1} << 24;  // the kernels count rows and columns in int
    if (bytes > limit || p.height > kLargest || p.width > kLargest) return false;
    body(Constant<kList>{});
    return true;
  }
  return false;
}

/// Calls body(Constant<list>), or general(type of the map) where no list will do. Double has none: its accumulators
/// would not fit in registers.
template <typename Body, typename General>
cudaError_t dispatch(const CudaBranchNormsParams& p, int64_t limit, const Body& body, const General& general) {
  cudaError_t error = cudaSuccess;
  if (p.dtype != Dtype::float64 && try_list(p, limit, [&](auto list) { error = body(list); })) return error;
  return for_dtype(p.dtype, general);
}

/// On the current device.
template <typename Body, typename General>
cudaError_t dispatch(const CudaBranchNormsParams& p, const Body& body, const General& general) {
  int64_t limit = 0;
  const cudaError_t error = shared_memory_limit(&limit);
  return error == cudaSuccess ? dispatch(p, limit, body, general) : error;
}

/// Calls body with a null pointer to the type of sums.
template <typename Body>
cudaError_t for_accumulator(Dtype dtype, const Body& body) {
  return dtype == Dtype::float64 ? body(static_cast<double*>(nullptr)) : body(static_cast<float*>(nullptr));
}

template <template <int> class Use, int kList>
cudaError_t launch_outputs(const CudaBranchNormsParams& p, cudaStream_t stream) {
  const TiledParams params{p, tiling_of(p, kOutputsDepth), taps_by_window(kBranchLists[kList])};
  return launch(outputs_kernel<kList, Use>, p.parts * channel_blocks(p), kThreads, outputs_bytes<kList>(params.tiling),
                params, stream);
}

template <typename T>
cudaError_t launch_general(void (*kernel)(CudaBranchNormsParams), int64_t parts, const CudaBranchNormsParams& p,
                           cudaStream_t stream) {
  const int64_t bytes = kGeneralNumbers * sizeof(typename Accumulator<T>::type);
  return launch(kernel, parts * channel_blocks(p), kThreads, bytes, p, stream);
}

/// A warp for each number.
int64_t warp_blocks(int64_t numbers) { return ceil_div(numbers, kThreads / kWarp); }

}  // namespace

BranchNormsParts branch_norms_parts(const CudaBranchNormsParams& p, int64_t shared_memory) {
  BranchNormsParts parts{};
  dispatch(
      p, shared_memory,
      [&](auto) {
        parts.tiled = true;
        parts.sums = parts_of(tiling_of(p, kOutputsDepth).count, channel_blocks(p));
        parts.weights = parts_of(tiling_of(p, kInputsDepth).count, channel_blocks(p));
        return cudaSuccess;
      },
      [&](auto*) {
        parts.sums = parts_of(ceil_div(p.positions(), kSlots), channel_blocks(p));
        parts.weights = 1;
        return cudaSuccess;
      });
  return parts;
}

cudaError_t branch_norms_parts(const CudaBranchNormsParams& p, BranchNormsParts* parts) {
  int64_t limit = 0;
  const cudaError_t error = shared_memory_limit(&limit);
  *parts = branch_norms_parts(p, limit);
  return error;
}

cudaError_t launch_branch_statistics(const CudaBranchNormsParams& p, cudaStream_t stream) {
  const cudaError_t error = dispatch(
      p, [&](auto list) { return launch_outputs<Statistics, decltype(list)::value>(p, stream); },
      [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return launch_general<T>(general_statistics_kernel<T>, p.parts, p, stream);
      });
  if (error != cudaSuccess) return error;
  return for_accumulator(p.dtype, [&](auto* type) {
    return launch(merge_kernel<std::remove_pointer_t<decltype(type)>>, warp_blocks(p.branches * p.channels), kThreads,
                  0, p, stream);
  });
}

cudaError_t launch_branch_fold(const CudaBranchNormsParams& p, cudaStream_t stream) {
  return for_accumulator(p.dtype, [&](auto* type) {
    return launch(fold_kernel<std::remove_pointer_t<decltype(type)>>, p.channels, kThreads,
                  p.kMostBranches * sizeof(double), p, stream);
  });
}

cudaError_t launch_branch_products(const CudaBranchNormsParams& p, cudaStream_t stream) {
  const cudaError_t error = dispatch(
      p, [&](auto list) { return launch_outputs<Products, decltype(list)::value>(p, stream); },
      [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return launch_general<T>(general_products_kernel<T>, p.parts, p, stream);
      });
  if (error != cudaSuccess) return error;
  return for_accumulator(p.dtype, [&](auto* type) {
    return launch(finish_products_kernel<std::remove_pointer_t<decltype(type)>>,
                  warp_blocks((p.branches + 1) * p.channels), kThreads, 0, p, stream);
  });
}

cudaError_t launch_branch_gradients(const CudaBranchNormsParams& p, cudaStream_t stream) {
  return dispatch(
      p,
      [&](auto list) {
        constexpr int kList = decltype(list)::value;
        const cudaError_t error = launch_outputs<Gradients, kList>(p, stream);
        if (error != cudaSuccess) return error;
        const TiledParams params{p, tiling_of(p, kInputsDepth), taps_by_branches(kBranchLists[kList])};
        return launch(inputs_kernel<kList>, p.weight_parts * channel_blocks(p), kThreads,
                      inputs_bytes<kList>(params.tiling), params, stream);
      },
      [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        cudaError_t error = launch_general<T>(general_gradients_kernel<T>, p.parts, p, stream);
        if (error == cudaSuccess) error = launch_general<T>(general_inputs_kernel<T>, p.parts, p, stream);
        if (error == cudaSuccess) error = launch_general<T>(general_weights_kernel<T>, p.taps(), p, stream);
        return error;
      });
}

cudaError_t launch_branch_weight_sums(const CudaBranchNormsParams& p, int64_t parts, cudaStream_t stream) {
  const SumParams params{parts, p.channels * p.taps(), 0, p.partial_grad_weights, p.grad_weights, nullptr};
  return for_accumulator(p.dtype, [&](auto* type) {
    return launch_sum_of_partials<std::remove_pointer_t<decltype(type)>>(params, stream);
  });
}

}  // namespace overlock_mm
