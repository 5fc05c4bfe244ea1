// Which kernel of branch norms runs with how many thread blocks and how much shared memory.
#include <algorithm>
#include <type_traits>

#include "branch_norms_general_kernels.cuh"
#include "branch_norms_kernels.cuh"
#include "branch_norms_launch.h"
#include "launch.cuh"

namespace overlock_mm {
namespace {

using namespace branch_norms_kernels;

/// Thread blocks that keep the largest devices busy for two rounds. More would only write more partial sums.
constexpr int64_t kBlocks = 528;

int64_t channel_blocks(const CudaBranchNormsParams& p) { return ceil_div(p.channels, kChannels); }

Tiling tiling_of(const CudaBranchNormsParams& p, int rows) {
  return Tiling(p.batch, p.height, p.width, p.column_groups, rows);
}

/// With the tiles that read least, of 32, 16 or 8 columns.
CudaBranchNormsParams tiled(CudaBranchNormsParams p, int rows) {
  int64_t least = -1;
  int best = 4;
  for (const int groups : {4, 2, 1}) {
    p.column_groups = groups;
    const Tiling tiling = tiling_of(p, rows);
    const int64_t reach = p.reach(0), read = tiling.count() * (tiling.lines + 2 * reach) * (tiling.columns + 2 * reach);
    if (least < 0 || read < least) {
      least = read;
      best = groups;
    }
  }
  p.column_groups = best;
  return p;
}

/// As few units of work to a part as kBlocks allows, and the same for all parts but the last ones.
int64_t parts_of(const CudaBranchNormsParams& p, int64_t units) {
  const int64_t wanted = std::max<int64_t>(kBlocks / channel_blocks(p), 1);
  return ceil_div(units, ceil_div(units, wanted));
}

bool has_branches(const CudaBranchNormsParams& p, const BranchList& list) {
  if (p.branches != list.count) return false;
  for (int b = 0; b < list.count; ++b) {
    if (p.kernel_size[b] != list.kernel_size[b] || p.dilation[b] != list.dilation[b]) return false;
  }
  return true;
}

template <int kList>
int64_t outputs_bytes(const CudaBranchNormsParams& p) {
  return OutputsMemory<kList>(tiling_of(p, kRowsOfOutputs)).numbers() * static_cast<int64_t>(sizeof(float));
}

template <int kList>
int64_t inputs_bytes(const CudaBranchNormsParams& p) {
  return InputsMemory<kList>(tiling_of(p, kRowsOfInputs)).numbers() * static_cast<int64_t>(sizeof(float));
}

/// Calls body(Constant<list>) for the list that these branches are, if there is one and its tiles fit in shared memory.
template <int kList = 0, typename Body>
bool try_list([[maybe_unused]] const CudaBranchNormsParams& p, [[maybe_unused]] int64_t limit,
              [[maybe_unused]] const Body& body) {
  if constexpr (kList < kLists) {
    if (!has_branches(p, kBranchLists[kList])) return try_list<kList + 1>(p, limit, body);
    const int64_t bytes =
        std::max(outputs_bytes<kList>(tiled(p, kRowsOfOutputs)), inputs_bytes<kList>(tiled(p, kRowsOfInputs)));
    if (bytes > limit) return false;
    body(Constant<kList>{});
    return true;
  }
  return false;
}

/// Calls body(Constant<list>), or general(type of the map) where no list will do. Double has none: its accumulators
/// would not fit in registers.
template <typename Body, typename General>
cudaError_t dispatch(const CudaBranchNormsParams& p, const Body& body, const General& general) {
  if (p.batch == 0) return cudaErrorInvalidValue;
  int64_t limit = 0;
  cudaError_t error = shared_memory_limit(&limit);
  if (error != cudaSuccess) return error;
  if (p.dtype != Dtype::float64 && try_list(p, limit, [&](auto list) { error = body(list); })) return error;
  return for_dtype(p.dtype, general);
}

/// Calls body with a null pointer to the type of sums.
template <typename Body>
cudaError_t for_accumulator(Dtype dtype, const Body& body) {
  return dtype == Dtype::float64 ? body(static_cast<double*>(nullptr)) : body(static_cast<float*>(nullptr));
}

template <template <int> class Use, int kList>
cudaError_t launch_outputs(const CudaBranchNormsParams& params, cudaStream_t stream) {
  const CudaBranchNormsParams p = tiled(params, kRowsOfOutputs);
  return launch(outputs_kernel<kList, Use>, p.parts * channel_blocks(p), kThreads, outputs_bytes<kList>(p), p, stream);
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

cudaError_t branch_norms_parts(const CudaBranchNormsParams& p, int64_t* parts, int64_t* weight_parts) {
  return dispatch(
      p,
      [&](auto) {
        *parts = parts_of(p, tiling_of(tiled(p, kRowsOfOutputs), kRowsOfOutputs).count());
        *weight_parts = parts_of(p, tiling_of(tiled(p, kRowsOfInputs), kRowsOfInputs).count());
        return cudaSuccess;
      },
      [&](auto*) {
        *parts = parts_of(p, ceil_div(p.positions(), kSlots));
        *weight_parts = 1;
        return cudaSuccess;
      });
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
        CudaBranchNormsParams of_inputs = tiled(p, kRowsOfInputs);
        of_inputs.parts = p.weight_parts;
        return launch(inputs_kernel<kList>, of_inputs.parts * channel_blocks(p), kThreads,
                      inputs_bytes<kList>(of_inputs), of_inputs, stream);
      },
      [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        cudaError_t error = launch_general<T>(general_gradients_kernel<T>, p.parts, p, stream);
        if (error == cudaSuccess) error = launch_general<T>(general_inputs_kernel<T>, p.parts, p, stream);
        if (error == cudaSuccess) error = launch_general<T>(general_weights_kernel<T>, p.taps(), p, stream);
        return error;
      });
}

cudaError_t launch_branch_weight_sums(const CudaBranchNormsParams& p, cudaStream_t stream) {
  return for_accumulator(p.dtype, [&](auto* type) {
    return launch(sum_weights_kernel<std::remove_pointer_t<decltype(type)>>, ceil_div(p.channels * p.taps(), kThreads),
                  kThreads, 0, p, stream);
  });
}

}  // namespace overlock_mm
