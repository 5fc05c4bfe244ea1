// The CUDA kernels of residual 3 x 3 depth-wise convolutions with a response norm behind them, and a GELU before them.
//
// They are walks (walk.cuh): the lines of v are in a thread's registers, so that a number goes through the GELU once
// for a tile.
//
// The gradients take one walk too. In line y the gradient of u is made from u, which is made again. It adds to those of
// v in lines y - 1 to y + 1, of which the first is complete then.
#pragma once

#include "../residual_depthwise_norm.h"
#include "gelu.cuh"
#include "numbers.cuh"
#include "sums.cuh"
#include "walk.cuh"

namespace overlock_mm {
namespace residual_depthwise_norm_kernels {

using namespace walks;

constexpr int kSums = kTaps + 1;            // gradients of taps, and of the bias
constexpr int kDerivatives = 3 * kRun + 1;  // of a thread: odd, so that the threads of a warp use all banks

/// u in kSize positions of a line: v, of one position more at both ends, and its convolution.
template <int kSize, typename A>
__device__ __forceinline__ void convolve(const A (&above)[kSize + 2], const A (&line)[kSize + 2],
                                         const A (&below)[kSize + 2], const A (&weight)[kTaps], A bias, A (&u)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    u[i] = line[i + 1] + bias;
#pragma unroll
    for (int tap = 0; tap < 3; ++tap) {
      u[i] += weight[tap] * above[i + tap];
      u[i] += weight[3 + tap] * line[i + tap];
      u[i] += weight[6 + tap] * below[i + tap];
    }
  }
}

/// What a block writes of its sums, for 32 channels.
template <typename A>
__device__ __forceinline__ void write_sum(A number, const Tile& tile, const ResidualDepthwiseNormParams& p, void* sums,
                                          A* shared) {
  const A sum = sum_over_warps(number, shared);
  if (threadIdx.x < kWarp && tile.channel < p.channels)
    static_cast<A*>(sums)[(tile.image * p.strips + tile.strip) * p.channels + tile.channel] = sum;
}

/// Sums, and u as it is or normalised. In a backward, sums of grad_output * u and of grad_output.
template <typename T, bool kGelu, bool kBackward>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kSmall<T> ? 4 : 2)
    residual_depthwise_kernel(const ResidualDepthwiseNormParams p) {
  using A = typename Accumulator<T>::type;
  OVERLOCK_MM_SHARED(A, shared);
  const Tile tile(p);
  stage_weights(p, p.weight, shared);
  A product = 0, plain = 0;
  if (tile.holds) {
    A weight[kTaps];
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) weight[tap] = shared[threadIdx.x % kWarp * kTaps + tap];
    const A bias = p.bias ? load(static_cast<const A*>(p.bias) + tile.channel) : A(0);
    const A scale = p.scale ? load(static_cast<const A*>(p.scale) + tile.image * p.channels + tile.channel) : A(1);
    const A shift = p.shift ? load(static_cast<const A*>(p.shift) + tile.channel) : A(0);
    const Columns<1> columns(p, tile);
    const auto read = [&](int row, int, A(&line)[kRun + 2]) {
      columns.load_line(static_cast<const T*>(p.input), row, line);
#pragma unroll
      for (int i = 0; i < kRun + 2; ++i) line[i] = kGelu ? gelu(line[i]) : line[i];
    };
    const auto body = [&](int row, int, const auto& above, const auto& line, const auto& below) {
      A u[kRun], grad[kRun];
      if (kBackward) columns.load_line(static_cast<const T*>(p.grad_output), row, grad);
      convolve(above, line, below, weight, bias, u);
      const unsigned inside = columns.inside_of(row, 0), written = p.output ? inside : 0;
      T* const to = columns.line_of(static_cast<T*>(p.output), row, 0);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (kBackward) {
          product += grad[i] * u[i];
          plain += grad[i];
        } else {
          product += inside >> i & 1 ? u[i] * u[i] : A(0);
          if (written >> i & 1) store(to + i * columns.channels, u[i] * scale + shift);
        }
      }
    };
    walk<kRun + 2, A>(tile.first_row, tile.end_row, read, body);
  }
  if (p.sums) write_sum(product, tile, p, p.sums, shared);
  if (kBackward) write_sum(plain, tile, p, p.plain_sums, shared);
}

/// The gradient of the input, and sums of those of the parameters.
template <typename T>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kSmall<T> ? 3 : 1)
    residual_depthwise_gradients_kernel(const ResidualDepthwiseNormParams p) {
  using A = typename Accumulator<T>::type;
  OVERLOCK_MM_SHARED(A, shared);
  const Tile tile(p);
  stage_weights(p, p.weight, shared);
  A weight[kTaps], sums[kSums] = {};
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) weight[tap] = shared[threadIdx.x % kWarp * kTaps + tap];
  __syncthreads();  // the derivatives take the place of the weights
  if (tile.holds) {
    const A bias = p.bias ? load(static_cast<const A*>(p.bias) + tile.channel) : A(0);
    const int64_t of_image = tile.image * p.channels + tile.channel;
    const A scale = load(static_cast<const A*>(p.scale) + of_image);
    const A slope = load(static_cast<const A*>(p.slope) + of_image);
    const Columns<2> columns(p, tile);
    // The derivatives of the GELU in three lines wait in the thread's own place: [phase][position].
    A* const derivatives = shared + threadIdx.x * kDerivatives;
    const auto read = [&](int row, int phase, A(&line)[kRun + 4]) {
      columns.load_line(static_cast<const T*>(p.input), row, line);
#pragma unroll
      for (int i = 0; i < kRun + 4; ++i) {
        A derivative;
        line[i] = gelu(line[i], &derivative);
        if (i >= 2 && i < kRun + 2) derivatives[phase * kRun + i - 2] = derivative;
      }
    };
    A grad_lines[3][kRun] = {};  // of v, in the lines around `row`, by phase
    const auto body = [&](int row, int phase, const auto& above, const auto& line, const auto& below) {
      A grad_u[kRun + 2], grad[kRun + 2];
      columns.load_line(static_cast<const T*>(p.grad_output), row, grad);
      convolve(above, line, below, weight, bias, grad_u);
      const unsigned inside = columns.inside_of(row, 1);
#pragma unroll
      for (int i = 0; i < kRun + 2; ++i) grad_u[i] = inside >> i & 1 ? grad[i] * scale + grad_u[i] * slope : A(0);
      if (row >= tile.first_row && row < tile.end_row) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
#pragma unroll
          for (int tap = 0; tap < 3; ++tap) {
            sums[tap] += grad_u[i + 1] * above[i + 1 + tap];
            sums[3 + tap] += grad_u[i + 1] * line[i + 1 + tap];
            sums[6 + tap] += grad_u[i + 1] * below[i + 1 + tap];
          }
          sums[kTaps] += grad_u[i + 1];
        }
      }
      const int next = (phase + 1) % 3, last = (phase + 2) % 3;
      const unsigned written = row > tile.first_row ? columns.inside_of(row - 1, 0) : 0;
      T* const to = columns.line_of(static_cast<T*>(p.grad_input), row - 1, 0);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        grad_lines[next][i] += grad_u[i + 1];
        grad_lines[last][i] = 0;
#pragma unroll
        for (int tap = 0; tap < 3; ++tap) {
          grad_lines[phase][i] += weight[tap] * grad_u[i + 2 - tap];
          grad_lines[next][i] += weight[3 + tap] * grad_u[i + 2 - tap];
          grad_lines[last][i] += weight[6 + tap] * grad_u[i + 2 - tap];
        }
        if (written >> i & 1) store(to + i * columns.channels, grad_lines[phase][i] * derivatives[phase * kRun + i]);
      }
    };
    walk<kRun + 4, A>(tile.first_row - 1, tile.end_row + 1, read, body);
  }
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const A sum = sum_over_warps(sums[i], shared);
    if (threadIdx.x < kWarp && tile.channel < p.channels) {
      const int64_t strip = tile.image * p.strips + tile.strip;
      static_cast<A*>(p.partial_sums)[(strip * kSums + i) * p.channels + tile.channel] = sum;
    }
  }
}

/// A block for 32 channels of one of the parameters: the taps, the bias, gamma and beta.
template <typename A>
__global__ void __launch_bounds__(kMaxWarps* kWarp) parameter_gradients_kernel(const ResidualDepthwiseNormParams p) {
  OVERLOCK_MM_SHARED(A, shared);
  const int64_t blocks = ceil_div(p.channels, kWarp), channel = blockIdx.x % blocks * kWarp + threadIdx.x % kWarp;
  const int which = static_cast<int>(blockIdx.x / blocks);
  const bool of_norm = which >= kSums, holds = channel < p.channels;
  const int64_t rows = of_norm ? p.batch : p.batch * p.strips, stride = (of_norm ? 2 : kSums) * p.channels;
  const A* const parts = static_cast<const A*>(of_norm ? p.grads_of_images : p.partial_sums) +
                         (of_norm ? which - kSums : which) * p.channels + channel;
  A sum = 0;
  if (holds) {
#pragma unroll 4
    for (int64_t row = threadIdx.x / kWarp; row < rows; row += kMaxWarps) sum += load(parts + row * stride);
  }
  sum = sum_over_warps(sum, shared);
  if (threadIdx.x >= kWarp || !holds) return;
  if (which < kTaps) {
    static_cast<A*>(p.grad_weight)[channel * kTaps + which] = sum;
    return;
  }
  void* const grads = which == kTaps ? p.grad_bias : which == kSums ? p.grad_gamma : p.grad_beta;
  static_cast<A*>(grads)[channel] = sum;
}

}  // namespace residual_depthwise_norm_kernels
}  // namespace overlock_mm
