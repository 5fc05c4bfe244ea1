// Channel blocks of a map, packed with a border of zeros: convolutions by blocks, and their gradients. Included by the
// kernels' headers, under the rules of simd.h.
#pragma once

#include "channel_blocks.h"

namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE {
namespace {

constexpr int kColumns = 12;           // positions of a line in registers
constexpr int kTapsTogether = 3;       // taps of a line of the kernel that share the loads of inputs
constexpr int kTaps = 9;               // taps of a line of the kernel in registers, for their gradients
constexpr int kPositionsTogether = 3;  // positions that share the loads of inputs, for those

/// Lines of one block of channels with a border: position (y, x), counted from the corner of the border, is at
/// data + (y * width + x) * lanes.
template <typename T>
struct Packed {
  T* data;
  int64_t width;

  T* at(int64_t y, int64_t x) const { return data + (y * width + x) * Simd<T>::lanes; }

  static int64_t size(int64_t lines, int64_t width, int64_t border) {
    return (lines + 2 * border) * (width + 2 * border) * Simd<T>::lanes;
  }

  /// Lines from `first` - border on, of the image (H, W, C), less `shift`.
  template <typename E>
  void pack(const E* image, int64_t height, int64_t columns, int64_t channels, const ChannelBlock& block, int64_t first,
            int64_t lines, int64_t border, Vector<T> shift) {
    T* to = data;
    for (int64_t y = first - border; y < first + lines + border; ++y) {
      const bool inside = y >= 0 && y < height;
      const E* from = image + y * columns * channels;
      for (int64_t x = -border; x < columns + border; ++x, to += Simd<T>::lanes)
        store(to, inside && x >= 0 && x < columns ? load_block(from + x * channels, block) - shift : Vector<T>{});
    }
  }
};

/// Where the taps of a kernel are, from its first one on, in a packed map.
template <typename T>
void tap_offsets(int64_t kernel_size, int64_t dilation, int64_t packed_width, int64_t* offsets) {
  for (int64_t ky = 0; ky < kernel_size; ++ky) {
    for (int64_t kx = 0; kx < kernel_size; ++kx) *offsets++ = (ky * packed_width + kx) * dilation * Simd<T>::lanes;
  }
}

/// Add n positions' products with neighbouring taps of a line to their sums. Each input is loaded once.
template <typename T, int n, int n_taps>
OVERLOCK_MM_INLINE void add_taps(const T* in, const T* weights, Vector<T> (&sums)[n]) {
  constexpr int lanes = Simd<T>::lanes;
  Vector<T> w[n_taps];
#pragma GCC unroll 4
  for (int t = 0; t < n_taps; ++t) w[t] = load(weights + t * lanes);
#pragma GCC unroll 16
  for (int i = 0; i < n + n_taps - 1; ++i) {
    const Vector<T> x = in_register(load(in + i * lanes));
#pragma GCC unroll 4
    for (int t = 0; t < n_taps; ++t) {
      if (i >= t && i - t < n) sums[i - t] += w[t] * x;
    }
  }
}

/// `groups`: of kTapsTogether taps, at the beginning of each line of the kernel. The others are added one by one. The
/// offsets are read from memory: from a step that it knows, GCC would keep later inputs in registers, and spill sums.
template <typename T, int n>
OVERLOCK_MM_NOINLINE void convolve_tile(const T* in, const int64_t* offsets, const T* weights, int64_t kernel_size,
                                        int64_t groups, Vector<T>* sums) {
  constexpr int lanes = Simd<T>::lanes;
  Vector<T> acc[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) acc[i] = sums[i];
  for (int64_t ky = 0; ky < kernel_size; ++ky) {
    for (int64_t g = 0; g < groups; ++g, offsets += kTapsTogether, weights += kTapsTogether * lanes)
      add_taps<T, n, kTapsTogether>(in + *offsets, weights, acc);
    for (int64_t kx = groups * kTapsTogether; kx < kernel_size; ++kx, ++offsets, weights += lanes)
      add_taps<T, n, 1>(in + *offsets, weights, acc);
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) sums[i] = acc[i];
}

/// Add to the sums of n <= kColumns positions, of which the first reads its first tap at `in`.
template <typename T>
inline void convolve_positions(int64_t n, const T* in, const int64_t* offsets, const T* weights, int64_t kernel_size,
                               int64_t dilation, Vector<T>* sums) {
  using Function = void (*)(const T*, const int64_t*, const T*, int64_t, int64_t, Vector<T>*);
  static constexpr Function functions[kColumns] = {&convolve_tile<T, 1>,  &convolve_tile<T, 2>,  &convolve_tile<T, 3>,
                                                   &convolve_tile<T, 4>,  &convolve_tile<T, 5>,  &convolve_tile<T, 6>,
                                                   &convolve_tile<T, 7>,  &convolve_tile<T, 8>,  &convolve_tile<T, 9>,
                                                   &convolve_tile<T, 10>, &convolve_tile<T, 11>, &convolve_tile<T, 12>};
  functions[n - 1](in, offsets, weights, kernel_size, dilation == 1 ? kernel_size / kTapsTogether : 0, sums);
}

/// Call function(x, n) for tiles of a line, as even as can be: a short one does as much work per load as a long one
/// does.
template <typename Function>
OVERLOCK_MM_INLINE void in_even_tiles(int64_t width, Function function) {
  const int64_t tiles = (width + kColumns - 1) / kColumns;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t x = i * width / tiles;
    function(x, (i + 1) * width / tiles - x);
  }
}

/// Add the products of n_positions gradients with the inputs of n taps. Taps are `step` apart, and so are several
/// positions: then each input is loaded once. `step` is no constant, for the reason at convolve_tile.
template <typename T, int n, int n_positions, Vector<T> (*input_at)(const T*)>
OVERLOCK_MM_INLINE void add_positions(const T* grads, const T* in, int64_t step, Vector<T> (&sums)[n]) {
  Vector<T> grad[n_positions];
#pragma GCC unroll 4
  for (int j = 0; j < n_positions; ++j) grad[j] = load(grads + j * Simd<T>::lanes);
#pragma GCC unroll 16
  for (int i = 0; i < n + n_positions - 1; ++i, in += step) {
    const Vector<T> x = in_register(input_at(in));
#pragma GCC unroll 4
    for (int j = 0; j < n_positions; ++j) {
      if (i >= j && i - j < n) sums[i - j] += grad[j] * x;
    }
  }
}

/// Add products of gradients and inputs, over the positions of a line, to the sums of n taps that are `step` apart. A
/// line is summed by itself first: rounding grows with the length of a sum. `input_at` loads an input. `groups`: of
/// kPositionsTogether positions, at the beginning of the line. The others are added one by one.
template <typename T, int n, Vector<T> (*input_at)(const T*)>
OVERLOCK_MM_NOINLINE void correlate_tile(const T* grads, const T* in, int64_t positions, int64_t groups, int64_t step,
                                         T* sums) {
  constexpr int64_t lanes = Simd<T>::lanes, group = kPositionsTogether * lanes;
  Vector<T> acc[n] = {};
  for (int64_t g = 0; g < groups; ++g, grads += group, in += group)
    add_positions<T, n, kPositionsTogether, input_at>(grads, in, step, acc);
  for (int64_t x = groups * kPositionsTogether; x < positions; ++x, grads += lanes, in += lanes)
    add_positions<T, n, 1, input_at>(grads, in, step, acc);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    T* const sum = sums + i * lanes;
    store(sum, load(sum) + acc[i]);
  }
}

/// Add to the gradients of a kernel's taps, (k * k, lanes). `grads` has the lines of the output, `inputs` those that
/// the first tap reads.
template <typename T, Vector<T> (*input_at)(const T*) = &load<T>>
void correlate(const Packed<T>& grads, const Packed<T>& inputs, int64_t lines, int64_t columns, int64_t kernel_size,
               int64_t dilation, T* sums) {
  using Function = void (*)(const T*, const T*, int64_t, int64_t, int64_t, T*);
  static constexpr Function functions[kTaps] = {
      &correlate_tile<T, 1, input_at>, &correlate_tile<T, 2, input_at>, &correlate_tile<T, 3, input_at>,
      &correlate_tile<T, 4, input_at>, &correlate_tile<T, 5, input_at>, &correlate_tile<T, 6, input_at>,
      &correlate_tile<T, 7, input_at>, &correlate_tile<T, 8, input_at>, &correlate_tile<T, 9, input_at>};
  constexpr int64_t lanes = Simd<T>::lanes;
  const int64_t parts = (kernel_size + kTaps - 1) / kTaps, groups = dilation == 1 ? columns / kPositionsTogether : 0;
  for (int64_t ky = 0; ky < kernel_size; ++ky) {
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t kx = part * kernel_size / parts, n = (part + 1) * kernel_size / parts - kx;
      for (int64_t y = 0; y < lines; ++y) {
        functions[n - 1](grads.at(y, 0), inputs.at(y + ky * dilation, kx * dilation), columns, groups, dilation * lanes,
                         sums + (ky * kernel_size + kx) * lanes);
      }
    }
  }
}

/// Gradients (taps, lanes) of a block to (C, taps).
template <typename T>
void unpack_gradients(const T* sums, int64_t taps, const ChannelBlock& block, int64_t taps_of_channel, T* to) {
  for (int64_t i = block.skip; i < block.count; ++i) {
    for (int64_t t = 0; t < taps; ++t) to[(block.first + i) * taps_of_channel + t] = sums[t * Simd<T>::lanes + i];
  }
}

}  // namespace
}  // namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE
