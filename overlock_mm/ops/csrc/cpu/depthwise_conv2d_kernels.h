// Depth-wise convolutions of channels_last maps on the CPU. Included once for each instruction set, under the rules of
// simd.h. docs/notes/depthwise.md says why they are as they are.
//
// The lanes of a vector are channels. Two forms of a convolution:
// - streamed (3 x 3, bound by memory): line by line with all channels, read where they lie, three lines of which stay
// in
//   the L2 cache. Lines that are overwritten pass through a ring of three lines.
// - by blocks (large kernels, bound by multiply-adds): one vector of channels of a strip is packed with a border of
//   zeros, so that no tap needs a check for borders, and a tile of positions is accumulated in registers over all taps.

#include "channel_blocks.h"
#include "packed.h"
#include "pairs.h"

namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE {
namespace {

// ---------------------------------------------------------------------------------------------------------- streamed

constexpr int kStreamed = 3;                             // kernel size
constexpr int kStreamTile = kVectorBytes == 64 ? 8 : 4;  // positions of a line in registers
constexpr int kGradientTile = kVectorBytes == 64 ? 8 : 4;

/// A line of a map with its neighbours, all channels of a position side by side.
template <typename E>
struct Around {
  const E* lines[kStreamed];  ///< position 0 of the lines above, here and below; null: outside the map
  int64_t stride, width;

  /// Channels from `first` on of n positions of a line and of their neighbours; zeros for those outside the map.
  template <int n>
  OVERLOCK_MM_INLINE void load_positions(int line, int64_t x, int64_t first, Vector<Computed<E>>* in) const {
    const E* const at = lines[line] + x * stride + first;
    in[0] = x > 0 ? load(at - stride) : Vector<Computed<E>>{};
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) in[i + 1] = load(at + i * stride);
    in[n + 1] = x + n < width ? load(at + n * stride) : Vector<Computed<E>>{};
    // The lines above are in the cache. The processor does not predict the path of a tile over this one.
    if (line == kStreamed - 1) {
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) __builtin_prefetch(at + (n + i + 1) * stride);
    }
  }
};

/// Line y of an image (H, W, C), null outside of it.
template <typename E>
const E* line_of(const DepthwiseConv2dParams& p, const void* map, int64_t image, int64_t y) {
  return y < 0 || y >= p.height ? nullptr : const_data<E>(map) + (image * p.height + y) * p.width * p.channels;
}

/// Line y in the map itself. Only for as many channels as a vector has lanes, or more: Ring is for fewer.
template <typename E>
Around<E> around_line(const DepthwiseConv2dParams& p, const void* map, int64_t image, int64_t y) {
  return {{line_of<E>(p, map, image, y - 1), line_of<E>(p, map, image, y), line_of<E>(p, map, image, y + 1)},
          p.channels,
          p.width};
}

/// The last three lines of a map that were pushed, with whole vectors of channels.
template <typename T>
class Ring {
 public:
  /// A vector more than the channels, so that the positions of a tile do not share a few sets of the cache.
  static int64_t stride(int64_t channels) { return round_up<T>(channels) + Simd<T>::lanes; }
  static int64_t size(int64_t channels, int64_t width) { return kStreamed * width * stride(channels); }

  /// `data`: memory for `size` numbers.
  Ring(const DepthwiseConv2dParams& p, T* data) : p_(p), stride_(stride(p.channels)), data_(data) {}

  /// Line y, if it was pushed last or one or two lines before.
  T* line(int64_t y) const { return data_ + y % kStreamed * p_.width * stride_; }
  int64_t stride() const { return stride_; }

  /// Line y, which was pushed one line before the last, or last at the end of the map.
  Around<T> around(int64_t y) const {
    return {{y > 0 ? line(y - 1) : nullptr, line(y), y + 1 < p_.height ? line(y + 1) : nullptr}, stride_, p_.width};
  }

