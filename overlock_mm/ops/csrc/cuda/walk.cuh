// Walks over a map for 3 x 3 depth-wise convolutions.
//
// In a map (B, H, W, C) a warp has 32 neighbouring channels, 64 to 256 bytes, and a tile of positions; a thread has one
// channel. It walks down the lines of the tile with kRun neighbouring positions of a line. Three lines are in its
// registers: nothing is exchanged between threads, and a number of the map is read from memory once for a tile. Halos
// come from the caches.
#pragma once

#include <algorithm>

#include "launch.cuh"
#include "numbers.cuh"
#include "walk.h"

namespace overlock_mm {
namespace walks {

constexpr int kRun = 8;  // positions of a line that a thread has
constexpr int kMaxWarps = 4;
constexpr int kTaps = 9;

/// Of maps other than float64: a thread's numbers take half of the registers.
template <typename T>
constexpr bool kSmall = sizeof(typename Accumulator<T>::type) == sizeof(float);

/// What a warp has of a map, and the thread's channel.
struct Tile {
  int64_t image, strip, channel;
  int part;  ///< which of the thread blocks for the same channels
  int first_row, end_row, first_column;
  bool holds;  ///< whether there are such a tile and such a channel

  __device__ explicit Tile(const WalkedMap& map) {
    const int64_t blocks = ceil_div(map.channels, kWarp);
    part = static_cast<int>(blockIdx.x / blocks);
    channel = blockIdx.x % blocks * kWarp + threadIdx.x % kWarp;
    image = part / map.strips;
    strip = part % map.strips;
    const int64_t horizontal = ceil_div(map.width, kRun), index = strip * map.warps + threadIdx.x / kWarp;
    const int64_t first = index / horizontal * map.rows;
    holds = channel < map.channels && first < map.height;
    first_row = static_cast<int>(min(first, map.height));
    end_row = static_cast<int>(min(first + map.rows, map.height));
    first_column = static_cast<int>(index % horizontal) * kRun;
  }
};

/// base + index * stride for loads, in one instruction. (The compiler makes three of it, and more of what it finds in
/// common between them.)
template <typename T>
__device__ __forceinline__ const T* at_stride(const T* base, int index, int stride) {
#if defined(__CUDA_ARCH__)
  const T* at;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(at) : "r"(stride), "r"(index * static_cast<int>(sizeof(T))), "l"(base));
  return at;
#else
  return base + static_cast<int64_t>(index) * stride;
#endif
}

/// A tile's positions in a line of the map and kHalo more at both ends, for the thread's channel.
template <int kHalo>
struct Columns {
  static constexpr int kSize = kRun + 2 * kHalo;

  int64_t first, line;  ///< elements before the first column of line 0, which may lie outside of the map; of a line
  int channels, height;
  unsigned inside;  ///< bits: which columns are in the map

  __device__ Columns(const WalkedMap& map, const Tile& tile)
      : line(map.width * map.channels),
        channels(static_cast<int>(map.channels)),
        height(static_cast<int>(map.height)),
        inside(0) {
    const int first_column = tile.first_column - kHalo;
    first = tile.image * map.height * line + first_column * map.channels + tile.channel;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (first_column + i >= 0 && first_column + i < map.width) inside |= 1u << i;
    }
  }

  /// Whether the columns of `halo` more positions at both ends are in the map, in a line of it.
  __device__ __forceinline__ unsigned inside_of(int row, int halo) const {
    return row >= 0 && row < height ? inside >> (kHalo - halo) : 0;
  }

  template <typename T>
  __device__ __forceinline__ T* line_of(T* map, int row, int halo) const {
    return map + first + row * line + (kHalo - halo) * static_cast<int64_t>(channels);
  }

  /// Zero outside of the map.
  template <typename T, typename A, int kNumbers>
  __device__ __forceinline__ void load_line(const T* map, int row, A (&numbers)[kNumbers]) const {
    constexpr int kHaloHere = (kNumbers - kRun) / 2;
    const unsigned wanted = inside_of(row, kHaloHere);
    const T* const at = line_of(map, row, kHaloHere);
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) numbers[i] = wanted >> i & 1 ? load(at_stride(at, i, channels)) : A(0);
  }
};

/// The weights of the block's channels, in shared memory: [channel][tap].
template <typename A>
__device__ __forceinline__ void stage_weights(const WalkedMap& map, const void* weight, A* shared) {
  const int64_t first = blockIdx.x % ceil_div(map.channels, kWarp) * kWarp;
  const int count = static_cast<int>(min(map.channels - first, static_cast<int64_t>(kWarp))) * kTaps;
  for (int i = threadIdx.x; i < count; i += blockDim.x)
    shared[i] = load(static_cast<const A*>(weight) + first * kTaps + i);
  __syncthreads();
}

/// Calls body(row, phase, above, line, below) for the lines from first_row on, before end_row. Lines are made by
/// read(row, phase, line). Phases are 0, 1 and 2 in turn: `line` is of phase + 1, and the others stand around it.
template <int kSize, typename A, typename Read, typename Body>
__device__ __forceinline__ void walk(int first_row, int end_row, const Read& read, const Body& body) {
  A lines[3][kSize];
  read(first_row - 1, 0, lines[0]);
  read(first_row, 1, lines[1]);
  for (int row = first_row; row < end_row; row += 3) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {  // so that a line stays in its registers
      if (row + i >= end_row) break;
      const int next = (i + 2) % 3;
      read(row + i + 1, next, lines[next]);
      body(row + i, i, lines[i], lines[(i + 1) % 3], lines[next]);
    }
  }
}

// Host.

// Lines of a tile. Of fewer lines more is halo; but there must be warps enough for a large device.
constexpr int64_t kMostRows = 32, kLeastRows = 6, kEnoughWarps = 3072;

inline int64_t channel_blocks(const WalkedMap& map) { return ceil_div(map.channels, kWarp); }

inline bool is_empty(const WalkedMap& map) { return map.batch * map.channels * map.height * map.width == 0; }

inline int64_t tiles_of_image(const WalkedMap& map, int64_t rows) {
  return ceil_div(map.height, rows) * ceil_div(map.width, kRun);
}

/// Sets rows, warps and strips. They depend on the shape alone.
inline void divide_for_walk(WalkedMap* map) {
  map->rows = map->warps = map->strips = 1;
  if (is_empty(*map)) return;
  int64_t parts = ceil_div(map->height, kMostRows);
  const auto rows = [&] { return ceil_div(map->height, parts); };
  const int64_t copies = map->batch * channel_blocks(*map);
  while (rows() >= 2 * kLeastRows && tiles_of_image(*map, rows()) * copies < kEnoughWarps) ++parts;
  map->rows = rows();
  const int64_t tiles = tiles_of_image(*map, map->rows);
  map->strips = ceil_div(tiles, kMaxWarps);
  map->warps = ceil_div(tiles, map->strips);
}

/// Launches a kernel for the tiles of params, a WalkedMap, with `numbers` of shared memory for each thread, and at
/// least the weights.
template <typename A, typename Params>
cudaError_t launch_walk(void (*kernel)(Params), int numbers, const Params& params, cudaStream_t stream) {
  const WalkedMap& map = params;
  const int threads = static_cast<int>(map.warps) * kWarp;
  const int64_t shared = std::max(threads * numbers, kWarp * kTaps);
  return launch(kernel, map.batch * map.strips * channel_blocks(map), threads, shared * sizeof(A), params, stream);
}

}  // namespace walks
}  // namespace overlock_mm
