// How the CUDA kernels of branch norms divide a map, and sums over a warp.
#pragma once

#include "branch_norms_params.h"
#include "staging.cuh"

namespace overlock_mm {
namespace branch_norms_kernels {

/// A thread block has 8 channels, and a warp for each of them.
constexpr int kChannels = 8;
constexpr int kThreads = kChannels * kWarp;
/// Neighbouring positions of a row that a thread has.
constexpr int kRun = 8;

/// The tiles of a map. A warp covers one with `depth` runs for each thread. Neighbouring lanes have neighbouring rows.
struct Tiling {
  int rows_of_warp, rows, columns;
  int64_t vertical, horizontal, count;
  Planes with_halo, without;

  Tiling(const CudaBranchNormsParams& p, int runs_of_row, int depth)
      : rows_of_warp(kWarp / runs_of_row),
        rows(rows_of_warp * depth),
        columns(runs_of_row * kRun),
        vertical(ceil_div(p.height, rows)),
        horizontal(ceil_div(p.width, columns)),
        count(p.batch * vertical * horizontal),
        with_halo(rows + 2 * static_cast<int>(p.reach(0)), columns + 2 * static_cast<int>(p.reach(0))),
        without(rows, columns) {}
};

/// Where the rows of the kernels of a channel lie in shared memory, of one branch after the other.
struct TapLayout {
  static constexpr int kMostRows = 48;
  int rows[kMostRows];
};

/// Parameters of the kernels that work on tiles.
struct TiledParams {
  CudaBranchNormsParams branches;
  Tiling tiling;
  TapLayout taps;
};

struct Tile {
  int64_t image;
  int row, column;                  ///< in the map
  int inside_rows, inside_columns;  ///< within the map

  __device__ Tile(const CudaBranchNormsParams& p, const Tiling& tiling, int64_t index)
      : image(index / (tiling.vertical * tiling.horizontal)),
        row(static_cast<int>(index / tiling.horizontal % tiling.vertical) * tiling.rows),
        column(static_cast<int>(index % tiling.horizontal) * tiling.columns),
        inside_rows(min(static_cast<int>(p.height) - row, tiling.rows)),
        inside_columns(min(static_cast<int>(p.width) - column, tiling.columns)) {}
};

template <int kSize, typename A>
__device__ __forceinline__ void read_vectors(const A* shared, A (&out)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; i += 4) {
    const Vector<A> vector = vector_at(shared + i);
#pragma unroll
    for (int j = 0; j < 4 && i + j < kSize; ++j) out[i + j] = vector.at[j];
  }
}

template <int kSize, typename A>
__device__ __forceinline__ void write_vectors(const A (&numbers)[kSize], A* shared) {
#pragma unroll
  for (int i = 0; i < kSize; i += 4) {
    *reinterpret_cast<Vector<A>*>(shared + i) = {numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3]};
  }
}

/// The sum over the lanes that differ in the bits from `lowest` on, the same for all of them to the bit.
template <typename A>
__device__ __forceinline__ A sum_over_warp(A number, int lowest = 1) {
#pragma unroll
  for (int mask = kWarp / 2; mask >= lowest; mask /= 2) number += __shfl_xor_sync(0xffffffffu, number, mask);
  return number;
}

/// Sums of numbers[lane % kCount] over kCount lanes, for a power of 2. A lane gives half of its numbers away, then half
/// of the rest, and so on.
template <int kCount, typename A>
__device__ __forceinline__ A sums_over_lanes(const A (&numbers)[kCount]) {
  if constexpr (kCount == 1) {
    return numbers[0];
  } else {
    constexpr int kHalf = kCount / 2;
    const bool keeps_upper = threadIdx.x & kHalf;
    A kept[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const A own = keeps_upper ? numbers[i + kHalf] : numbers[i];
      const A given = keeps_upper ? numbers[i] : numbers[i + kHalf];
      kept[i] = own + __shfl_xor_sync(0xffffffffu, given, kHalf);
    }
    return sums_over_lanes(kept);
  }
}

}  // namespace branch_norms_kernels
}  // namespace overlock_mm
