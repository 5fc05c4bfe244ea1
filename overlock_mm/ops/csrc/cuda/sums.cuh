// Partial sums of thread blocks, added in a fixed order.
#pragma once

#include "launch.cuh"
#include "numbers.cuh"

namespace overlock_mm {

/// Blocks of a sum that keep the largest devices busy for a few rounds. More would only write more partial sums.
constexpr int64_t kSumBlocks = 512;

/// Parts of `items` that are summed by themselves: as few items to a part as keep a device busy with `blocks` for each
/// part, and the same for every part but the last ones.
inline int64_t parts_of(int64_t items, int64_t blocks) {
  const int64_t wanted = kSumBlocks / blocks > 1 ? kSumBlocks / blocks : 1;
  return ceil_div(items, ceil_div(items, wanted));
}

/// All of the accumulation type. A sum has `first` numbers of one result, and after them `second` of another.
struct SumParams {
  int64_t partials, first, second;
  const void* partial_sums;      ///< (partials, first + second)
  void *first_out, *second_out;  ///< (first), (second); null: not wanted
};

/// A thread for each number.
template <typename A>
__global__ void sum_partials_kernel(SumParams p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, pitch = p.first + p.second;
  const bool is_first = index < p.first;
  A* const out = static_cast<A*>(is_first ? p.first_out : p.second_out);
  if (index >= pitch || !out) return;
  const A* const partial_sums = static_cast<const A*>(p.partial_sums) + index;
  A sum = 0;
  for (int64_t i = 0; i < p.partials; ++i) sum += load(partial_sums + i * pitch);
  out[is_first ? index : index - p.first] = sum;
}

template <typename A>
cudaError_t launch_sum_of_partials(const SumParams& params, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int64_t numbers = params.first + (params.second_out ? params.second : 0);
  return launch(sum_partials_kernel<A>, ceil_div(numbers, kThreads), kThreads, 0, params, stream);
}

}  // namespace overlock_mm
