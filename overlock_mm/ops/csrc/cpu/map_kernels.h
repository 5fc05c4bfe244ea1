// Static depth-wise convolutions and response norms over channels_last maps on the CPU. Included once for each
// instruction set, under the rules of contmix_kernels.h. docs/performance.md says why they are as they are.
//
// The lanes of a vector are channels. Two forms of a convolution:
// - streamed (3x3, bound by memory): line by line with all channels, read where they lie, three lines of which stay in
//   the L2 cache. What goes through GELU first, or is overwritten, passes through a ring of three lines.
// - by blocks (large kernels, bound by multiply-adds): one vector of channels of a strip is packed with a border of
//   zeros, so that no tap asks where it is, and a tile of positions is accumulated in registers over all taps.

#include "simd.h"

namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE {
namespace {

// ---------------------------------------------------------------------------------------------------------- channels

/// The channels that a vector holds: `count` from `first` on. The last block of a map begins earlier, so that it is
/// whole, and its first `skip` lanes repeat channels of the block before.
struct Block {
  int64_t first, skip, count;
};

template <typename T>
inline int64_t number_of_blocks(int64_t channels) {
  return (channels + Simd<T>::lanes - 1) / Simd<T>::lanes;
}

template <typename T>
inline Block block_of(int64_t channels, int64_t index) {
  constexpr int64_t lanes = Simd<T>::lanes;
  if (channels < lanes) return {0, 0, channels};
  const int64_t first = min(index * lanes, channels - lanes);
  return {first, index * lanes - first, lanes};
}

/// Channels of the position at `from`.
template <typename E>
OVERLOCK_MM_INLINE Vector<Computed<E>> load_block(const E* from, const Block& block) {
  if (block.count == Simd<Computed<E>>::lanes) return load(from + block.first);
  Vector<Computed<E>> out{};
  for (int64_t i = 0; i < block.count; ++i) out[i] = load_one(from + i);
  return out;
}

template <typename T>
OVERLOCK_MM_INLINE void store_block(T* to, const Block& block, Vector<T> x) {
  if (block.skip == 0 && block.count == Simd<T>::lanes) {
    store(to + block.first, x);
  } else {
    for (int64_t i = block.skip; i < block.count; ++i) to[block.first + i] = x[i];
  }
}

/// The same where all channels are written by one thread: repeated ones are written twice.
template <typename E>
OVERLOCK_MM_INLINE void store_repeated(E* to, const Block& block, Vector<Computed<E>> x) {
  if (block.count == Simd<Computed<E>>::lanes) {
    store(to + block.first, x);
  } else {
    store_lanes(to, x, block.count);
  }
}

/// Weights (C, taps) of a block as (taps, lanes).
template <typename T>
void pack_weights(const T* weights, int64_t taps_of_channel, int64_t first_tap, int64_t taps, const Block& block,
                  bool flipped, T* to) {
  for (int64_t t = 0; t < taps; ++t) {
    for (int64_t i = 0; i < Simd<T>::lanes; ++i) {
      const int64_t tap = first_tap + (flipped ? taps - 1 - t : t);
      *to++ = i < block.count ? weights[(block.first + i) * taps_of_channel + tap] : T(0);
    }
  }
}

/// Lines [begin, end) of one of `strips` parts of a map.
struct Lines {
  int64_t begin, end;

  Lines(int64_t height, int64_t strips, int64_t strip)
      : begin(strip * height / strips), end((strip + 1) * height / strips) {}
  int64_t count() const { return end - begin; }
};

// ------------------------------------------------------------------------------------------------------------ layout

template <typename T>
void transpose(const TransposeParams& p, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<T>::lanes, block = TransposeParams::kBlock;
  const int64_t row_blocks = (p.rows + block - 1) / block, column_blocks = (p.columns + block - 1) / block;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / (row_blocks * column_blocks), of_image = item % (row_blocks * column_blocks);
    const int64_t first_row = of_image / column_blocks * block, first_column = of_image % column_blocks * block;
    const int64_t last_row = min(first_row + block, p.rows), last_column = min(first_column + block, p.columns);
    const T* const from = const_data<T>(p.from) + image * p.rows * p.columns;
    T* const to = static_cast<T*>(p.to) + image * p.rows * p.columns;
    for (int64_t row = first_row; row < last_row; row += lanes) {
      for (int64_t column = first_column; column < last_column; column += lanes) {
        if (row + lanes <= last_row && column + lanes <= last_column) {
          Vector<T> tile[lanes];
#pragma GCC unroll 16
          for (int i = 0; i < lanes; ++i) tile[i] = load(from + (row + i) * p.columns + column);
          transpose_square<T>(tile);
#pragma GCC unroll 16
          for (int i = 0; i < lanes; ++i) store(to + (column + i) * p.rows + row, tile[i]);
          continue;
        }
        for (int64_t y = row; y < min(row + lanes, last_row); ++y) {
          for (int64_t x = column; x < min(column + lanes, last_column); ++x)
            to[x * p.rows + y] = from[y * p.columns + x];
        }
      }
    }
  }
}

// -------------------------------------------------------------------------------------------------------------- GELU

/// The cumulative distribution function of the normal distribution.
template <typename T>
OVERLOCK_MM_INLINE Vector<T> normal_below(Vector<T> x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    // erf(z) / z over z², rational, minimax on |z| < 3.95, from where on a float's erf is 1: relative error 2e-8.
    constexpr float limit = 3.95f;
    const Vector<T> z = x * T(0.7071067811865476);
    const Vector<T> inside = z > limit ? Vector<T>{} + limit : (z < -limit ? Vector<T>{} - limit : z);
    const Vector<T> u = inside * inside;
    Vector<T> p = u * 2.0259068455440413e-06f + 0.0002846884509476973f;
    p = p * u + 0.0038081843889094f;
    p = p * u + 0.0528755168876133f;
    p = p * u + 0.1915508156954838f;
    p = p * u + 1.1283791437320914f;
    Vector<T> q = u * 3.783182662903132e-05f + 0.0011707316964231116f;
    q = q * u + 0.015055135052424248f;
    q = q * u + 0.1145598358480844f;
    q = q * u + 0.5030901659239503f;
    q = q * u + 1.0f;
    const Vector<T> erf = inside * p / q;
    const Vector<T> bounded = erf > 1.0f ? Vector<T>{} + 1.0f : (erf < -1.0f ? Vector<T>{} - 1.0f : erf);
    return bounded * 0.5f + 0.5f;
  } else {
    Vector<T> out;
    for (int i = 0; i < Simd<T>::lanes; ++i) out[i] = T(0.5) * std::erfc(x[i] * T(-0.7071067811865476));
    return out;
  }
}

