// The general variant of the branch norm kernels: any branches, float64 too, and no tiles, so that kernels of any size
// run with little shared memory. It reads global memory through the caches, a number for each multiply-add.
//
// A thread block has 8 channels of 32 positions, and goes on to others of its part. Sums are over a thread's positions,
// then over the 32 threads of a channel, then (branch_norms_kernels.cuh) over the parts.
#pragma once

#include "branch_norms_tiles.cuh"

namespace overlock_mm {
namespace branch_norms_kernels {

constexpr int kSlots = kThreads / kChannels;

/// Shared memory, in numbers: one for each thread, and with Statistics two.
constexpr int kGeneralNumbers = 2 * kThreads;

struct GeneralWork {
  const CudaBranchNormsParams& p;
  int64_t c, part;
  int slot;
  bool has_channel;

  __device__ explicit GeneralWork(const CudaBranchNormsParams& p) : p(p), slot(threadIdx.x / kChannels) {
    const int64_t channel_blocks = ceil_div(p.channels, kChannels);
    c = blockIdx.x % channel_blocks * kChannels + threadIdx.x % kChannels;
    part = blockIdx.x / channel_blocks;
    has_channel = c < p.channels;
  }

  /// body(image, y, x) for this thread's positions of `parts` in all.
  template <typename Body>
  __device__ void for_each_position(int64_t part, int64_t parts, const Body& body) const {
    if (!has_channel) return;
    for (int64_t i = part * kSlots + slot; i < p.positions(); i += parts * kSlots)
      body(i / (p.height * p.width), i / p.width % p.height, i % p.width);
  }

  /// How many these are.
  __device__ int64_t count(int slot) const {
    const int64_t first = part * kSlots + slot, step = p.parts * kSlots;
    return first < p.positions() ? (p.positions() - first - 1) / step + 1 : 0;
  }

  __device__ int64_t offset(int64_t image, int64_t y, int64_t x) const {
    return ((image * p.height + y) * p.width + x) * p.channels + c;
  }

  template <typename T, typename A>
  __device__ A read(const T* map, int64_t image, int64_t y, int64_t x) const {
    const bool is_inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
    return is_inside ? load(map + offset(image, y, x)) : A(0);
  }

  /// The output of branch b for a map, or with direction -1 the gradient of its input.
  template <typename A, typename T>
  __device__ A convolve(const T* map, int b, int direction, int64_t image, int64_t y, int64_t x) const {
    const int64_t k = p.kernel_size[b], step = direction * p.dilation[b];
    const A* weight = static_cast<const A*>(p.weights[b]) + c * k * k;
    A sum(0);
    for (int64_t i = -k / 2; i <= k / 2; ++i) {
      for (int64_t j = -k / 2; j <= k / 2; ++j, ++weight)
        sum += load(weight) * read<T, A>(map, image, y + i * step, x + j * step);
    }
    return sum;
  }

  template <typename A>
  __device__ A number_of(const void* numbers, int b) const {
    return has_channel ? load(static_cast<const A*>(numbers) + b * p.channels + c) : A(0);
  }

  /// The channel's sum over the 32 threads, for the thread that writes it.
  template <typename A>
  __device__ A sum(A own, A* shared) const {
    __syncthreads();
    shared[threadIdx.x] = own;
    __syncthreads();
    A sum(0);
    for (int i = 0; writes() && i < kSlots; ++i) sum += shared[threadIdx.x + i * kChannels];
    return sum;
  }
  __device__ bool writes() const { return slot == 0 && has_channel; }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) general_statistics_kernel(const CudaBranchNormsParams p) {
  using A = typename Accumulator<T>::type;
  OVERLOCK_MM_SHARED(A, shared);
  const GeneralWork work(p);
  A* const means = shared;
  A* const squares = shared + kThreads;
  int64_t count_of_part = 0;
  for (int i = 0; i < kSlots; ++i) count_of_part += work.count(i);
  if (blockIdx.x % ceil_div(p.channels, kChannels) == 0 && threadIdx.x == 0)
    p.partial_counts[work.part] = count_of_part;
  for (int b = 0; b < p.branches; ++b) {
    A mean(0), square(0);
    int64_t count = 0;
    work.for_each_position(work.part, p.parts, [&](int64_t image, int64_t y, int64_t x) {
      const A distance = work.convolve<A>(static_cast<const T*>(p.input), b, 1, image, y, x) - mean;
      mean += distance / A(++count);
      square += distance * distance * (A(count - 1) / A(count));
    });
    __syncthreads();
    means[threadIdx.x] = mean;
    squares[threadIdx.x] = square;
    __syncthreads();
    if (!work.writes()) continue;
    for (int i = 1; i < kSlots; ++i) {
      const int64_t other = work.count(i);
      if (other == 0) continue;
      const int at = threadIdx.x + i * kChannels;
      const A share = A(other) / A(count + other), distance = means[at] - mean;
      mean += distance * share;
      square += squares[at] + distance * distance * share * A(count);
      count += other;
    }
    const int64_t at = (work.part * p.branches + b) * p.channels + work.c;
    static_cast<A*>(p.partial_means)[at] = mean;
    static_cast<A*>(p.partial_squares)[at] = square;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) general_products_kernel(const CudaBranchNormsParams p) {
  using A = typename Accumulator<T>::type;
  OVERLOCK_MM_SHARED(A, shared);
  const GeneralWork work(p);
  const T *const input = static_cast<const T*>(p.input), *const grad_output = static_cast<const T*>(p.grad_output);
  for (int b = 0; b <= p.branches; ++b) {
    A own(0);
    const A mean = b < p.branches ? work.number_of<A>(p.mean, b) : A(0);
    work.for_each_position(work.part, p.parts, [&](int64_t image, int64_t y, int64_t x) {
      const A factor = b < p.branches ? work.convolve<A>(input, b, 1, image, y, x) - mean : A(1);
      own += load(grad_output + work.offset(image, y, x)) * factor;
    });
    const A sum = work.sum(own, shared);
    if (work.writes())
      static_cast<A*>(p.partial_products)[(work.part * (p.branches + 1) + b) * p.channels + work.c] = sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) general_gradients_kernel(const CudaBranchNormsParams p) {
  using A = typename Accumulator<T>::type;
  const GeneralWork work(p);
  const A grad_mean = work.number_of<A>(p.grad_mean, 0);
  for (int b = 0; b < p.branches; ++b) {
    const A mean = work.number_of<A>(p.mean, b), product = work.number_of<A>(p.product_mean, b),
            spread = work.number_of<A>(p.variance, b) + A(p.eps), norm_weight = work.number_of<A>(p.norm_weights[b], 0),
            scale = norm_weight / sqrt(spread), slope = product / spread;
    T* const to = static_cast<T*>(p.grad_branches) + b * p.batch * p.image_size();
    work.for_each_position(work.part, p.parts, [&](int64_t image, int64_t y, int64_t x) {
      const int64_t at = work.offset(image, y, x);
      const A distance = work.convolve<A>(static_cast<const T*>(p.input), b, 1, image, y, x) - mean;
      store(to + at, scale * (load(static_cast<const T*>(p.grad_output) + at) - grad_mean - slope * distance));
    });
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) general_inputs_kernel(const CudaBranchNormsParams p) {
  using A = typename Accumulator<T>::type;
  const GeneralWork work(p);
  work.for_each_position(work.part, p.parts, [&](int64_t image, int64_t y, int64_t x) {
    A sum(0);
    for (int b = 0; b < p.branches; ++b) {
      sum +=
          work.convolve<A>(static_cast<const T*>(p.grad_branches) + b * p.batch * p.image_size(), b, -1, image, y, x);
    }
    store(static_cast<T*>(p.grad_input) + work.offset(image, y, x), sum);
  });
}

/// A block for 8 channels and a tap, and all positions.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) general_weights_kernel(const CudaBranchNormsParams p) {
  using A = typename Accumulator<T>::type;
  OVERLOCK_MM_SHARED(A, shared);
  const GeneralWork work(p);
  const int64_t tap = work.part;  // of all branches
  int b = 0;
  while (b + 1 < p.branches && p.first_tap(b + 1) <= tap) ++b;
  const int64_t k = p.kernel_size[b], own_tap = tap - p.first_tap(b), down = (own_tap / k - k / 2) * p.dilation[b],
                right = (own_tap % k - k / 2) * p.dilation[b];
  const T* const grad = static_cast<const T*>(p.grad_branches) + b * p.batch * p.image_size();
  A own(0);
  work.for_each_position(0, 1, [&](int64_t image, int64_t y, int64_t x) {
    own += load(grad + work.offset(image, y, x)) *
           work.read<T, A>(static_cast<const T*>(p.input), image, y + down, x + right);
  });
  const A sum = work.sum(own, shared);
  if (work.writes())
    static_cast<A*>(p.partial_grad_weights)[p.channels * p.first_tap(b) + work.c * k * k + own_tap] = sum;
}

}  // namespace branch_norms_kernels
}  // namespace overlock_mm