  /// Take in line y, (W, C) at `from`. Nothing for a line outside the map, which is null.
  template <typename E>
  OVERLOCK_MM_INLINE void push(const E* from, int64_t y) {
    if (!from) return;
    T* to = line(y);
    const int64_t blocks = number_of_blocks<T>(p_.channels);
    for (int64_t x = 0; x < p_.width; ++x, from += p_.channels, to += stride_) {
      for (int64_t b = 0; b < blocks; ++b) {
        const ChannelBlock block = block_of<T>(p_.channels, b);
        store(to + block.first, load_block(from, block));
      }
    }
  }

 private:
  const DepthwiseConv2dParams& p_;
  int64_t stride_;
  T* data_;
};

/// Sums of n positions from x on over the 3x3 taps around them.
template <typename T, int n, typename E>
OVERLOCK_MM_INLINE void convolve_streamed(const Around<E>& around, int64_t x, int64_t first, const T* weights,
                                          Vector<T> start, Vector<T>* sums) {
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) sums[i] = start;
#pragma GCC unroll 3
  for (int ky = 0; ky < 3; ++ky) {
    if (!around.lines[ky]) continue;
    Vector<T> in[n + 2];
    around.template load_positions<n>(ky, x, first, in);
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; ++kx) {
      const Vector<T> w = load(weights + (3 * ky + kx) * Simd<T>::lanes);
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) sums[i] += w * in[i + kx];
    }
  }
}

/// Call tile(x, width as a constant) for the positions of a line, in tiles of `most`, and of halves of it at the end.
template <int most, typename Tile>
OVERLOCK_MM_INLINE void in_tiles(int64_t x, int64_t width, Tile tile) {
  for (; x + most <= width; x += most) tile.template operator()<most>(x);
  if constexpr (most > 1) in_tiles<most / 2>(x, width, tile);
}

/// A line, convolved. A tile goes through all channels before the next tile: numbers that lie side by side are read and
/// written together.
template <typename T, typename E, typename Start, typename Finish>
struct StreamedLine {
  Around<E> around;
  int64_t channels;
  const T* weights;  ///< (blocks, 9, lanes)
  Start start;       ///< The initial sums of a block.
  Finish finish;     ///< Takes a position, a block and its sum.
  T* squares;        ///< (blocks, lanes), of the sums, or null

  template <int n>
  OVERLOCK_MM_INLINE void operator()(int64_t x) const {
    const T* block_weights = weights;
    const int64_t blocks = number_of_blocks<T>(channels);
    for (int64_t b = 0; b < blocks; ++b, block_weights += kStreamed * kStreamed * Simd<T>::lanes) {
      const ChannelBlock block = block_of<T>(channels, b);
      Vector<T> sums[n];
      convolve_streamed<T, n>(around, x, block.first, block_weights, start(block), sums);
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) finish(x + i, block, sums[i]);
      if (squares) {
        T* const to = squares + b * Simd<T>::lanes;
        Vector<T> square = load(to);
#pragma GCC unroll 8
        for (int i = 0; i < n; ++i) square += sums[i] * sums[i];
        store(to, square);
      }
    }
  }
};

template <typename T, typename E, typename Start, typename Finish>
OVERLOCK_MM_INLINE void convolve_line(const Around<E>& around, int64_t channels, const T* weights, Start start,
                                      Finish finish, T* squares = nullptr) {
  in_tiles<kStreamTile>(0, around.width,
                        StreamedLine<T, E, Start, Finish>{around, channels, weights, start, finish, squares});
}

/// The weights of all blocks, (blocks, 9, lanes), with the residual connection as a 1 on the middle tap, times the
/// scale (C) where there is one.
template <typename T>
void pack_streamed_weights(const DepthwiseConv2dParams& p, bool flipped, const T* scale, T* to) {
  constexpr int64_t lanes = Simd<T>::lanes, taps = kStreamed * kStreamed;
  for (int64_t b = 0; b < number_of_blocks<T>(p.channels); ++b, to += taps * lanes) {
    const ChannelBlock block = block_of<T>(p.channels, b);
    pack_weights(const_data<T>(p.weight), taps, 0, taps, block, flipped, to);
    if (p.residual) {
      for (int64_t i = 0; i < lanes; ++i) to[taps / 2 * lanes + i] += T(1);
    }
    for (int64_t t = 0; scale && t < taps; ++t) store(to + t * lanes, load(to + t * lanes) * load_block(scale, block));
  }
}

