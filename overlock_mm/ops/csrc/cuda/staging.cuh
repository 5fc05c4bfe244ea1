// Between maps in global memory, where the channels of a position lie side by side, and shared memory, where those of a
// tile are planes: [channel][row][column].
//
// A block has kChannels channels, 32 bytes or more at a position, which are the sectors that global memory is read in.
// The pitch of a row is an odd number of vectors of 4, and so is the stride of a plane: 8 threads that read vectors of
// neighbouring rows, and 16 that write neighbouring columns of 2 channels 4 apart, use all banks once.
#pragma once

#include "numbers.cuh"

namespace overlock_mm {

/// Channels of a block.
template <typename T>
constexpr int kBlockChannels = sizeof(T) == 2 ? 16 : 8;

/// Where a tile of a map lies. Positions outside of the map are 0.
struct Region {
  int first_row, first_column;  ///< in the map; may be negative
  int rows, columns;
};

/// Planes of a tile in shared memory.
struct Planes {
  int pitch, stride;  ///< of a row, of a plane; both odd multiples of 4

  OVERLOCK_MM_HOST_DEVICE Planes(int rows, int columns)
      : pitch(odd_vectors(columns)), stride(odd_vectors(rows * odd_vectors(columns))) {}

  /// The least odd multiple of 4 that is not less.
  OVERLOCK_MM_HOST_DEVICE static int odd_vectors(int numbers) { return ((numbers + 3) / 4 | 1) * 4; }
};

/// One image, and the channels of a block in it.
template <typename T>
struct ImageChannels {
  T* data;  ///< the first channel of the block at the first position
  int64_t channels;
  int height, width;
  int left;      ///< channels from the first of the block on
  bool aligned;  ///< whether 16 bytes may be read at once

  __device__ ImageChannels(T* map, int64_t image, int64_t channels, int height, int width, int64_t first)
      : data(map + image * height * width * channels + first),
        channels(channels),
        height(height),
        width(width),
        left(static_cast<int>(channels - first)),
        aligned(channels % Channels<T>::kSize == 0 && reinterpret_cast<uint64_t>(map) % 16 == 0) {}

  __device__ __forceinline__ bool holds(int row, int column) const {
    return row >= 0 && row < height && column >= 0 && column < width;
  }
  __device__ __forceinline__ T* at(int row, int column) const {
    return data + (static_cast<int64_t>(row) * width + column) * channels;
  }
};

/// 16 bytes at once, or channel by channel; 0 beyond the last channel.
template <typename T>
__device__ __forceinline__ void load_channels(const ImageChannels<const T>& image, int row, int column, int first,
                                              typename Accumulator<T>::type (&out)[Channels<T>::kSize]) {
  constexpr int kSize = Channels<T>::kSize;
  const bool inside = image.holds(row, column);
  const T* const at = inside ? image.at(row, column) + first : nullptr;
  if (inside && image.aligned && first + kSize <= image.left) {
    const Channels<T> vector = load_vector(reinterpret_cast<const Channels<T>*>(at));
#pragma unroll
    for (int i = 0; i < kSize; ++i) out[i] = widen(vector.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) out[i] = inside && first + i < image.left ? load(at + i) : 0;
  }
}

/// Brings a tile to shared memory. The block's threads take part; they have to synchronise afterwards.
template <typename T, int kChannels = kBlockChannels<T>, typename A>
__device__ __forceinline__ void stage(const ImageChannels<const T>& image, const Region& region, const Planes& planes,
                                      A* shared) {
  constexpr int kSize = Channels<T>::kSize, kVectors = kChannels / kSize;
  const int count = region.rows * region.columns * kVectors;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int vector = i % kVectors, position = i / kVectors;
    const int row = position / region.columns, column = position - row * region.columns;
    A numbers[kSize];
    load_channels<T>(image, region.first_row + row, region.first_column + column, vector * kSize, numbers);
    A* const to = shared + vector * kSize * planes.stride + row * planes.pitch + column;
#pragma unroll
    for (int c = 0; c < kSize; ++c) to[c * planes.stride] = numbers[c];
  }
}

/// Writes a tile that lies in shared memory. Positions outside of the map are left out.
template <typename T, int kChannels = kBlockChannels<T>, typename A>
__device__ __forceinline__ void unstage(const A* shared, const Planes& planes, const Region& region,
                                        const ImageChannels<T>& image) {
  constexpr int kSize = Channels<T>::kSize, kVectors = kChannels / kSize;
  const int count = region.rows * region.columns * kVectors;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int vector = i % kVectors, position = i / kVectors, first = vector * kSize;
    const int row = position / region.columns, column = position - row * region.columns;
    if (!image.holds(region.first_row + row, region.first_column + column)) continue;
    const A* const from = shared + first * planes.stride + row * planes.pitch + column;
    T* const to = image.at(region.first_row + row, region.first_column + column) + first;
    if (image.aligned && first + kSize <= image.left) {
      Channels<T> numbers;
#pragma unroll
      for (int c = 0; c < kSize; ++c) store(&numbers.at[c], from[c * planes.stride]);
      *reinterpret_cast<Channels<T>*>(to) = numbers;
    } else {
      for (int c = 0; c < kSize && first + c < image.left; ++c) store(to + c, from[c * planes.stride]);
    }
  }
}

}  // namespace overlock_mm
