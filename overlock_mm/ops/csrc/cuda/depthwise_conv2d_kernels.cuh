// The CUDA kernels of depth-wise convolutions of stride 1. depthwise_conv2d_launch.h has the shapes.
//
// Three variants:
//
// The staged one, for the kernel sizes of the network without dilation, brings a tile and its halo to shared memory, as
// planes (staging.cuh). In the forward a thread has kRun neighbouring outputs of a line. For a row of the kernel it
// reads kRun + k - 1 numbers and the row's k weights, as vectors, and does kRun * k multiply-adds: for 17 x 17, 272 of
// them for 13 vectors. In the gradient of the kernel a thread has the k sums of a row of the kernel, and walks over a
// tile.
//
// The walk (walk.cuh) makes the gradients of 3 x 3 kernels without dilation, of all types. Three lines of grad_output
// give both: with the taps the gradient of the input, and with the input the gradients of the taps.
//
// The direct one reads global memory through the caches. It takes everything else: any odd kernel, dilation, float64.
#pragma once

#include <type_traits>

#include "depthwise_conv2d_launch.h"
#include "staging.cuh"
#include "walk.cuh"

namespace overlock_mm {
namespace depthwise_kernels {

constexpr int kMaxThreads = 256;
/// Blocks that a multiprocessor must have room for. Without it, ptxas spills registers of some to have more.
constexpr int kLeastBlocks = 2;

/// Neighbouring outputs of a thread. Where k is small the memory is what takes time: less of a tile is halo then.
OVERLOCK_MM_HOST_DEVICE constexpr int run_of(int kernel_size) { return kernel_size < 9 ? 8 : 16; }
OVERLOCK_MM_HOST_DEVICE constexpr int whole_vectors(int numbers) { return (numbers + 3) / 4 * 4; }

/// How the staged kernels divide a map.
struct Tiling {
  int rows, runs;                    ///< of a tile: lines, and runs in a line
  int vertical, horizontal, blocks;  ///< tiles of an image; blocks of channels
  int threads;
};

/// Parameters of the staged kernels.
struct StagedParams {
  DepthwiseParams map;
  Tiling tiling;
};

struct Tile {
  int64_t image;
  int first_row, first_column;

  __device__ Tile(const Tiling& tiling, int run, int64_t index)
      : image(index / (tiling.vertical * tiling.horizontal)),
        first_row(static_cast<int>(index / tiling.horizontal % tiling.vertical) * tiling.rows),
        first_column(static_cast<int>(index % tiling.horizontal) * tiling.runs * run) {}
};

/// The thread's run: its channel in the block, its line and where it begins in the tile. Neighbouring threads have
/// neighbouring lines.
struct Run {
  int channel, row, column;

  __device__ Run(const Tiling& tiling, int run, int index)
      : channel(index / (tiling.rows * tiling.runs)),
        row(index % tiling.rows),
        column(index / tiling.rows % tiling.runs * run) {}
};

template <int kSize, typename A>
__device__ __forceinline__ void read_vectors(const A* shared, A (&out)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; i += 4) {
    const Vector<A> vector = vector_at(shared + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) out[i + j] = vector.at[j];
  }
}

/// Weights of the block's channels: [channel][row], whole vectors long.
template <int kKernel, typename T, typename A>
__device__ __forceinline__ void stage_weights(const DepthwiseParams& p, int64_t first_channel, A* shared) {
  constexpr int kTaps = kKernel * kKernel, kPitch = whole_vectors(kKernel);
  const A* const weight = static_cast<const A*>(p.weight) + first_channel * kTaps;
  const int channels = static_cast<int>(min(p.channels - first_channel, static_cast<int64_t>(kBlockChannels<T>)));
  for (int i = threadIdx.x; i < channels * kTaps; i += blockDim.x) {
    const int channel = i / kTaps, tap = i % kTaps, from = p.flipped ? kTaps - 1 - tap : tap;
    shared[(channel * kKernel + tap / kKernel) * kPitch + tap % kKernel] = load(weight + channel * kTaps + from);
  }
}

/// A block for each tile and block of channels, the latter slowest.
template <typename T, int kKernel>
__global__ void __launch_bounds__(kMaxThreads, kLeastBlocks) depthwise_forward_kernel(StagedParams params) {
  using A = typename Accumulator<T>::type;
  constexpr int kReach = kKernel / 2, kRun = run_of(kKernel), kPitch = whole_vectors(kKernel);
  constexpr int kSpan = whole_vectors(kRun + kKernel - 1);
  const DepthwiseParams& p = params.map;
  const Tiling& tiling = params.tiling;
  const int height = static_cast<int>(p.height), width = static_cast<int>(p.width), columns = tiling.runs * kRun;
  const int64_t tiles = p.batch * tiling.vertical * tiling.horizontal;
  const int64_t first_channel = blockIdx.x / tiles * kBlockChannels<T>;
  const Tile tile(tiling, kRun, blockIdx.x % tiles);
  const Planes planes(tiling.rows + 2 * kReach, columns + 2 * kReach);

  OVERLOCK_MM_SHARED(A, weights);
  A* const shared = weights + kBlockChannels<T> * kKernel * kPitch;
  stage_weights<kKernel, T>(p, first_channel, weights);
  const ImageChannels<const T> input(static_cast<const T*>(p.input), tile.image, p.channels, height, width,
                                     first_channel);
  const Region region{tile.first_row - kReach, tile.first_column - kReach, tiling.rows + 2 * kReach,
                      columns + 2 * kReach};
  stage<T>(input, region, planes, shared);
  __syncthreads();

  const Run run(tiling, kRun, threadIdx.x);
  const bool works = run.channel < kBlockChannels<T>;
  A sums[kRun];
  if (works) {
    const int64_t channel = first_channel + run.channel;
    const A bias = p.bias && channel < p.channels ? load(static_cast<const A*>(p.bias) + channel) : A(0);
#pragma unroll
    for (int i = 0; i < kRun; ++i) sums[i] = bias;
    const A* line = shared + run.channel * planes.stride + run.row * planes.pitch + run.column;
    const A* taps = weights + run.channel * kKernel * kPitch;
#pragma unroll 1
    for (int ky = 0; ky < kKernel; ++ky) {
      A numbers[kSpan], weight[kPitch];
      read_vectors(line, numbers);
      read_vectors(taps, weight);
#pragma unroll
      for (int kx = 0; kx < kKernel; ++kx) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) sums[i] += weight[kx] * numbers[i + kx];
      }
      line += planes.pitch;
      taps += kPitch;
    }
    if (p.residual) {
      const A* const middle = shared + run.channel * planes.stride + (run.row + kReach) * planes.pitch + run.column;
#pragma unroll
      for (int i = 0; i < kRun; ++i) sums[i] += middle[i + kReach];
    }
  }
  __syncthreads();  // the outputs take the place of the inputs
  const Planes outputs(tiling.rows, columns);
  if (works) {
    A* const to = shared + run.channel * outputs.stride + run.row * outputs.pitch + run.column;
#pragma unroll
    for (int i = 0; i < kRun; i += 4) {
      Vector<A> vector;
#pragma unroll
      for (int j = 0; j < 4; ++j) vector.at[j] = sums[i + j];
      *reinterpret_cast<Vector<A>*>(to + i) = vector;
    }
  }
  __syncthreads();
  unstage<T>(shared, outputs, Region{tile.first_row, tile.first_column, tiling.rows, columns},
             ImageChannels<T>(static_cast<T*>(p.output), tile.image, p.channels, height, width, first_channel));
}

/// Adds up the gradients of taps and bias in shared memory, [slice][channel][tap] with the bias last, in the order of
/// the slices: a block's partial sum.
template <int kChannels, int kTaps, typename A>
__device__ __forceinline__ void write_partial_sums(const A* shared, int slices, const DepthwiseParams& p,
                                                   int64_t partial, int64_t first_channel) {
  constexpr int kSums = kChannels * (kTaps + 1);
  __syncthreads();
  A* const out = static_cast<A*>(p.partial_sums) + partial * p.channels * (kTaps + 1);
  for (int i = threadIdx.x; i < kSums; i += blockDim.x) {
    const int tap = i % (kTaps + 1);
    const int64_t at = first_channel + i / (kTaps + 1);
    if (at >= p.channels) continue;
    A sum = shared[i];
    for (int slice = 1; slice < slices; ++slice) sum += shared[slice * kSums + i];
    out[tap < kTaps ? at * kTaps + tap : p.channels * kTaps + at] = sum;
  }
}

/// Threads for a channel and a row of the kernel: they share the runs of a tile.
template <typename T, int kKernel>
constexpr int kSlices = kMaxThreads / (kBlockChannels<T> * kKernel) > 0 ? kMaxThreads / (kBlockChannels<T> * kKernel)
                                                                        : 1;
template <typename T, int kKernel>
constexpr int kBackwardThreads = (kSlices<T, kKernel> * kBlockChannels<T> * kKernel + kWarp - 1) / kWarp * kWarp;

/// A block for each partial sum and block of channels, the latter slowest. Partial sum i has the tiles i, i + partials,
/// ...
template <typename T, int kKernel>
__global__ void __launch_bounds__(kBackwardThreads<T, kKernel>, kLeastBlocks)
    depthwise_backward_weight_kernel(StagedParams params) {
  using A = typename Accumulator<T>::type;
  constexpr int kReach = kKernel / 2, kRun = run_of(kKernel), kChannels = kBlockChannels<T>;
  constexpr int kSpan = whole_vectors(kRun + kKernel - 1), kSliceCount = kSlices<T, kKernel>;
  const DepthwiseParams& p = params.map;
  const Tiling& tiling = params.tiling;
  const int height = static_cast<int>(p.height), width = static_cast<int>(p.width), columns = tiling.runs * kRun;
  const int64_t tiles = p.batch * tiling.vertical * tiling.horizontal;
  const int64_t partial = blockIdx.x % p.partials, first_channel = blockIdx.x / p.partials * kChannels;
  const Planes planes(tiling.rows + 2 * kReach, columns + 2 * kReach), grad_planes(tiling.rows, columns);
  OVERLOCK_MM_SHARED(A, shared);
  A* const grads = shared + kChannels * planes.stride;

  const int ky = threadIdx.x % kKernel, channel = threadIdx.x / kKernel % kChannels,
            slice = threadIdx.x / (kKernel * kChannels);
  A sums[kKernel] = {}, bias_sum = 0;
  for (int64_t index = partial; index < tiles; index += p.partials) {
    const Tile tile(tiling, kRun, index);
    const ImageChannels<const T> input(static_cast<const T*>(p.input), tile.image, p.channels, height, width,
                                       first_channel),
        grad_output(static_cast<const T*>(p.grad_output), tile.image, p.channels, height, width, first_channel);
    __syncthreads();  // the last tile is done with
    stage<T>(
        input,
        Region{tile.first_row - kReach, tile.first_column - kReach, tiling.rows + 2 * kReach, columns + 2 * kReach},
        planes, shared);
    stage<T>(grad_output, Region{tile.first_row, tile.first_column, tiling.rows, columns}, grad_planes, grads);
    __syncthreads();
    if (slice >= kSliceCount) continue;
    // The slice's runs, without a division for each.
    const int rows_on = kSliceCount / tiling.runs, columns_on = kSliceCount % tiling.runs * kRun;
    int row = slice / tiling.runs, column = slice % tiling.runs * kRun;
    while (row < tiling.rows) {
      A numbers[kSpan], grad[kRun];
      read_vectors(shared + channel * planes.stride + (row + ky) * planes.pitch + column, numbers);
      read_vectors(grads + channel * grad_planes.stride + row * grad_planes.pitch + column, grad);
#pragma unroll
      for (int kx = 0; kx < kKernel; ++kx) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) sums[kx] += grad[i] * numbers[i + kx];
      }
      row += rows_on;
      column += columns_on;
      if (column >= columns) {
        column -= columns;
        ++row;
      }
    }
    if (p.grad_bias && ky == 0) {
      for (int i = slice; i < tiling.rows * columns; i += kSliceCount) {
        bias_sum += grads[channel * grad_planes.stride + i / columns * grad_planes.pitch + i % columns];
      }
    }
  }

  constexpr int kTaps = kKernel * kKernel;
  __syncthreads();
  if (slice < kSliceCount) {
    A* const to = shared + (slice * kChannels + channel) * (kTaps + 1);
#pragma unroll
    for (int kx = 0; kx < kKernel; ++kx) to[ky * kKernel + kx] = sums[kx];
    if (ky == 0) to[kTaps] = bias_sum;
  }
  write_partial_sums<kChannels, kTaps>(shared, kSliceCount, p, partial, first_channel);
}

// ---------------------------------------------------------------------------------------------------------------------
// Walk

/// Parameters of the walk.
struct WalkParams : WalkedMap {
  DepthwiseParams convolution;
};

/// The gradients of the parameters, and of the input if it is wanted. A tap links a position of the input and one of
/// the output: the product of this tap and this output belongs to the gradient of this input, the product of both to
/// that of the tap.
template <typename T>
__global__ void __launch_bounds__(walks::kMaxWarps* kWarp, walks::kSmall<T> ? 4 : 2)
    depthwise_walk_kernel(const WalkParams params) {
  using namespace walks;
  using A = typename Accumulator<T>::type;
  const DepthwiseParams& p = params.convolution;
  OVERLOCK_MM_SHARED(A, shared);
  const walks::Tile tile(params);
  walks::stage_weights(params, p.weight, shared);
  const int lane = threadIdx.x % kWarp;
  A weight[kTaps], sums[kTaps] = {}, bias_sum = 0;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) weight[tap] = shared[lane * kTaps + tap];
  if (p.residual) weight[kTaps / 2] += 1;
  if (tile.holds) {
    const Columns<1> columns(params, tile);
    const auto read = [&](int row, int, A(&line)[kRun + 2]) {
      columns.load_line(static_cast<const T*>(p.grad_output), row, line);
    };
    const auto body = [&](int row, int, const auto& above, const auto& line, const auto& below) {
      A numbers[kRun];
      columns.load_line(static_cast<const T*>(p.input), row, numbers);
      const unsigned written = p.grad_input ? columns.inside_of(row, 0) : 0;
      T* const to = columns.line_of(static_cast<T*>(p.grad_input), row, 0);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        A grad = 0;
#pragma unroll
        for (int tap = 0; tap < 3; ++tap) {
          const int column = i + 2 - tap;  // the output lies opposite to the tap
          grad += weight[tap] * below[column];
          grad += weight[3 + tap] * line[column];
          grad += weight[6 + tap] * above[column];
          sums[tap] += numbers[i] * below[column];
          sums[3 + tap] += numbers[i] * line[column];
          sums[6 + tap] += numbers[i] * above[column];
        }
        bias_sum += line[i + 1];
        if (written >> i & 1) store(to + i * columns.channels, grad);
      }
    };
    walk<kRun + 2, A>(tile.first_row, tile.end_row, read, body);
  }
  __syncthreads();  // the sums take the place of the weights
  A* const to = shared + threadIdx.x * (kTaps + 1);
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) to[tap] = sums[tap];
  to[kTaps] = bias_sum;
  write_partial_sums<kWarp, kTaps>(shared, static_cast<int>(params.warps), p, tile.part,
                                   (blockIdx.x - tile.part * ceil_div(params.channels, kWarp)) * kWarp);
}

// ---------------------------------------------------------------------------------------------------------------------
// Direct

/// A thread for each output.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) depthwise_direct_forward_kernel(DepthwiseParams p) {
  using A = typename Accumulator<T>::type;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= p.batch * p.height * p.width * p.channels) return;
  const int64_t channel = index % p.channels, position = index / p.channels;
  const int64_t column = position % p.width, row = position / p.width % p.height, k = p.kernel_size;
  const T* const here = static_cast<const T*>(p.input) + index;
  const A* const weight = static_cast<const A*>(p.weight) + channel * k * k;
  A sum = p.bias ? load(static_cast<const A*>(p.bias) + channel) : A(0);
  for (int64_t ky = 0; ky < k; ++ky) {
    const int64_t down = (ky - k / 2) * p.dilation;
    if (row + down < 0 || row + down >= p.height) continue;
    for (int64_t kx = 0; kx < k; ++kx) {
      const int64_t right = (kx - k / 2) * p.dilation, tap = ky * k + kx;
      if (column + right < 0 || column + right >= p.width) continue;
      sum += load(weight + (p.flipped ? k * k - 1 - tap : tap)) * load(here + (down * p.width + right) * p.channels);
    }
  }
  if (p.residual) sum += load(here);
  store(static_cast<T*>(p.output) + index, sum);
}

/// A thread for each tap, or the bias, of each channel and each partial sum. Partial sum i has the lines i, i +
/// partials,
/// ... of the batch.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) depthwise_direct_backward_weight_kernel(DepthwiseParams p) {
  using A = typename Accumulator<T>::type;
  const int64_t k = p.kernel_size, taps = k * k, sums = p.channels * (taps + (p.grad_bias ? 1 : 0));
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= p.partials * sums) return;
  const int64_t partial = index / sums, channel = index % p.channels, tap = index % sums / p.channels;
  const bool is_bias = tap == taps;
  const int64_t down = is_bias ? 0 : (tap / k - k / 2) * p.dilation,
                right = is_bias ? 0 : (tap % k - k / 2) * p.dilation;
  const T *const input = static_cast<const T*>(p.input), *const grad_output = static_cast<const T*>(p.grad_output);
  A sum = 0;
  for (int64_t line = partial; line < p.batch * p.height; line += p.partials) {
    const int64_t row = line % p.height + down;
    if (row < 0 || row >= p.height) continue;
    const int64_t first = right < 0 ? -right : 0, end = right > 0 ? p.width - right : p.width;
    const T* const grads = grad_output + line * p.width * p.channels + channel;
    const T* const numbers = input + ((line + down) * p.width + right) * p.channels + channel;
    for (int64_t x = first; x < end; ++x) {
      sum += load(grads + x * p.channels) * (is_bias ? A(1) : load(numbers + x * p.channels));
    }
  }
  A* const out = static_cast<A*>(p.partial_sums) + partial * p.channels * (taps + 1);
  out[is_bias ? p.channels * taps + channel : channel * taps + tap] = sum;
}

}  // namespace depthwise_kernels
}  // namespace overlock_mm