/// Maps of E, in memory. The computation is in T.
template <typename T, typename E, bool writes>
void stream_maps(const DepthwiseConv2dParams& p, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<T>::lanes, taps = kStreamed * kStreamed;
  const int64_t blocks = number_of_blocks<T>(p.channels);
  // In place, and with too few channels for a vector, lines cannot be read from the map itself.
  const bool pushes = p.input == p.output || p.channels < lanes;
  const int64_t ring_size = pushes ? Ring<T>::size(p.channels, p.width) : 0;
  Scratch<T> scratch(ring_size + blocks * (taps + 1) * lanes + p.channels);
  Ring<T> ring(p, scratch.take(ring_size));
  T* const weights = scratch.take(blocks * taps * lanes);
  T* const squares = p.squares ? scratch.take(blocks * lanes) : nullptr;
  T* const scaled_bias = p.scale ? scratch.take(p.channels) : nullptr;
  if (!p.scale) pack_streamed_weights<T>(p, /*flipped=*/false, nullptr, weights);
  const T* const bias = p.scale ? scaled_bias : const_data<T>(p.bias);
  const int64_t image_size = p.height * p.width * p.channels;

  for (int64_t item = begin, last_image = -1; item < end; ++item) {
    const int64_t image = item / p.strips, strip = item % p.strips;
    if (p.scale && image != last_image) {
      const T* const scale = const_data<T>(p.scale) + image * p.channels;
      pack_streamed_weights(p, /*flipped=*/false, scale, weights);
      for (int64_t c = 0; c < p.channels; ++c)
        scaled_bias[c] = (p.bias ? const_data<T>(p.bias)[c] * scale[c] : T(0)) + const_data<T>(p.shift)[c];
      last_image = image;
    }
    E* const output = writes ? static_cast<E*>(p.output) + image * image_size : nullptr;
    const Lines lines(p.height, p.strips, strip);
    for (int64_t i = 0; squares && i < blocks * lanes; ++i) squares[i] = T(0);
    for (int64_t pushed = lines.begin - 1; pushed <= lines.end; ++pushed) {
      const E* from = pushes ? line_of<E>(p, p.input, image, pushed) : nullptr;
      if (p.borders && from && (pushed < lines.begin || pushed == lines.end)) {
        const int64_t border = pushed < lines.begin ? 2 * strip - 2 : 2 * strip + 1;
        from = const_data<E>(p.borders) + (image * 2 * (p.strips - 1) + border) * p.width * p.channels;
      }
      ring.push(from, pushed);
      const int64_t y = pushed - 1;
      if (y < lines.begin) continue;
      E* const to = writes ? output + y * p.width * p.channels : nullptr;
      const auto convolve = [&](const auto& around) OVERLOCK_MM_INLINE_LAMBDA {
        convolve_line<T>(
            around, p.channels, weights,
            [&](const ChannelBlock& block)
                OVERLOCK_MM_INLINE_LAMBDA { return bias ? load_block(bias, block) : Vector<T>{}; },
            [&](int64_t x, const ChannelBlock& block, Vector<T> sum) OVERLOCK_MM_INLINE_LAMBDA {
              if constexpr (writes) store_repeated(to + x * p.channels, block, sum);
            },
            squares);
      };
      if (pushes) {
        convolve(ring.around(y));
      } else {
        convolve(around_line<E>(p, p.input, image, y));
      }
    }
    for (int64_t b = 0; squares && b < blocks; ++b)
      store_repeated(static_cast<T*>(p.squares) + item * p.channels, block_of<T>(p.channels, b),
                     load(squares + b * lanes));
  }
}

template <typename T>
void stream(const DepthwiseConv2dParams& p, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (p.bfloat16 && !p.output) return stream_maps<T, BFloat16, false>(p, begin, end);
    if (p.bfloat16) return stream_maps<T, BFloat16, true>(p, begin, end);
  }
  stream_maps<T, T, true>(p, begin, end);
}