/// GELU and its derivative.
template <typename T>
OVERLOCK_MM_INLINE Vector<T> gelu(Vector<T> x) {
  return x * normal_below<T>(x);
}

template <typename T>
OVERLOCK_MM_INLINE Vector<T> gelu_slope(Vector<T> x, Vector<T> below) {
  constexpr double density_at_0 = 0.3989422804014327;  // 1 / sqrt(2 pi)
  return below + x * exp2<T>(x * x * T(-0.5 * kLog2E)) * T(density_at_0);
}

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
    // The lines above are in the cache. The processor does not foresee the way of a tile over this one.
    if (line == kStreamed - 1) {
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) __builtin_prefetch(at + (n + i + 1) * stride);
    }
  }
};

/// Line y of an image (H, W, C), null outside of it.
template <typename E>
const E* line_of(const DepthwiseParams& p, const void* map, int64_t image, int64_t y) {
  return y < 0 || y >= p.height ? nullptr : const_data<E>(map) + (image * p.height + y) * p.width * p.channels;
}

/// Line y where it lies. Only for as many channels as a vector has lanes, or more: Ring is for the others.
template <typename E>
Around<E> around_line(const DepthwiseParams& p, const void* map, int64_t image, int64_t y) {
  return {{line_of<E>(p, map, image, y - 1), line_of<E>(p, map, image, y), line_of<E>(p, map, image, y + 1)},
          p.channels,
          p.width};
}

/// The last three lines of a map that were pushed, with whole vectors of channels.
template <typename T>
class Ring {
 public:
  /// A vector more than the channels, lest the positions of a tile share a few sets of the cache.
  static int64_t stride(int64_t channels) { return round_up<T>(channels) + Simd<T>::lanes; }
  static int64_t size(int64_t channels, int64_t width) { return kStreamed * width * stride(channels); }

  /// `data`: memory for `size` numbers.
  Ring(const DepthwiseParams& p, T* data) : p_(p), stride_(stride(p.channels)), data_(data) {}

  /// Line y, if it was pushed last or one or two lines before.
  T* line(int64_t y) const { return data_ + y % kStreamed * p_.width * stride_; }
  int64_t stride() const { return stride_; }

  /// Line y, which was pushed one line before the last, or last at the end of the map.
  Around<T> around(int64_t y) const {
    return {{y > 0 ? line(y - 1) : nullptr, line(y), y + 1 < p_.height ? line(y + 1) : nullptr}, stride_, p_.width};
  }

  /// Take in line y, (W, C) at `from`: function(vector) of it. Nothing for a line outside the map, which is null.
  template <typename E, typename Function>
  OVERLOCK_MM_INLINE void push(const E* from, int64_t y, Function function) {
    if (!from) return;
    T* to = line(y);
    const int64_t blocks = number_of_blocks<T>(p_.channels);
    for (int64_t x = 0; x < p_.width; ++x, from += p_.channels, to += stride_) {
      for (int64_t b = 0; b < blocks; ++b) {
        const Block block = block_of<T>(p_.channels, b);
        store(to + block.first, function(load_block(from, block), x, block));
      }
    }
  }

 private:
  const DepthwiseParams& p_;
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

/// A line, convolved. Tiles go through all channels before the next tile: what lies side by side is read
/// and written together.
template <typename T, typename E, typename Start, typename Finish>
struct StreamedLine {
  Around<E> around;
  int64_t channels;
  const T* weights;  ///< (blocks, 9, lanes)
  Start start;       ///< of a block: what its sums begin with
  Finish finish;     ///< takes a position, a block and its sum
  T* squares;        ///< (blocks, lanes), of the sums, or null

  template <int n>
  OVERLOCK_MM_INLINE void operator()(int64_t x) const {
    const T* block_weights = weights;
    const int64_t blocks = number_of_blocks<T>(channels);
    for (int64_t b = 0; b < blocks; ++b, block_weights += kStreamed * kStreamed * Simd<T>::lanes) {
      const Block block = block_of<T>(channels, b);
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

/// The weights of all blocks, (blocks, 9, lanes), with the residual connection as a 1 on the middle tap.
template <typename T>
void pack_streamed_weights(const DepthwiseParams& p, bool flipped, T* to) {
  constexpr int64_t lanes = Simd<T>::lanes, taps = kStreamed * kStreamed;
  for (int64_t b = 0; b < number_of_blocks<T>(p.channels); ++b, to += taps * lanes) {
    pack_weights(const_data<T>(p.weight), taps, 0, taps, block_of<T>(p.channels, b), flipped, to);
    if (p.residual) {
      for (int64_t i = 0; i < lanes; ++i) to[taps / 2 * lanes + i] += T(1);
    }
  }
}

/// Maps of E, computed with in T.
template <typename T, typename E>
void stream_maps(const DepthwiseParams& p, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<T>::lanes, taps = kStreamed * kStreamed;
  const int64_t blocks = number_of_blocks<T>(p.channels);
  // In place, and with channels that fill no vector, lines cannot be read where they lie.
  const bool pushes = p.gelu || p.input == p.output || p.channels < lanes;
  const int64_t ring_size = pushes ? Ring<T>::size(p.channels, p.width) : 0;
  Scratch<T> scratch(ring_size + blocks * (taps + 1) * lanes);
  Ring<T> ring(p, scratch.take(ring_size));
  T* const weights = scratch.take(blocks * taps * lanes);
  T* const squares = p.squares ? scratch.take(blocks * lanes) : nullptr;
  pack_streamed_weights(p, /*flipped=*/false, weights);
  const T* const bias = const_data<T>(p.bias);
  const int64_t image_size = p.height * p.width * p.channels;

  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.strips, strip = item % p.strips;
    E* const output = static_cast<E*>(p.output) + image * image_size;
    const Lines lines(p.height, p.strips, strip);
    for (int64_t i = 0; squares && i < blocks * lanes; ++i) squares[i] = T(0);
    for (int64_t pushed = lines.begin - 1; pushed <= lines.end; ++pushed) {
      const E* from = pushes ? line_of<E>(p, p.input, image, pushed) : nullptr;
      if (p.borders && from && (pushed < lines.begin || pushed == lines.end)) {
        const int64_t border = pushed < lines.begin ? 2 * strip - 2 : 2 * strip + 1;
        from = const_data<E>(p.borders) + (image * 2 * (p.strips - 1) + border) * p.width * p.channels;
      }
      if (p.gelu) {
        ring.push(from, pushed,
                  [](Vector<T> x, int64_t, const Block&) OVERLOCK_MM_INLINE_LAMBDA { return gelu<T>(x); });
      } else {
        ring.push(from, pushed, [](Vector<T> x, int64_t, const Block&) OVERLOCK_MM_INLINE_LAMBDA { return x; });
      }
      const int64_t y = pushed - 1;
      if (y < lines.begin) continue;
      E* const to = output + y * p.width * p.channels;
      const auto convolve = [&](const auto& around) OVERLOCK_MM_INLINE_LAMBDA {
        convolve_line<T>(
            around, p.channels, weights,
            [&](const Block& block) OVERLOCK_MM_INLINE_LAMBDA { return bias ? load_block(bias, block) : Vector<T>{}; },
            [&](int64_t x, const Block& block, Vector<T> sum)
                OVERLOCK_MM_INLINE_LAMBDA { store_repeated(to + x * p.channels, block, sum); },
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
void stream(const DepthwiseParams& p, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (p.bfloat16) return stream_maps<T, BFloat16>(p, begin, end);
  }
  stream_maps<T, T>(p, begin, end);
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
void stream_maps_backward(const DepthwiseParams& p, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<T>::lanes, taps = kStreamed * kStreamed;
  const int64_t blocks = number_of_blocks<T>(p.channels);
  const int64_t ring_size = Ring<T>::size(p.channels, p.width), sums_size = blocks * (taps + 1) * lanes;
  // Channels that fill no vector cannot be read where they lie.
  const bool pushes_grads = p.channels < lanes, pushes_inputs = p.gelu || pushes_grads;
  Scratch<T> scratch((pushes_grads + pushes_inputs + p.gelu) * ring_size + blocks * taps * lanes + sums_size);
  Ring<T> grads(p, pushes_grads ? scratch.take(ring_size) : nullptr);
  Ring<T> inputs(p, pushes_inputs ? scratch.take(ring_size) : nullptr);
  // gelu'(input), line by line as the inputs.
  T* const slopes = p.gelu ? scratch.take(ring_size) : nullptr;
  T* const weights = scratch.take(blocks * taps * lanes);
  T* const sums = scratch.take(sums_size);
  pack_streamed_weights(p, /*flipped=*/true, weights);
  const int64_t stride = inputs.stride();
  const auto slopes_of = [&](int64_t y) { return slopes + (y + kStreamed) % kStreamed * p.width * stride; };
  const int64_t image_size = p.height * p.width * p.channels;

  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.strips;
    const Lines lines(p.height, p.strips, item % p.strips);
    for (int64_t i = 0; i < sums_size; ++i) sums[i] = T(0);
    for (int64_t pushed = lines.begin - 1; pushed <= lines.end; ++pushed) {
      if (pushes_grads) {
        grads.push(line_of<E>(p, p.grad_output, image, pushed), pushed,
                   [](Vector<T> g, int64_t, const Block&) OVERLOCK_MM_INLINE_LAMBDA { return g; });
      }
      const E* const input = pushes_inputs ? line_of<E>(p, p.input, image, pushed) : nullptr;
      if (p.gelu) {
        T* const to = slopes_of(pushed);
        inputs.push(input, pushed, [&](Vector<T> x, int64_t column, const Block& block) OVERLOCK_MM_INLINE_LAMBDA {
          const Vector<T> below = normal_below<T>(x);
          store(to + column * stride + block.first, gelu_slope<T>(x, below));
          return x * below;
        });
      } else {
        inputs.push(input, pushed, [](Vector<T> x, int64_t, const Block&) OVERLOCK_MM_INLINE_LAMBDA { return x; });
      }
      const int64_t y = pushed - 1;
      if (y < lines.begin) continue;
      const auto differentiate = [&](const auto& around_input, const auto& around_grad) OVERLOCK_MM_INLINE_LAMBDA {
        if (p.grad_input) {
          E* const to = static_cast<E*>(p.grad_input) + image * image_size + y * p.width * p.channels;
          const T* const slope = p.gelu ? slopes_of(y) : nullptr;
          convolve_line<T>(
              around_grad, p.channels, weights, [](const Block&) OVERLOCK_MM_INLINE_LAMBDA { return Vector<T>{}; },
              [&](int64_t x, const Block& block, Vector<T> sum) OVERLOCK_MM_INLINE_LAMBDA {
                if (slope) sum *= load(slope + x * stride + block.first);
                store_repeated(to + x * p.channels, block, sum);
              });
        }
        if (p.grad_weight || p.grad_bias)
          in_tiles<kGradientTile>(0, p.width, streamed_gradient<T>(around_input, around_grad, p.channels, sums));
      };
      if (pushes_grads) {
        differentiate(inputs.around(y), grads.around(y));
      } else if (pushes_inputs) {
        differentiate(inputs.around(y), around_line<E>(p, p.grad_output, image, y));
      } else {
        differentiate(around_line<E>(p, p.input, image, y), around_line<E>(p, p.grad_output, image, y));
      }
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const Block block = block_of<T>(p.channels, b);
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
void stream_backward(const DepthwiseParams& p, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (p.bfloat16) return stream_maps_backward<T, BFloat16>(p, begin, end);
  }
  stream_maps_backward<T, T>(p, begin, end);
}

// --------------------------------------------------------------------------------------------------------- by blocks

constexpr int kColumns = 12;  // positions of a line in registers
constexpr int kTaps = 9;      // taps of a line of the kernel in registers, for their gradients

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
  void pack(const T* image, int64_t height, int64_t columns, int64_t channels, const Block& block, int64_t first,
            int64_t lines, int64_t border, Vector<T> shift) {
    T* to = data;
    for (int64_t y = first - border; y < first + lines + border; ++y) {
      const bool inside = y >= 0 && y < height;
      const T* from = image + y * columns * channels;
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

template <typename T, int n>
OVERLOCK_MM_NOINLINE void convolve_tile(const T* in, const int64_t* offsets, const T* weights, int64_t taps,
                                        Vector<T>* sums) {
  Vector<T> acc[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) acc[i] = sums[i];
  for (int64_t t = 0; t < taps; ++t) {
    const Vector<T> w = load(weights + t * Simd<T>::lanes);
    const T* from = in + offsets[t];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) acc[i] += w * load(from + i * Simd<T>::lanes);
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) sums[i] = acc[i];
}

/// Add to the sums of n <= kColumns positions, of which the first reads its first tap at `in`.
template <typename T>
inline void convolve_positions(int64_t n, const T* in, const int64_t* offsets, const T* weights, int64_t taps,
                               Vector<T>* sums) {
  using Function = void (*)(const T*, const int64_t*, const T*, int64_t, Vector<T>*);
  static constexpr Function functions[kColumns] = {&convolve_tile<T, 1>,  &convolve_tile<T, 2>,  &convolve_tile<T, 3>,
                                                   &convolve_tile<T, 4>,  &convolve_tile<T, 5>,  &convolve_tile<T, 6>,
                                                   &convolve_tile<T, 7>,  &convolve_tile<T, 8>,  &convolve_tile<T, 9>,
                                                   &convolve_tile<T, 10>, &convolve_tile<T, 11>, &convolve_tile<T, 12>};
  functions[n - 1](in, offsets, weights, taps, sums);
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

template <typename T>
void convolve(const DepthwiseParams& p, int64_t begin, int64_t end) {
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
    const Block block = block_of<T>(p.channels, item % blocks);
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
        convolve_positions<T>(n, packed.at(y, x), offsets, weights, taps, sums);
        for (int64_t i = 0; i < n; ++i) store_block(to + (x + i) * p.channels, block, sums[i]);
      });
    }
  }
}

/// Add products of gradients and inputs, over the positions of a line, to the sums of n taps that are `step` apart. A
/// line is summed by itself first: rounding grows with the length of a sum.
template <typename T, int n>
OVERLOCK_MM_NOINLINE void correlate_tile(const T* grads, const T* in, int64_t positions, int64_t step, T* sums) {
  Vector<T> acc[n] = {};
  for (int64_t x = 0; x < positions; ++x, grads += Simd<T>::lanes, in += Simd<T>::lanes) {
    const Vector<T> grad = load(grads);
    const T* from = in;
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i, from += step) acc[i] += grad * load(from);
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    T* const sum = sums + i * Simd<T>::lanes;
    store(sum, load(sum) + acc[i]);
  }
}

/// Add to the gradients of a kernel's taps, (k * k, lanes). `grads` has the lines of the output, `inputs` those that
/// the first tap reads.
template <typename T>
void correlate(const Packed<T>& grads, const Packed<T>& inputs, int64_t lines, int64_t columns, int64_t kernel_size,
               int64_t dilation, T* sums) {
  using Function = void (*)(const T*, const T*, int64_t, int64_t, T*);
  static constexpr Function functions[kTaps] = {&correlate_tile<T, 1>, &correlate_tile<T, 2>, &correlate_tile<T, 3>,
                                                &correlate_tile<T, 4>, &correlate_tile<T, 5>, &correlate_tile<T, 6>,
                                                &correlate_tile<T, 7>, &correlate_tile<T, 8>, &correlate_tile<T, 9>};
  constexpr int64_t lanes = Simd<T>::lanes;
  const int64_t parts = (kernel_size + kTaps - 1) / kTaps;
  for (int64_t ky = 0; ky < kernel_size; ++ky) {
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t kx = part * kernel_size / parts, n = (part + 1) * kernel_size / parts - kx;
      for (int64_t y = 0; y < lines; ++y) {
        functions[n - 1](grads.at(y, 0), inputs.at(y + ky * dilation, kx * dilation), columns, dilation * lanes,
                         sums + (ky * kernel_size + kx) * lanes);
      }
    }
  }
}

/// Gradients (taps, lanes) of a block to (C, taps).
template <typename T>
void unpack_gradients(const T* sums, int64_t taps, const Block& block, int64_t taps_of_channel, T* to) {
  for (int64_t i = block.skip; i < block.count; ++i) {
    for (int64_t t = 0; t < taps; ++t) to[(block.first + i) * taps_of_channel + t] = sums[t * Simd<T>::lanes + i];
  }
}

template <typename T>
void weight_gradient(const DepthwiseParams& p, int64_t begin, int64_t end) {
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
    const Block block = block_of<T>(p.channels, item % blocks);
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

// ----------------------------------------------------------------------------------------- branches with batch norms

/// What is known of a branch before its map is read.
template <typename T>
struct Branch {
  int64_t kernel_size, dilation, taps;
  int64_t first_tap;  ///< in the weights of all branches
  int64_t corner;     ///< its first tap in the packed map, from the corner of the widest branch on, in elements
  const int64_t* offsets;
};

template <typename T>
class Branches {
 public:
  Branches(const BranchParams& p, int64_t packed_width) : offsets_(p.taps()) {
    int64_t first_tap = 0;
    for (int i = 0; i < p.branches; ++i) {
      const int64_t k = p.kernel_size[i], d = p.dilation[i], margin = p.reach - k / 2 * d;
      int64_t* const offsets = offsets_.take(k * k);
      tap_offsets<T>(k, d, packed_width, offsets);
      branches_[i] = {k, d, k * k, first_tap, (margin * packed_width + margin) * Simd<T>::lanes, offsets};
      first_tap += k * k;
    }
  }
  const Branch<T>& operator[](int i) const { return branches_[i]; }

 private:
  Scratch<int64_t> offsets_;
  Branch<T> branches_[BranchParams::kMost];
};

template <typename T>
void pack_branch_weights(const BranchParams& p, const Branches<T>& branches, const Block& block, bool flipped, T* to) {
  for (int i = 0; i < p.branches; ++i) {
    pack_weights(const_data<T>(p.weights), p.taps(), branches[i].first_tap, branches[i].taps, block, flipped,
                 to + branches[i].first_tap * Simd<T>::lanes);
  }
}

template <typename T>
void branch_statistics(const BranchParams& p, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<T>::lanes;
  const int64_t blocks = number_of_blocks<T>(p.channels);
  const int64_t most_lines = (p.height + p.strips - 1) / p.strips;
  const int64_t packed_size = Packed<T>::size(most_lines, p.width, p.reach);
  Scratch<T> scratch(packed_size + p.taps() * lanes);
  Packed<T> packed{scratch.take(packed_size), p.width + 2 * p.reach};
  T* const weights = scratch.take(p.taps() * lanes);
  const Branches<T> branches(p, packed.width);
  const int64_t image_size = p.height * p.width * p.channels;

  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = item / blocks;
    const Block block = block_of<T>(p.channels, item % blocks);
    const Lines lines(p.height, p.strips, part % p.strips);
    packed.pack(const_data<T>(p.input) + part / p.strips * image_size, p.height, p.width, p.channels, block,
                lines.begin, lines.count(), p.reach, Vector<T>{});
    pack_branch_weights(p, branches, block, /*flipped=*/false, weights);
    for (int i = 0; i < p.branches; ++i) {
      const Branch<T>& branch = branches[i];
      const T* const own_weights = weights + branch.first_tap * lanes;
      // Counted from the first position's output, lest a large mean eats up the digits of a small variance.
      Vector<T> shift{}, sum{}, square{};
      convolve_positions<T>(1, packed.at(0, 0) + branch.corner, branch.offsets, own_weights, branch.taps, &shift);
      for (int64_t y = 0; y < lines.count(); ++y) {
        Vector<T> of_line{}, square_of_line{};
        in_even_tiles(p.width, [&](int64_t x, int64_t n) OVERLOCK_MM_INLINE_LAMBDA {
          Vector<T> out[kColumns] = {};
          convolve_positions<T>(n, packed.at(y, x) + branch.corner, branch.offsets, own_weights, branch.taps, out);
          for (int64_t j = 0; j < n; ++j) {
            const Vector<T> distance = out[j] - shift;
            of_line += distance;
            square_of_line += distance * distance;
          }
        });
        sum += of_line;
        square += square_of_line;
      }
      const T count = T(lines.count() * p.width);
      const Vector<T> mean = sum / count;
      const int64_t at = (part * p.branches + i) * p.channels;
      store_block(static_cast<T*>(p.means) + at, block, shift + mean);
      store_block(static_cast<T*>(p.squares) + at, block, square - sum * mean);
    }
  }
}

/// One block of channels of the images that an item of the backward works on, packed.
template <typename T>
class BranchImages {
 public:
  static int64_t size(const BranchParams& p, int64_t images) {
    return images * (2 * Packed<T>::size(p.height, p.width, p.reach) + 2 * Packed<T>::size(p.height, p.width, 0));
  }

  BranchImages(const BranchParams& p, int64_t images, Scratch<T>& scratch)
      : p_(p),
        images_(images),
        bordered_(Packed<T>::size(p.height, p.width, p.reach)),
        plain_(Packed<T>::size(p.height, p.width, 0)),
        inputs_(scratch.take(images * bordered_)),
        distances_(scratch.take(images * bordered_)),
        grads_(scratch.take(images * plain_)),
        grad_inputs_(scratch.take(images * plain_)) {
    for (int64_t i = 0; i < images * bordered_; ++i) distances_[i] = T(0);  // their border stays so
  }

  int64_t bordered_width() const { return p_.width + 2 * p_.reach; }
  Packed<T> input(int64_t i) const { return {inputs_ + i * bordered_, bordered_width()}; }
  /// Of a branch's output from its mean; then the gradient of that output.
  Packed<T> distance(int64_t i) const { return {distances_ + i * bordered_, bordered_width()}; }
  Packed<T> grad(int64_t i) const { return {grads_ + i * plain_, p_.width}; }
  Packed<T> grad_input(int64_t i) const { return {grad_inputs_ + i * plain_, p_.width}; }

  void pack(int64_t first, const Block& block) {
    const int64_t image_size = p_.height * p_.width * p_.channels;
    const Vector<T> grad_mean = load_block(const_data<T>(p_.grad_mean), block);
    for (int64_t i = 0; i < images_; ++i) {
      const int64_t from = (first + i) * image_size;
      input(i).pack(const_data<T>(p_.input) + from, p_.height, p_.width, p_.channels, block, 0, p_.height, p_.reach,
                    Vector<T>{});
      grad(i).pack(const_data<T>(p_.grad_output) + from, p_.height, p_.width, p_.channels, block, 0, p_.height, 0,
                   grad_mean);
    }
    for (int64_t i = 0; i < images_ * plain_; ++i) grad_inputs_[i] = T(0);
  }

 private:
  const BranchParams& p_;
  int64_t images_, bordered_, plain_;
  T *inputs_, *distances_, *grads_, *grad_inputs_;
};

/// Compute the distances of a branch's output from its mean; the sum of their products with the gradient.
template <typename T>
Vector<T> branch_distances(const BranchParams& p, const Branch<T>& branch, const T* weights, Vector<T> mean,
                           const Packed<T>& input, const Packed<T>& grad, const Packed<T>& distance) {
  constexpr int64_t lanes = Simd<T>::lanes;
  Vector<T> product{};
  for (int64_t y = 0; y < p.height; ++y) {
    Vector<T> of_line{};
    in_even_tiles(p.width, [&](int64_t x, int64_t n) OVERLOCK_MM_INLINE_LAMBDA {
      Vector<T> out[kColumns] = {};
      convolve_positions<T>(n, input.at(y, x) + branch.corner, branch.offsets, weights, branch.taps, out);
      const T* const from = grad.at(y, x);
      T* const to = distance.at(y + p.reach, x + p.reach);
      for (int64_t j = 0; j < n; ++j) {
        const Vector<T> own = out[j] - mean;
        store(to + j * lanes, own);
        of_line += own * load(from + j * lanes);
      }
    });
    product += of_line;
  }
  return product;
}

template <typename T>
void branch_gradients(const BranchParams& p, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<T>::lanes;
  const int64_t blocks = number_of_blocks<T>(p.channels), taps = p.taps();
  const int64_t images = p.whole_batch ? p.batch : 1;
  Scratch<T> scratch(BranchImages<T>::size(p, images) + (2 + images) * taps * lanes);
  BranchImages<T> maps(p, images, scratch);
  T* const weights = scratch.take(taps * lanes);
  T* const flipped = scratch.take(taps * lanes);
  T* const sums = scratch.take(images * taps * lanes);
  const Branches<T> branches(p, maps.bordered_width());
  T* const products = static_cast<T*>(p.products);

  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item / blocks;
    const Block block = block_of<T>(p.channels, item % blocks);
    maps.pack(first, block);
    pack_branch_weights(p, branches, block, /*flipped=*/false, weights);
    pack_branch_weights(p, branches, block, /*flipped=*/true, flipped);
    for (int64_t i = 0; i < images * taps * lanes; ++i) sums[i] = T(0);
    for (int b = 0; b < p.branches; ++b) {
      const Branch<T>& branch = branches[b];
      const Vector<T> mean = load_block(const_data<T>(p.mean) + b * p.channels, block);
      Vector<T> product{};
      for (int64_t i = 0; i < images; ++i) {
        const Vector<T> of_image = branch_distances(p, branch, weights + branch.first_tap * lanes, mean, maps.input(i),
                                                    maps.grad(i), maps.distance(i));
        product += of_image;
        if (p.whole_batch || !p.grad_input)
          store_block(products + ((first + i) * p.branches + b) * p.channels, block, of_image);
      }
      if (!p.grad_input) continue;

      if (!p.whole_batch) {
        product = Vector<T>{};
        for (int64_t i = 0; i < p.batch; ++i)
          product += load_block(products + (i * p.branches + b) * p.channels, block);
      }
      const Vector<T> slope = product * load_block(const_data<T>(p.slope_of_product) + b * p.channels, block);
      const Vector<T> scale = load_block(const_data<T>(p.scale) + b * p.channels, block);
      for (int64_t i = 0; i < images; ++i) {
        const Packed<T> of_output = maps.distance(i), grad_input = maps.grad_input(i);
        for (int64_t y = 0; y < p.height; ++y) {
          const T* const grad = maps.grad(i).at(y, 0);
          T* const to = of_output.at(y + p.reach, p.reach);
          for (int64_t x = 0; x < p.width * lanes; x += lanes)
            store(to + x, scale * (load(grad + x) - slope * load(to + x)));
        }
        correlate({of_output.at(p.reach, p.reach), of_output.width},
                  {maps.input(i).data + branch.corner, of_output.width}, p.height, p.width, branch.kernel_size,
                  branch.dilation, sums + (i * taps + branch.first_tap) * lanes);
        for (int64_t y = 0; y < p.height; ++y) {
          in_even_tiles(p.width, [&](int64_t x, int64_t n) OVERLOCK_MM_INLINE_LAMBDA {
            Vector<T> out[kColumns];
            T* const to = grad_input.at(y, x);
            for (int64_t j = 0; j < n; ++j) out[j] = load(to + j * lanes);
            convolve_positions<T>(n, of_output.at(y, x) + branch.corner, branch.offsets,
                                  flipped + branch.first_tap * lanes, branch.taps, out);
            for (int64_t j = 0; j < n; ++j) store(to + j * lanes, out[j]);
          });
        }
      }
    }
    for (int64_t i = 0; p.grad_input && i < images; ++i) {
      unpack_gradients(sums + i * taps * lanes, taps, block, taps,
                       static_cast<T*>(p.grad_weights) + (first + i) * p.channels * taps);
      T* to = static_cast<T*>(p.grad_input) + (first + i) * p.height * p.width * p.channels;
      for (int64_t at = 0; at < p.height * p.width; ++at, to += p.channels)
        store_block(to, block, load(maps.grad_input(i).data + at * lanes));
    }
  }
}

// ---------------------------------------------------------------------------------------------------- response norms

constexpr int kSumBlocks = kVectorBytes == 64 ? 8 : 4;  // vectors of channels that are summed in registers

template <typename T, int n>
OVERLOCK_MM_INLINE void sum_channels(const T* a, const T* b, int64_t stride, int64_t positions, T* products, T* plain) {
  Vector<T> product[n] = {}, sum[n] = {};
  for (int64_t i = 0; i < positions; ++i, a += stride, b += stride) {
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) {
      const Vector<T> x = load(b + j * Simd<T>::lanes);
      product[j] += load(a + j * Simd<T>::lanes) * x;
      if (plain) sum[j] += x;
    }
  }
  for (int j = 0; j < n; ++j) {
    store(products + j * Simd<T>::lanes, product[j]);
    if (plain) store(plain + j * Simd<T>::lanes, sum[j]);
  }
}

template <typename T>
void channel_sums(const ResponseNormParams& p, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<T>::lanes;
  for (int64_t item = begin; item < end; ++item) {
    const Lines part(p.positions, p.strips, item % p.strips);
    const int64_t first = (item / p.strips * p.positions + part.begin) * p.channels;
    const T* const a = const_data<T>(p.input) + first;
    const T* const b = p.other ? const_data<T>(p.other) + first : a;
    T* const products = static_cast<T*>(p.sums) + item * p.channels;
    T* const plain = p.plain_sums ? static_cast<T*>(p.plain_sums) + item * p.channels : nullptr;
    int64_t c = 0;
    for (; c + kSumBlocks * lanes <= p.channels; c += kSumBlocks * lanes) {
      sum_channels<T, kSumBlocks>(a + c, b + c, p.channels, part.count(), products + c, plain ? plain + c : nullptr);
    }
    for (; c + lanes <= p.channels; c += lanes) {
      sum_channels<T, 1>(a + c, b + c, p.channels, part.count(), products + c, plain ? plain + c : nullptr);
    }
    for (; c < p.channels; ++c) {
      T product = 0, sum = 0;
      for (int64_t i = 0; i < part.count(); ++i) {
        product += a[i * p.channels + c] * b[i * p.channels + c];
        sum += b[i * p.channels + c];
      }
      products[c] = product;
      if (plain) plain[c] = sum;
    }
  }
}

template <typename T>
void combine(const ResponseNormParams& p, int64_t begin, int64_t end) {
  const int64_t blocks = number_of_blocks<T>(p.channels);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.strips;
    const Lines part(p.positions, p.strips, item % p.strips);
    const int64_t first = (image * p.positions + part.begin) * p.channels;
    const T* a = const_data<T>(p.input) + first;
    const T* b = p.other ? const_data<T>(p.other) + first : nullptr;
    T* to = static_cast<T*>(p.output) + first;
    const T* const scale = const_data<T>(p.scale) + image * p.channels;
    const T* const other_scale = p.other ? const_data<T>(p.other_scale) + image * p.channels : nullptr;
    for (int64_t i = 0; i < part.count(); ++i) {
      for (int64_t j = 0; j < blocks; ++j) {
        const Block block = block_of<T>(p.channels, j);
        Vector<T> out = load_block(a, block) * load_block(scale, block);
        if (b) out += load_block(b, block) * load_block(other_scale, block);
        if (p.shift) out += load_block(const_data<T>(p.shift), block);
        store_block(to, block, out);  // no channel twice: the output may be the input
      }
      a += p.channels;
      to += p.channels;
      if (b) b += p.channels;
    }
  }
}

template <typename T>
constexpr MapKernels<T> kMapKernels = {
    Simd<T>::lanes,      &transpose<T>,         &stream<T>,           &stream_backward<T>, &convolve<T>,
    &weight_gradient<T>, &branch_statistics<T>, &branch_gradients<T>, &channel_sums<T>,    &combine<T>};

}  // namespace

template <>
const MapKernels<float>& table() {
  return kMapKernels<float>;
}
template <>
const MapKernels<double>& table() {
  return kMapKernels<double>;
}

}  // namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE
