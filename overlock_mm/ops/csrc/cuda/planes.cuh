// Tiles of a channels_last map in shared memory, a plane for each channel, and sums over a warp.
//
// A thread block works on 8 channels, in float32 a sector of each position, and has a warp for each of them. Global
// memory is read and written by 8 channels of 4 positions a warp, so that sectors are whole. Planes lie 4 banks apart
// modulo 8, and these 32 numbers touch all banks once. Lines of a plane are an odd number of vectors apart: 8 threads
// that read a vector of 8 lines touch all banks once too.
#pragma once

#include "numbers.cuh"

namespace overlock_mm {
namespace planes {

constexpr int kChannels = 8;
constexpr int kThreads = kChannels * kWarp;
/// Neighbouring positions of a line that a thread has.
constexpr int kRun = 8;

/// Sizes in numbers, of planes of some lines.
struct Layout {
  int pitch, plane;

  OVERLOCK_MM_HOST_DEVICE constexpr Layout(int lines, int columns)
      : pitch(((columns + 3) / 4 | 1) * 4), plane((lines * pitch / 4 | 1) * 4) {}
  OVERLOCK_MM_HOST_DEVICE constexpr int size() const { return kChannels * plane; }
};

/// The tiles of a map. A warp covers one with kRows runs for each thread: its lanes are lines, then runs of columns.
struct Tiling {
  int64_t height, width, vertical, horizontal, images;
  int lines_of_warp, lines, columns;

  OVERLOCK_MM_HOST_DEVICE Tiling(int64_t batch, int64_t height, int64_t width, int column_groups, int rows)
      : height(height), width(width), images(batch) {
    lines_of_warp = kWarp / column_groups;
    lines = lines_of_warp * rows;
    columns = column_groups * kRun;
    vertical = ceil_div(height, lines);
    horizontal = ceil_div(width, columns);
  }
  OVERLOCK_MM_HOST_DEVICE int64_t count() const { return images * vertical * horizontal; }
};

struct Tile {
  int64_t image, y, x;
  int lines, columns;  ///< within the map

  __device__ Tile(const Tiling& tiling, int64_t index) {
    x = index % tiling.horizontal * tiling.columns;
    y = index / tiling.horizontal % tiling.vertical * tiling.lines;
    image = index / (tiling.horizontal * tiling.vertical);
    lines = static_cast<int>(min(tiling.height - y, static_cast<int64_t>(tiling.lines)));
    columns = static_cast<int>(min(tiling.width - x, static_cast<int64_t>(tiling.columns)));
  }
};

/// The place of a thread in a tile: its first run's. The others are lines_of_warp below one another.
struct Place {
  int line, column;

  __device__ explicit Place(const Tiling& tiling)
      : line(threadIdx.x % kWarp % tiling.lines_of_warp), column(threadIdx.x % kWarp / tiling.lines_of_warp * kRun) {}
};

/// How many positions of a run that begins there are within the map.
__device__ __forceinline__ int run_within(const Tile& tile, int line, int column) {
  return line < tile.lines ? max(min(tile.columns - column, kRun), 0) : 0;
}

/// The block's share of the work: 8 channels of a part of the tiles. Blocks that run at the same time work on
/// neighbouring channels of the same positions.
struct Share {
  int64_t first_channel, part;
  int channel;  ///< the warp's, of the 8

  __device__ explicit Share(int64_t channels) {
    const int64_t channel_blocks = ceil_div(channels, kChannels);
    first_channel = blockIdx.x % channel_blocks * kChannels;
    part = blockIdx.x / channel_blocks;
    channel = threadIdx.x / kWarp;
  }
};

/// Reads a tile of a map and `halo` positions on all sides. The planes have room for `margin` positions there. What is
/// outside of the map is 0.
template <typename T, typename A>
__device__ __forceinline__ void stage(const T* map, int64_t channels, int64_t first_channel, const Tiling& tiling,
                                      const Tile& tile, int halo, int margin, Layout layout, A* planes) {
  const int lane = threadIdx.x % kWarp, channel = lane % kChannels;
  const int begin = margin - halo, end_line = margin + tiling.lines + halo, end_column = margin + tiling.columns + halo;
  const int64_t c = first_channel + channel;
  const T* const image = map + tile.image * tiling.height * tiling.width * channels + c;
  for (int line = begin + threadIdx.x / kWarp; line < end_line; line += kThreads / kWarp) {
    const int64_t y = tile.y + line - margin;
    const bool is_inside = y >= 0 && y < tiling.height && c < channels;
    const T* const from = image + y * tiling.width * channels;
    A* const to = planes + channel * layout.plane + line * layout.pitch;
#pragma unroll 4
    for (int column = begin + lane / kChannels; column < end_column; column += kWarp / kChannels) {
      const int64_t x = tile.x + column - margin;
      to[column] = is_inside && x >= 0 && x < tiling.width ? load(from + x * channels) : A(0);
    }
  }
}

/// Writes a tile's positions that are within the map, from planes without a margin.
template <typename T, typename A>
__device__ __forceinline__ void unstage(const A* planes, Layout layout, int64_t channels, int64_t first_channel,
                                        const Tiling& tiling, const Tile& tile, T* map) {
  const int lane = threadIdx.x % kWarp, channel = lane % kChannels;
  if (first_channel + channel >= channels) return;
  for (int line = threadIdx.x / kWarp; line < tile.lines; line += kThreads / kWarp) {
    T* const to = map + ((tile.image * tiling.height + tile.y + line) * tiling.width + tile.x) * channels +
                  first_channel + channel;
    const A* const from = planes + channel * layout.plane + line * layout.pitch;
#pragma unroll 4
    for (int column = lane / kChannels; column < tile.columns; column += kWarp / kChannels)
      store(to + column * channels, from[column]);
  }
}

template <typename A>
__device__ __forceinline__ void read_run(const A* planes, A (&run)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; i += 4) {
    const Vector<A> vector = vector_at(planes + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) run[i + j] = vector.at[j];
  }
}

template <typename A>
__device__ __forceinline__ void write_run(const A (&run)[kRun], A* planes) {
#pragma unroll
  for (int i = 0; i < kRun; i += 4)
    *reinterpret_cast<Vector<A>*>(planes + i) = {run[i], run[i + 1], run[i + 2], run[i + 3]};
}

/// The sum over the lanes that differ in the bits from `lowest` on, the same for all of them to the bit.
template <typename A>
__device__ __forceinline__ A sum_over_warp(A number, int lowest = 1) {
#pragma unroll
  for (int mask = kWarp / 2; mask >= lowest; mask /= 2) number += __shfl_xor_sync(0xffffffffu, number, mask);
  return number;
}

/// The sum over the warp of numbers[lane % kCount], for a power of 2. A lane gives half of its numbers away, then half
/// of the rest, and so on.
template <int kCount, typename A>
__device__ __forceinline__ A sums_over_warp(const A (&numbers)[kCount]) {
  if constexpr (kCount == 1) {
    return numbers[0];
  } else {
    constexpr int kHalf = kCount / 2;
    const bool keeps_upper = threadIdx.x & kHalf;
    A kept[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const A own = keeps_upper ? numbers[i + kHalf] : numbers[i],
              given = keeps_upper ? numbers[i] : numbers[i + kHalf];
      kept[i] = own + __shfl_xor_sync(0xffffffffu, given, kHalf);
    }
    return sums_over_warp(kept);
  }
}

}  // namespace planes
}  // namespace overlock_mm