/// Gradients of the taps, and of the bias, at the positions of a line, added up.
template <typename T, typename I, typename G>
struct StreamedGradient {
  Around<I> inputs;  ///< f(input)
  Around<G> grads;
  int64_t channels;
  T* sums;  ///< (blocks, 10, lanes)

  template <int n>
  OVERLOCK_MM_INLINE void operator()(int64_t x) const {
    constexpr int lanes = Simd<T>::lanes, taps = kStreamed * kStreamed;
    T* to = sums;
    const int64_t blocks = number_of_blocks<T>(channels);
    for (int64_t b = 0; b < blocks; ++b, to += (taps + 1) * lanes) {
      const int64_t first = block_of<T>(channels, b).first;
      Vector<T> grad[n], bias = load(to + taps * lanes);
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) {
        grad[i] = load(grads.lines[1] + (x + i) * grads.stride + first);
        bias += grad[i];
      }
      store(to + taps * lanes, bias);
#pragma GCC unroll 3
      for (int ky = 0; ky < 3; ++ky) {
        if (!inputs.lines[ky]) continue;
        Vector<T> in[n + 2];
        inputs.template load_positions<n>(ky, x, first, in);
#pragma GCC unroll 3
        for (int kx = 0; kx < 3; ++kx) {
          T* const tap = to + (3 * ky + kx) * lanes;
          Vector<T> sum = load(tap);
#pragma GCC unroll 8
          for (int i = 0; i < n; ++i) sum += grad[i] * in[i + kx];
          store(tap, sum);
        }
      }
    }
  }
};

template <typename T, typename I, typename G>
OVERLOCK_MM_INLINE StreamedGradient<T, I, G> streamed_gradient(const Around<I>& inputs, const Around<G>& grads,
                                                               int64_t channels, T* sums) {
  return {inputs, grads, channels, sums};
}

/// All gradients in one pass over input and grad_output.
template <typename T, typename E>
void stream_maps_backward(const DepthwiseConv2dParams& p, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<T>::lanes, taps = kStreamed * kStreamed;
  const int64_t blocks = number_of_blocks<T>(p.channels);
  const int64_t ring_size = Ring<T>::size(p.channels, p.width), sums_size = blocks * (taps + 1) * lanes;
  // Too few channels for a vector cannot be read from the map itself.
  const bool pushes = p.channels < lanes;
  Scratch<T> scratch(2 * pushes * ring_size + blocks * taps * lanes + sums_size);
  Ring<T> grads(p, pushes ? scratch.take(ring_size) : nullptr);
  Ring<T> inputs(p, pushes ? scratch.take(ring_size) : nullptr);
  T* const weights = scratch.take(blocks * taps * lanes);
  T* const sums = scratch.take(sums_size);
  pack_streamed_weights<T>(p, /*flipped=*/true, nullptr, weights);
  const int64_t image_size = p.height * p.width * p.channels;

  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.strips;
    const Lines lines(p.height, p.strips, item % p.strips);
    for (int64_t i = 0; i < sums_size; ++i) sums[i] = T(0);
    for (int64_t pushed = lines.begin - 1; pushed <= lines.end; ++pushed) {
      if (pushes) {
        grads.push(line_of<E>(p, p.grad_output, image, pushed), pushed);
        inputs.push(line_of<E>(p, p.input, image, pushed), pushed);
      }
      const int64_t y = pushed - 1;
      if (y < lines.begin) continue;
      const auto differentiate = [&](const auto& around_input, const auto& around_grad) OVERLOCK_MM_INLINE_LAMBDA {
        if (p.grad_input) {
          E* const to = static_cast<E*>(p.grad_input) + image * image_size + y * p.width * p.channels;
          convolve_line<T>(
              around_grad, p.channels, weights,
              [](const ChannelBlock&) OVERLOCK_MM_INLINE_LAMBDA { return Vector<T>{}; },
              [&](int64_t x, const ChannelBlock& block, Vector<T> sum)
                  OVERLOCK_MM_INLINE_LAMBDA { store_repeated(to + x * p.channels, block, sum); });
        }
        if (p.grad_weight || p.grad_bias)
          in_tiles<kGradientTile>(0, p.width, streamed_gradient<T>(around_input, around_grad, p.channels, sums));
      };
      if (pushes) {
        differentiate(inputs.around(y), grads.around(y));
      } else {
        differentiate(around_line<E>(p, p.input, image, y), around_line<E>(p, p.grad_output, image, y));
      }
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const ChannelBlock block = block_of<T>(p.channels, b);
      const T* const from = sums + b * (taps + 1) * lanes;
      for (int64_t i = 0; i < block.count; ++i) {
        const int64_t channel = item * p.channels + block.first + i;
        for (int64_t t = 0; p.grad_weight && t < taps; ++t)
          static_cast<T*>(p.grad_weight)[channel * taps + t] = from[t * lanes + i];
        if (p.grad_bias) static_cast<T*>(p.grad_bias)[channel] = from[taps * lanes + i];
      }
    }
  }
}

