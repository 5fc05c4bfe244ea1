// The CUDA kernels of branch norms for the branches of the models. docs/notes/branch_norms_cuda.md has the mathematics
// and what the kernels cost; branch_norms_params.h has the shapes.
//
//   outputs_kernel    the outputs of all branches, tile by tile, which are not written but used in one of three ways:
//                     Statistics (means and squared distances from them), Products (with grad_output), or Gradients (of
//                     the branches' outputs, which are written)
//   inputs_kernel     from Gradients' maps: grad_input, and the gradients of the weights
//   small kernels     merge, fold and sum what blocks have written
//
// The first two have the branches as constants. A warp has a channel, so that weights are read as broadcasts, and a
// thread has 8 neighbouring positions of a line. It reads a line of its window once, for all taps that lie in it.
#pragma once

#include "branch_norms_tiles.cuh"

namespace overlock_mm {
namespace branch_norms_kernels {

// ---------------------------------------------------------------------------------------------------------------------
// Branches as constants

struct BranchList {
  int count;
  int kernel_size[CudaBranchNormsParams::kMostBranches], dilation[CudaBranchNormsParams::kMostBranches];
};

/// Those of the models (DILATED_BRANCHES in overlock_mm/models/reparam.py).
constexpr int kLists = 7;
constexpr BranchList kBranchLists[kLists] = {
    {7, {17, 5, 7, 9, 3, 3, 3}, {1, 1, 1, 2, 4, 5, 7}},  //
    {7, {15, 5, 7, 7, 3, 3, 3}, {1, 1, 1, 2, 3, 5, 7}},  //
    {7, {13, 5, 7, 7, 3, 3, 3}, {1, 1, 1, 2, 3, 4, 5}},  //
    {7, {11, 5, 7, 5, 3, 3, 3}, {1, 1, 1, 2, 3, 4, 5}},  //
    {6, {9, 5, 7, 5, 3, 3}, {1, 1, 1, 2, 3, 4}},         //
    {5, {7, 5, 3, 3, 3}, {1, 1, 1, 2, 3}},               //
    {3, {5, 3, 3}, {1, 1, 2}},                           //
};

/// Numbers between rows of a kernel in shared memory: they begin at vectors.
constexpr int pitch_of_taps(int kernel_size) { return (kernel_size + 3) / 4 * 4; }

/// A bit for each row of the window that has taps of a branch.
constexpr unsigned rows_of_branch(const BranchList& list, int b) {
  unsigned bits = 0;
  for (int i = 0; i < list.kernel_size[b]; ++i)
    bits |= 1u << (list.kernel_size[0] / 2 + (i - list.kernel_size[b] / 2) * list.dilation[b]);
  return bits;
}

/// What the branches before one have: rows, and numbers in shared memory and in memory.
struct Sizes {
  int rows, staged, taps;
};
constexpr Sizes sizes_before(const BranchList& list, int branch) {
  Sizes sizes{};
  for (int b = 0; b < branch; ++b) {
    const int k = list.kernel_size[b];
    sizes.rows += k;
    sizes.staged += k * pitch_of_taps(k);
    sizes.taps += k * k;
  }
  return sizes;
}

template <int kList>
struct Branches {
  static constexpr int kCount = kBranchLists[kList].count;
  static constexpr int kLargest = kBranchLists[kList].kernel_size[0], kReach = kLargest / 2;
  /// Numbers of a line of a run's window, in vectors.
  static constexpr int kWindow = (kRun + 2 * kReach + 3) / 4 * 4;
  /// Taps of a channel in shared memory.
  static constexpr int kTaps = sizes_before(kBranchLists[kList], kCount).staged;
};

template <int kList, int b>
struct Branch {
  static constexpr int kIndex = b;
  static constexpr int kSize = kBranchLists[kList].kernel_size[b], kDilation = kBranchLists[kList].dilation[b];
  static constexpr int kTaps = kSize * kSize, kPitch = pitch_of_taps(kSize), kReach = kSize / 2 * kDilation;
  /// Where the first tap is in a window.
  static constexpr int kMargin = Branches<kList>::kReach - kReach;
  static constexpr unsigned kRows = rows_of_branch(kBranchLists[kList], b);
  static constexpr int kFirstRow = sizes_before(kBranchLists[kList], b).rows,
                       kFirst = sizes_before(kBranchLists[kList], b).staged,
                       kFirstTap = sizes_before(kBranchLists[kList], b).taps;
};

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

/// body(Branch<kList, b>{}) for all branches b.
template <int kList, int b = 0, typename Body>
__device__ __forceinline__ void for_each_branch(const Body& body) {
  if constexpr (b < Branches<kList>::kCount) {
    body(Branch<kList, b>{});
    for_each_branch<kList, b + 1>(body);
  }
}

/// The taps of a channel block to shared memory. Flipped kernels are turned round.
template <int kList, bool kFlipped>
__device__ __forceinline__ void stage_weights(const TiledParams& params, int64_t first_channel, float* to) {
  using List = Branches<kList>;
  for_each_branch<kList>([&](auto branch) {
    using Own = decltype(branch);
    constexpr int kSize = Own::kSize, kTaps = Own::kTaps;
    for (int i = threadIdx.x; i < kChannels * kTaps; i += kThreads) {
      const int channel = i / kTaps, tap = kFlipped ? kTaps - 1 - i % kTaps : i % kTaps;
      const int64_t c = first_channel + channel;
      to[channel * List::kTaps + params.taps.rows[Own::kFirstRow + tap / kSize] + tap % kSize] =
          c < params.branches.channels
              ? load(static_cast<const float*>(params.branches.weights[Own::kIndex]) + c * kTaps + i % kTaps)
              : 0.f;
    }
  });
}

/// Numbers of a window's line that a branch has taps for. The others are not read.
template <typename Own, int kWindow, typename A>
__device__ __forceinline__ void read_window(const A* from, A (&window)[kWindow]) {
  constexpr int kBegin = Own::kMargin / 4 * 4, kEnd = Own::kMargin + 2 * Own::kReach + kRun;
#pragma unroll
  for (int i = kBegin; i < kEnd; i += 4) {
    const Vector<A> vector = vector_at(from + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) window[i + j] = vector.at[j];
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Outputs of all branches

template <int kList>
using Outputs = float[Branches<kList>::kCount][kRun];

/// `window` is the first row of the thread's window. The weights are those of its channel, in the order of their use.
template <int kList>
__device__ __forceinline__ void convolve(const float* window, const Planes& planes, const float* weights,
                                         Outputs<kList>& y) {
  using List = Branches<kList>;
  for_each_branch<kList>([&](auto branch) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) y[decltype(branch)::kIndex][i] = 0.f;
  });
#pragma unroll 1
  for (unsigned row = 1; row < 1u << List::kLargest; row *= 2, window += planes.pitch) {
    float inputs[List::kWindow];
    read_window<Branch<kList, 0>>(window, inputs);
    for_each_branch<kList>([&](auto branch) {
      using Own = decltype(branch);
      constexpr int b = Own::kIndex, kSize = Own::kSize;
      if (b == 0 || (Own::kRows & row)) {
        float taps[kSize];
        read_vectors(weights, taps);
        weights += Own::kPitch;
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
#pragma unroll
          for (int i = 0; i < kRun; ++i) y[b][i] += taps[j] * inputs[Own::kMargin + j * Own::kDilation + i];
        }
      }
    });
  }
}

/// What a thread knows of its work: 8 channels of a part of the tiles. Blocks that run at the same time have
/// neighbouring channels of the same positions.
struct Work {
  const CudaBranchNormsParams& p;
  const Tiling& tiling;
  int lane, channel;  ///< the warp's channel, of the 8
  int row, column;    ///< of the thread's first run in a tile; the others are rows_of_warp below one another
  int64_t first_channel, c, part;
  bool has_channel;

