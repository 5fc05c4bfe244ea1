// Sums over the warps of a thread block, and over thread blocks, in a fixed order.
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

/// The sum over a block's warps of what each thread of a warp has: for the threads of the first warp. `shared` has a
/// number for each thread.
template <typename A>
__device__ __forceinline__ A sum_over_warps(A number, A* shared) {
  __syncthreads();  // what was in `shared` has been read
  shared[threadIdx.x] = number;
  __syncthreads();
  A sum = 0;
  if (threadIdx.x < kWarp) {
#pragma unroll 1
    for (int thread = static_cast<int>(threadIdx.x); thread < static_cast<int>(blockDim.x); thread += kWarp)
      sum += shared[thread];
  }
  return sum;
}

constexpr int kSumThreads = 256;

/// A block for 32 numbers. Its warps share the partial sums.
template <typename A>
__global__ void __launch_bounds__(kSumThreads) sum_partials_kernel(const SumParams p) {
  OVERLOCK_MM_SHARED(A, shared);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x % kWarp, pitch = p.first + p.second;
  const bool is_first = index < p.first;
  A* const out = static_cast<A*>(is_first ? p.first_out : p.second_out);
  const bool wanted = index < pitch && out;
  A sum = 0;
  if (wanted) {
    const A* const partial_sums = static_cast<const A*>(p.partial_sums) + index;
#pragma unroll 8
    for (int64_t i = threadIdx.x / kWarp; i < p.partials; i += kSumThreads / kWarp)
      sum += load(partial_sums + i * pitch);
  }
  sum = sum_over_warps(sum, shared);
  if (threadIdx.x < kWarp && wanted) out[is_first ? index : index - p.first] = sum;
}

template <typename A>
cudaError_t launch_sum_of_partials(const SumParams& params, cudaStream_t stream) {
  const int64_t numbers = params.first + (params.second_out ? params.second : 0);
  return launch(sum_partials_kernel<A>, ceil_div(numbers, kWarp), kSumThreads, kSumThreads * sizeof(A), params, stream);
}

}  // namespace overlock_mm