template <typename T>
void stream_backward(const DepthwiseConv2dParams& p, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (p.bfloat16) return stream_maps_backward<T, BFloat16>(p, begin, end);
  }
  stream_maps_backward<T, T>(p, begin, end);
}

// --------------------------------------------------------------------------------------------------------- by blocks

template <typename T>
void convolve(const DepthwiseConv2dParams& p, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<T>::lanes;
  const int64_t blocks = number_of_blocks<T>(p.channels), taps = p.kernel_size * p.kernel_size;
  const int64_t border = p.kernel_size / 2 * p.dilation;
  const int64_t most_lines = (p.height + p.strips - 1) / p.strips;
  Scratch<T> scratch(Packed<T>::size(most_lines, p.width, border) + taps * lanes);
  Scratch<int64_t> offsets_scratch(taps);
  const Packed<T> packed{scratch.take(Packed<T>::size(most_lines, p.width, border)), p.width + 2 * border};
  T* const weights = scratch.take(taps * lanes);
  int64_t* const offsets = offsets_scratch.take(taps);
  tap_offsets<T>(p.kernel_size, p.dilation, packed.width, offsets);
  const int64_t image_size = p.height * p.width * p.channels;

  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / blocks / p.strips;
    const ChannelBlock block = block_of<T>(p.channels, item % blocks);
    const Lines lines(p.height, p.strips, item / blocks % p.strips);
    Packed<T>(packed).pack(const_data<T>(p.input) + image * image_size, p.height, p.width, p.channels, block,
                           lines.begin, lines.count(), border, Vector<T>{});
    pack_weights(const_data<T>(p.weight), taps, 0, taps, block, /*flipped=*/false, weights);
    if (p.residual) {
      for (int64_t i = 0; i < lanes; ++i) weights[taps / 2 * lanes + i] += T(1);
    }
    const Vector<T> start = p.bias ? load_block(const_data<T>(p.bias), block) : Vector<T>{};
    for (int64_t y = 0; y < lines.count(); ++y) {
      T* const to = static_cast<T*>(p.output) + image * image_size + (lines.begin + y) * p.width * p.channels;
      in_even_tiles(p.width, [&](int64_t x, int64_t n) OVERLOCK_MM_INLINE_LAMBDA {
        Vector<T> sums[kColumns];
        for (int64_t i = 0; i < n; ++i) sums[i] = start;
        convolve_positions<T>(n, packed.at(y, x), offsets, weights, p.kernel_size, p.dilation, sums);
        for (int64_t i = 0; i < n; ++i) store_block(to + (x + i) * p.channels, block, sums[i]);
      });
    }
  }
}