  __device__ explicit Work(const TiledParams& params)
      : p(params.branches),
        tiling(params.tiling),
        lane(threadIdx.x % kWarp),
        channel(threadIdx.x / kWarp),
        row(lane % tiling.rows_of_warp),
        column(lane / tiling.rows_of_warp * kRun) {
    const int64_t channel_blocks = ceil_div(p.channels, kChannels);
    first_channel = blockIdx.x % channel_blocks * kChannels;
    c = first_channel + channel;
    part = blockIdx.x / channel_blocks;
    has_channel = c < p.channels;
  }

  /// Where the first run is in shared memory, or with a halo its window.
  template <typename A>
  __device__ A* place_in(A* shared, const Planes& planes) const {
    return shared + channel * planes.stride + row * planes.pitch + column;
  }

  /// Of statistics or parameters (branches, C); 0 where there is no channel.
  __device__ float number_of(const void* numbers, int b) const {
    return has_channel ? load(static_cast<const float*>(numbers) + b * p.channels + c) : 0.f;
  }

  // Map `index` of those that begin at `maps`. Its dtype matters here alone: as a template argument of the kernels, it
  // would take three times the code.

  /// With `halo` positions on all sides, in planes that have room for `margin`.
  __device__ void stage_tile(const void* maps, int64_t index, const Tile& tile, int halo, int margin,
                             const Planes& planes, float* shared) const {
    with_map_type<const __half, const __nv_bfloat16, const float>([&](auto* type) {
      const Region region{tile.row - halo, tile.column - halo, tiling.rows + 2 * halo, tiling.columns + 2 * halo};
      const auto image = image_of(static_cast<decltype(type)>(maps), index, tile);
      stage_channels(image, region, planes, shared + (margin - halo) * (planes.pitch + 1));
    });
  }
  __device__ void unstage_tile(const float* shared, const Planes& planes, const Tile& tile, void* maps,
                               int64_t index) const {
    with_map_type<__half, __nv_bfloat16, float>([&](auto* type) {
      const Region region{tile.row, tile.column, tiling.rows, tiling.columns};
      unstage_channels(shared, planes, region, image_of(static_cast<decltype(type)>(maps), index, tile));
    });
  }

 private:
  template <typename T>
  __device__ ImageChannels<T> image_of(T* maps, int64_t index, const Tile& tile) const {
    return ImageChannels<T>(maps + index * p.batch * p.image_size(), tile.image, p.channels, static_cast<int>(p.height),
                            static_cast<int>(p.width), first_channel);
  }
  template <typename T>
  __device__ static void stage_channels(const ImageChannels<const T>& image, const Region& region, const Planes& planes,
                                        float* shared) {
    stage<T, kChannels>(image, region, planes, shared);
  }
  template <typename T>
  __device__ static void unstage_channels(const float* shared, const Planes& planes, const Region& region,
                                          const ImageChannels<T>& image) {
    unstage<T, kChannels>(shared, planes, region, image);
  }
  template <typename Half, typename Bfloat16, typename Float, typename Body>
  __device__ void with_map_type(const Body& body) const {
    if (p.dtype == Dtype::float16) {
      body(static_cast<Half*>(nullptr));
    } else if (p.dtype == Dtype::bfloat16) {
      body(static_cast<Bfloat16*>(nullptr));
    } else {
      body(static_cast<Float*>(nullptr));
    }
  }
};

/// Lane b has the statistics of branch b over the block's tiles so far.
template <int kList>
class Statistics {
 public:
  __device__ explicit Statistics(const Work& work) : work_(work) {}

  __device__ void add(const Tile& tile, const Outputs<kList>& y, float*) {
    const int count = tile.inside_rows * tile.inside_columns;
    const int own = work_.row < tile.inside_rows ? tile.inside_columns - work_.column : 0;  // positions within the map
    for_each_branch<kList>([&](auto branch) {
      constexpr int b = decltype(branch)::kIndex;
      float sum = 0, square = 0;
#pragma unroll
      for (int i = 0; i < kRun; ++i) sum += i < own ? y[b][i] : 0.f;
      const float mean = sum_over_warp(sum) / static_cast<float>(count);
#pragma unroll
      for (int i = 0; i < kRun; ++i) square += i < own ? (y[b][i] - mean) * (y[b][i] - mean) : 0.f;
      square = sum_over_warp(square);
      if (work_.lane == b) merge(count, mean, square);
    });
    count_ += count;
  }

  __device__ void write() const {
    const CudaBranchNormsParams& p = work_.p;
    if (blockIdx.x % ceil_div(p.channels, kChannels) == 0 && threadIdx.x == 0) p.partial_counts[work_.part] = count_;
    if (!work_.has_channel || work_.lane >= Branches<kList>::kCount) return;
    const int64_t at = (work_.part * p.branches + work_.lane) * p.channels + work_.c;
    static_cast<float*>(p.partial_means)[at] = mean_;
    static_cast<float*>(p.partial_squares)[at] = square_;
  }

 private:
  /// Chan, Golub and LeVeque: statistics of two sets from those of each.
  __device__ void merge(int count, float mean, float square) {
    const float share = static_cast<float>(count) / static_cast<float>(count_ + count), distance = mean - mean_;
    mean_ += distance * share;
    square_ += square + distance * distance * share * static_cast<float>(count_);
  }

  const Work& work_;
  int64_t count_ = 0;
  float mean_ = 0.f, square_ = 0.f;
};

/// Lane b has the sum of products of branch b over the block's tiles so far, and the lane after them that of
/// grad_output.
template <int kList>
class Products {
 public:
  __device__ explicit Products(const Work& work) : work_(work) {}

  __device__ void add(const Tile& tile, const Outputs<kList>& y, float* shared) {
    float grad[kRun];
    stage_grad(work_, tile, shared, grad);
    for_each_branch<kList>([&](auto branch) {
      constexpr int b = decltype(branch)::kIndex;
      const float mean = work_.number_of(work_.p.mean, b);
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kRun; ++i) sum += grad[i] * (y[b][i] - mean);
      add_to_lane(b, sum);
    });
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kRun; ++i) sum += grad[i];
    add_to_lane(Branches<kList>::kCount, sum);
  }

  __device__ void write() const {
    const CudaBranchNormsParams& p = work_.p;
    if (!work_.has_channel || work_.lane > Branches<kList>::kCount) return;
    static_cast<float*>(p.partial_products)[(work_.part * (p.branches + 1) + work_.lane) * p.channels + work_.c] = sum_;
  }

  /// A thread's run of grad_output, which is 0 outside of the map.
  __device__ static void stage_grad(const Work& work, const Tile& tile, float* shared, float (&grad)[kRun]) {
    const Planes& planes = work.tiling.without;
    __syncthreads();  // the input is not needed any more
    work.stage_tile(work.p.grad_output, 0, tile, 0, 0, planes, shared);
    __syncthreads();
    read_vectors(work.place_in(shared, planes), grad);
  }

 private:
  __device__ void add_to_lane(int lane, float own) {
    const float sum = sum_over_warp(own);
    if (work_.lane == lane) sum_ += sum;
  }

  const Work& work_;
  float sum_ = 0.f;
};

/// Writes the gradients of the branches' outputs.
template <int kList>
class Gradients {
 public:
  __device__ explicit Gradients(const Work& work) : work_(work) {}

  __device__ void add(const Tile& tile, const Outputs<kList>& y, float* shared) {
    const CudaBranchNormsParams& p = work_.p;
    const Planes& planes = work_.tiling.without;
    float grad[kRun];
    Products<kList>::stage_grad(work_, tile, shared, grad);
    const float grad_mean = work_.number_of(p.grad_mean, 0);
    for_each_branch<kList>([&](auto branch) {
      constexpr int b = decltype(branch)::kIndex;
      const float mean = work_.number_of(p.mean, b), variance = work_.number_of(p.variance, b),
                  product = work_.number_of(p.product_mean, b), norm_weight = work_.number_of(p.norm_weights[b], 0);
      const float spread = variance + static_cast<float>(p.eps), scale = norm_weight / sqrt(spread),
                  slope = product / spread;
      float out[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i) out[i] = scale * (grad[i] - grad_mean - slope * (y[b][i] - mean));
      // Two places in turn: while the threads write one, a slower one may still read the other.
      float* const staged = shared + (1 + b % 2) * kChannels * planes.stride;
      write_vectors(out, work_.place_in(staged, planes));
      __syncthreads();
      work_.unstage_tile(staged, planes, tile, p.grad_branches, b);
    });
  }

  __device__ void write() const {}

 private:
  const Work& work_;
};

/// Runs of a thread in outputs_kernel, and where the taps lie in its shared memory, in numbers: behind the planes of
/// the input with its halo, in whose place three without it lie later.
constexpr int kOutputsDepth = 1;
OVERLOCK_MM_HOST_DEVICE inline int outputs_planes(const Tiling& tiling) {
  const int with_halo = tiling.with_halo.stride, without = 3 * tiling.without.stride;
  return kChannels * (with_halo < without ? without : with_halo);
}

template <int kList, template <int> class Use>
__global__ void __launch_bounds__(kThreads, 2) outputs_kernel(const TiledParams params) {
  using List = Branches<kList>;
  const CudaBranchNormsParams& p = params.branches;
  const Tiling& tiling = params.tiling;
  OVERLOCK_MM_SHARED(float, shared);
  const Work work(params);
  float* const weights = shared + outputs_planes(tiling);
  stage_weights<kList, false>(params, work.first_channel, weights);
  Use<kList> use(work);
  for (int64_t index = work.part; index < tiling.count; index += p.parts) {
    const Tile tile(p, tiling, index);
    __syncthreads();  // what is left of the last tile is not needed any more
    work.stage_tile(p.input, 0, tile, List::kReach, List::kReach, tiling.with_halo, shared);
    __syncthreads();
    float y[List::kCount][kRun];
    convolve<kList>(work.place_in(shared, tiling.with_halo), tiling.with_halo, weights + work.channel * List::kTaps, y);
    use.add(tile, y, shared);
  }
  use.write();
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradients of the input and of the weights

/// Runs of a thread in inputs_kernel. Its shared memory has the planes of a branch's gradient with its halo, in whose
/// place the input's and its gradient's lie before and after, then flipped kernels, then sums for their gradients.
constexpr int kInputsDepth = 2;
OVERLOCK_MM_HOST_DEVICE inline int inputs_planes(const Tiling& tiling) { return kChannels * tiling.with_halo.stride; }

/// Adds sums over the warp of `numbers` to a line of a kernel.
template <int kSize>
__device__ __forceinline__ void add_sums_over_warp(const float (&numbers)[kSize], float* line) {
  constexpr int kPower = kSize >= 16 ? 16 : kSize >= 8 ? 8 : kSize >= 4 ? 4 : 2;
  // 2^n + 1 are 2^n and one more: a power of 2 above them would take more shuffles.
  constexpr int kTogether = kSize == kPower ? kPower : kSize == kPower + 1 && kSize > 5 ? kPower : 2 * kPower;
  const int lane = threadIdx.x % kWarp;
  float together[kTogether];
#pragma unroll
  for (int i = 0; i < kTogether; ++i) together[i] = i < kSize ? numbers[i < kSize ? i : 0] : 0.f;
  const float sum = sum_over_warp(sums_over_lanes(together), kTogether);
  if (lane < kTogether && lane < kSize) line[lane] += sum;
  if constexpr (kSize > kTogether) {
    const float last = sum_over_warp(numbers[kSize - 1]);
    if (lane == 0) line[kSize - 1] += last;
  }
}

/// Branch b's part of grad_input, and of its weights' gradients, from its gradient in shared memory. The gradient of
/// the input is a convolution with the kernel turned round, and a tap's gradient the sum of products of the input with
/// what that tap is multiplied with: both have the same window.
template <typename Own, int kWindow>
__device__ __forceinline__ void add_branch(const float* window, const Tiling& tiling, const float* weights,
                                           const float (&input)[kInputsDepth][kRun],
                                           float (&grad_input)[kInputsDepth][kRun], float* sums) {
  const int pitch = tiling.with_halo.pitch;
  constexpr int kSize = Own::kSize, kMargin = Own::kMargin, kDilation = Own::kDilation;
  window += kMargin * pitch;
  weights += Own::kFirst;
  sums += Own::kFirst;
#pragma unroll 1
  for (int line = 0; line < kSize; ++line) {
    float taps[kSize], products[kSize];
    read_vectors(weights, taps);
#pragma unroll
    for (int row = 0; row < kInputsDepth; ++row) {
      float grad[kWindow];
      read_window<Own>(window + row * tiling.rows_of_warp * pitch, grad);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        if (row == 0) products[j] = 0.f;
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const float number = grad[kMargin + j * kDilation + i];
          grad_input[row][i] += taps[j] * number;
          products[j] += input[row][i] * number;
        }
      }
    }
    add_sums_over_warp(products, sums);
    window += kDilation * pitch;
    weights += Own::kPitch;
    sums += Own::kPitch;
  }
}

template <int kList>
__global__ void __launch_bounds__(kThreads, 2) inputs_kernel(const TiledParams params) {
  using List = Branches<kList>;
  const CudaBranchNormsParams& p = params.branches;
  const Tiling& tiling = params.tiling;
  const Planes &with_halo = tiling.with_halo, &without = tiling.without;
  OVERLOCK_MM_SHARED(float, shared);
  const Work work(params);
  float* const weights = shared + inputs_planes(tiling);
  float* const sums = weights + kChannels * List::kTaps;
  const int own = work.channel * List::kTaps;
  stage_weights<kList, true>(params, work.first_channel, weights);
  for (int i = work.lane; i < List::kTaps; i += kWarp) sums[own + i] = 0.f;

  for (int64_t index = work.part; index < tiling.count; index += p.weight_parts) {
    const Tile tile(p, tiling, index);
    float input[kInputsDepth][kRun], grad_input[kInputsDepth][kRun];
    __syncthreads();  // what is left of the last tile is not needed any more
    work.stage_tile(p.input, 0, tile, 0, 0, without, shared);
    __syncthreads();
#pragma unroll
    for (int row = 0; row < kInputsDepth; ++row) {
      read_vectors(work.place_in(shared, without) + row * tiling.rows_of_warp * without.pitch, input[row]);
#pragma unroll
      for (int i = 0; i < kRun; ++i) grad_input[row][i] = 0.f;
    }
    for_each_branch<kList>([&](auto branch) {
      using Own = decltype(branch);
      __syncthreads();
      work.stage_tile(p.grad_branches, Own::kIndex, tile, Own::kReach, List::kReach, with_halo, shared);
      __syncthreads();
      add_branch<Own, List::kWindow>(work.place_in(shared, with_halo), tiling, weights + own, input, grad_input,
                                     sums + own);
    });
    __syncthreads();
#pragma unroll
    for (int row = 0; row < kInputsDepth; ++row)
      write_vectors(grad_input[row], work.place_in(shared, without) + row * tiling.rows_of_warp * without.pitch);
    __syncthreads();
    work.unstage_tile(shared, without, tile, p.grad_input, 0);
  }
  __syncthreads();
  float* const partial = static_cast<float*>(p.partial_grad_weights) + work.part * p.channels * p.taps();
  for_each_branch<kList>([&](auto branch) {
    using Own = decltype(branch);
    constexpr int kSize = Own::kSize, kTaps = Own::kTaps;
    for (int i = work.lane; work.has_channel && i < kTaps; i += kWarp) {
      const int tap = kTaps - 1 - i;
      partial[p.channels * Own::kFirstTap + work.c * kTaps + i] =
          sums[own + Own::kFirst + tap / kSize * Own::kPitch + tap % kSize];
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Small kernels

/// A warp's number among those of all blocks of kThreads.
__device__ __forceinline__ int64_t warp_index() {
  return blockIdx.x * static_cast<int64_t>(kThreads / kWarp) + threadIdx.x / kWarp;
}

/// A warp for each branch and channel, in float64: mean and variance from those of the parts.
template <typename A>
__global__ void merge_kernel(const CudaBranchNormsParams p) {
  const int64_t size = p.branches * p.channels, at = warp_index();
  if (at >= size) return;
  const int lane = threadIdx.x % kWarp;
  const double positions = static_cast<double>(p.positions());
  double mean = 0, variance = 0;
  for (int64_t part = lane; part < p.parts; part += kWarp)
    mean += load(static_cast<const A*>(p.partial_means) + part * size + at) *
            static_cast<double>(read(p.partial_counts + part));
  mean = sum_over_warp(mean) / positions;
  for (int64_t part = lane; part < p.parts; part += kWarp) {
    const double distance = load(static_cast<const A*>(p.partial_means) + part * size + at) - mean;
    variance += load(static_cast<const A*>(p.partial_squares) + part * size + at) +
                distance * distance * static_cast<double>(read(p.partial_counts + part));
  }
  variance = sum_over_warp(variance) / positions;
  if (lane != 0) return;
  static_cast<A*>(p.mean)[at] = static_cast<A>(mean);
  static_cast<A*>(p.variance)[at] = static_cast<A>(variance);
}

/// A block for each channel, in float64: the one kernel and the bias that the branches are, given their statistics.
template <typename A>
__global__ void fold_kernel(const CudaBranchNormsParams p) {
  OVERLOCK_MM_SHARED(double, scale);
  const int64_t c = blockIdx.x;
  if (const int b = threadIdx.x; b < p.branches) {
    scale[b] = load(static_cast<const A*>(p.norm_weights[b]) + c) /
               sqrt(load(static_cast<const A*>(p.variance) + b * p.channels + c) + p.eps);
  }
  __syncthreads();
  const int64_t side = p.kernel_size[0], reach = side / 2;
  for (int64_t i = threadIdx.x; i < side * side; i += kThreads) {
    double sum = 0;
    for (int b = 0; b < p.branches; ++b) {
      const int64_t k = p.kernel_size[b], d = p.dilation[b], y = i / side - reach + p.reach(b),
                    x = i % side - reach + p.reach(b);
      if (y >= 0 && x >= 0 && y % d == 0 && x % d == 0 && y / d < k && x / d < k)
        sum += scale[b] * load(static_cast<const A*>(p.weights[b]) + (c * k + y / d) * k + x / d);
    }
    static_cast<A*>(p.kernel)[c * side * side + i] = static_cast<A>(sum);
  }
  if (threadIdx.x != 0) return;
  double bias = 0;
  for (int b = 0; b < p.branches; ++b) {
    bias += load(static_cast<const A*>(p.norm_biases[b]) + c) -
            load(static_cast<const A*>(p.mean) + b * p.channels + c) * scale[b];
  }
  static_cast<A*>(p.bias)[c] = static_cast<A>(bias);
}

/// A warp for each branch and channel, and for each channel of the sum of grad_output, in float64.
template <typename A>
__global__ void finish_products_kernel(const CudaBranchNormsParams p) {
  const int64_t size = (p.branches + 1) * p.channels, at = warp_index();
  if (at >= size) return;
  const int lane = threadIdx.x % kWarp;
  double sum = 0;
  for (int64_t part = lane; part < p.parts; part += kWarp)
    sum += load(static_cast<const A*>(p.partial_products) + part * size + at);
  sum = sum_over_warp(sum);
  if (lane != 0) return;
  const int64_t channel = at - p.branches * p.channels;  // of the sum of grad_output
  A* const to = channel < 0 ? static_cast<A*>(p.products) + at : static_cast<A*>(p.grad_sum) + channel;
  *to = static_cast<A>(sum / p.divisor);
  if (!p.grad_norm_weights) return;
  if (channel < 0) {
    static_cast<A*>(p.grad_norm_weights)[at] =
        static_cast<A>(sum / sqrt(load(static_cast<const A*>(p.variance) + at) + p.eps));
  } else {
    for (int b = 0; b < p.branches; ++b)
      static_cast<A*>(p.grad_norm_biases)[b * p.channels + channel] = static_cast<A>(sum);
  }
}

}  // namespace branch_norms_kernels
}  // namespace overlock_mm