/// convolve() for maps of bfloat16, with weights that are rounded to it.
inline void convolve_bfloat16(const DepthwiseConv2dParams& p, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<float>::lanes;
  const int64_t blocks = number_of_blocks<float>(p.channels), taps = p.kernel_size * p.kernel_size;
  const int64_t border = p.kernel_size / 2 * p.dilation;
  const int64_t most_lines = (p.height + p.strips - 1) / p.strips;
  const int64_t packed_size = Packed<float>::size(most_lines, p.width, border);
  Scratch<float> scratch(packed_size + 2 * taps * lanes);
  Scratch<int64_t> offsets(taps);
  const Packed<float> packed{scratch.take(packed_size), p.width + 2 * border};
  float* const weights = scratch.take(taps * lanes);
  const KernelOfPairs kernel(p.kernel_size, p.dilation, /*distance=*/p.dilation, packed.width, offsets.take(taps),
                             scratch.take(taps * lanes));
  const int64_t image_size = p.height * p.width * p.channels;

  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / blocks / p.strips;
    const ChannelBlock block = block_of<float>(p.channels, item % blocks);
    const Lines lines(p.height, p.strips, item / blocks % p.strips);
    pack_pairs(packed, p.dilation, const_data<BFloat16>(p.input) + image * image_size, p.height, p.width, p.channels,
               block, lines.begin, lines.count(), border);
    pack_weights(const_data<float>(p.weight), taps, 0, taps, block, /*flipped=*/false, weights);
    kernel.pack(weights);
    const Vector<float> start = p.bias ? load_block(const_data<float>(p.bias), block) : Vector<float>{};
    for (int64_t y = 0; y < lines.count(); ++y) {
      BFloat16* const to =
          static_cast<BFloat16*>(p.output) + image * image_size + (lines.begin + y) * p.width * p.channels;
      in_even_tiles(p.width, [&](int64_t x, int64_t n) OVERLOCK_MM_INLINE_LAMBDA {
        Vector<float> sums[kColumns];
        for (int64_t i = 0; i < n; ++i) {
          sums[i] = start;
          if (p.residual) sums[i] += first_of_pair(load(packed.at(y + border, x + border + i)));
        }
        kernel.convolve(n, packed.at(y, x), sums);
        for (int64_t i = 0; i < n; ++i) store_block(to + (x + i) * p.channels, block, sums[i]);
      });
    }
  }
}

template <typename T>
void weight_gradient(const DepthwiseConv2dParams& p, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<T>::lanes;
  const int64_t blocks = number_of_blocks<T>(p.channels), taps = p.kernel_size * p.kernel_size;
  const int64_t border = p.kernel_size / 2 * p.dilation;
  const int64_t most_lines = (p.height + p.strips - 1) / p.strips;
  const int64_t input_size = Packed<T>::size(most_lines, p.width, border);
  const int64_t grads_size = Packed<T>::size(most_lines, p.width, 0);
  Scratch<T> scratch(input_size + grads_size + taps * lanes);
  Packed<T> inputs{scratch.take(input_size), p.width + 2 * border}, grads{scratch.take(grads_size), p.width};
  T* const sums = scratch.take(taps * lanes);
  const int64_t image_size = p.height * p.width * p.channels;

  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = item / blocks, image = part / p.strips;
    const ChannelBlock block = block_of<T>(p.channels, item % blocks);
    const Lines lines(p.height, p.strips, part % p.strips);
    inputs.pack(const_data<T>(p.input) + image * image_size, p.height, p.width, p.channels, block, lines.begin,
                lines.count(), border, Vector<T>{});
    grads.pack(const_data<T>(p.grad_output) + image * image_size, p.height, p.width, p.channels, block, lines.begin,
               lines.count(), 0, Vector<T>{});
    for (int64_t i = 0; i < taps * lanes; ++i) sums[i] = T(0);
    correlate(grads, inputs, lines.count(), p.width, p.kernel_size, p.dilation, sums);
    unpack_gradients(sums, taps, block, taps, static_cast<T*>(p.grad_weight) + part * p.channels * taps);
  }
}

template <typename T>
constexpr DepthwiseConv2dKernels<T> kDepthwiseConv2dKernels = {Simd<T>::lanes,
                                                               &stream<T>,
                                                               &stream_backward<T>,
                                                               &convolve<T>,
                                                               kMultipliesBFloat16 ? &convolve_bfloat16 : nullptr,
                                                               &weight_gradient<T>};

}  // namespace

template <>
const DepthwiseConv2dKernels<float>& table() {
  return kDepthwiseConv2dKernels<float>;
}
template <>
const DepthwiseConv2dKernels<double>& table() {
  return kDepthwiseConv2dKernels<double>;
}

}  // namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE
