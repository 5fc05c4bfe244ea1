// Branch norms on the CPU, from channel blocks of a map. Included once for each instruction set, under the rules of
// simd.h.

#include "packed.h"
#include "pairs.h"

namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE {
namespace {

/// The taps of one branch.
template <typename T>
struct BranchTaps {
  int64_t kernel_size, dilation, count;
  int64_t first;           ///< among the taps of all branches
  int64_t corner;          ///< where the first tap is in a packed map, from the first tap of the widest branch on
  const int64_t* offsets;  ///< of the others from there
};

/// Those of all branches, in maps that are packed `packed_width` positions wide.
template <typename T>
class TapsOfBranches {
 public:
  TapsOfBranches(const BranchNormsParams& p, int64_t packed_width) : p_(p), offsets_(p.taps()) {
    int64_t first = 0;
    for (int i = 0; i < p.branches; ++i) {
      const int64_t k = p.kernel_size[i], d = p.dilation[i], margin = p.reach - k / 2 * d;
      int64_t* const offsets = offsets_.take(k * k);
      tap_offsets<T>(k, d, packed_width, offsets);
      branches_[i] = {k, d, k * k, first, (margin * packed_width + margin) * Simd<T>::lanes, offsets};
      first += k * k;
    }
  }
  const BranchTaps<T>& operator[](int i) const { return branches_[i]; }

  /// The weights of a channel block, (taps of all branches, lanes).
  void pack_weights_of(const ChannelBlock& block, bool flipped, T* to) const {
    for (int i = 0; i < p_.branches; ++i) {
      pack_weights(const_data<T>(p_.weights), p_.taps(), branches_[i].first, branches_[i].count, block, flipped,
                   to + branches_[i].first * Simd<T>::lanes);
    }
  }

 private:
  const BranchNormsParams& p_;
  Scratch<int64_t> offsets_;
  BranchTaps<T> branches_[BranchNormsParams::kMostBranches];
};

/// The branches' convolutions of a channel block of maps of E. They are packed in T.
template <typename T, typename E>
class BranchConvolutions {
 public:
  /// `weights`: memory for a vector of each tap.
  BranchConvolutions(const BranchNormsParams&, const TapsOfBranches<T>& branches, int64_t, T* weights)
      : branches_(branches), weights_(weights) {}

  /// Arguments as of Packed::pack.
  static void pack(Packed<T> packed, const E* image, int64_t height, int64_t columns, int64_t channels,
                   const ChannelBlock& block, int64_t first, int64_t lines, int64_t border) {
    packed.pack(image, height, columns, channels, block, first, lines, border, Vector<T>{});
  }
  static OVERLOCK_MM_INLINE Vector<T> input_at(const T* packed) { return load(packed); }

  void take_weights_of(const ChannelBlock& block) { branches_.pack_weights_of(block, /*flipped=*/false, weights_); }

  /// Outputs of a branch at n <= kColumns positions, of which the first has its window at `in`.
  OVERLOCK_MM_INLINE void convolve(int branch, int64_t n, const T* in, Vector<T>* out) const {
    const BranchTaps<T>& taps = branches_[branch];
    convolve_positions<T>(n, in + taps.corner, taps.offsets, weights_ + taps.first * Simd<T>::lanes, taps.kernel_size,
                          taps.dilation, out);
  }

 private:
  const TapsOfBranches<T>& branches_;
  T* const weights_;
};

/// Those of bfloat16 are packed as pairs.
template <>
class BranchConvolutions<float, BFloat16> {
 public:
  BranchConvolutions(const BranchNormsParams& p, const TapsOfBranches<float>& branches, int64_t packed_width,
                     float* weights)
      : p_(p), branches_(branches), weights_(weights), offsets_(p.taps()), scratch_(p.taps() * Simd<float>::lanes) {
    for (int i = 0; i < p.branches; ++i) {
      const BranchTaps<float>& taps = branches[i];
      kernels_[i] = KernelOfPairs(taps.kernel_size, taps.dilation, /*distance=*/1, packed_width,
                                  offsets_.take(taps.count), scratch_.take(taps.count * Simd<float>::lanes));
    }
  }

  static void pack(Packed<float> packed, const BFloat16* image, int64_t height, int64_t columns, int64_t channels,
                   const ChannelBlock& block, int64_t first, int64_t lines, int64_t border) {
    pack_pairs(packed, /*distance=*/1, image, height, columns, channels, block, first, lines, border);
  }
  static OVERLOCK_MM_INLINE Vector<float> input_at(const float* packed) { return first_of_pair(load(packed)); }

  void take_weights_of(const ChannelBlock& block) {
    branches_.pack_weights_of(block, /*flipped=*/false, weights_);
    for (int i = 0; i < p_.branches; ++i) kernels_[i].pack(weights_ + branches_[i].first * Simd<float>::lanes);
  }

  OVERLOCK_MM_INLINE void convolve(int branch, int64_t n, const float* in, Vector<float>* out) const {
    kernels_[branch].convolve(n, in + branches_[branch].corner, out);
  }

 private:
  const BranchNormsParams& p_;
  const TapsOfBranches<float>& branches_;
  float* const weights_;
  Scratch<int64_t> offsets_;
  Scratch<float> scratch_;
  KernelOfPairs kernels_[BranchNormsParams::kMostBranches];
};

/// The mean of a branch's output over a strip, and the sum of squared distances from it.
template <typename T>
struct BranchMoments {
  Vector<T> mean, square;
};

template <typename T, typename E>
BranchMoments<T> branch_moments(const Packed<T>& packed, int64_t lines, int64_t width,
                                const BranchConvolutions<T, E>& convolutions, int branch) {
  // Counted from the first position's output: a large mean would take the digits of a small variance.
  Vector<T> shift{}, sum{}, square{};
  convolutions.convolve(branch, 1, packed.at(0, 0), &shift);
  for (int64_t y = 0; y < lines; ++y) {
    Vector<T> line_sum{}, line_square{};
    in_even_tiles(width, [&](int64_t x, int64_t n) OVERLOCK_MM_INLINE_LAMBDA {
      Vector<T> out[kColumns] = {};
      convolutions.convolve(branch, n, packed.at(y, x), out);
      for (int64_t j = 0; j < n; ++j) {
        const Vector<T> distance = out[j] - shift;
        line_sum += distance;
        line_square += distance * distance;
      }
    });
    sum += line_sum;
    square += line_square;
  }
  const Vector<T> mean = sum / T(lines * width);
  return {shift + mean, square - sum * mean};
}

template <typename T, typename E>
void statistics_of_maps(const BranchNormsParams& p, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<T>::lanes;
  const int64_t blocks = number_of_blocks<T>(p.channels);
  const int64_t most_lines = (p.height + p.strips - 1) / p.strips;
  const int64_t packed_size = Packed<T>::size(most_lines, p.width, p.reach);
  Scratch<T> scratch(packed_size + p.taps() * lanes);
  Packed<T> packed{scratch.take(packed_size), p.width + 2 * p.reach};
  const TapsOfBranches<T> branches(p, packed.width);
  BranchConvolutions<T, E> convolutions(p, branches, packed.width, scratch.take(p.taps() * lanes));
  const int64_t image_size = p.height * p.width * p.channels;

  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = item / blocks;
    const ChannelBlock block = block_of<T>(p.channels, item % blocks);
    const Lines lines(p.height, p.strips, part % p.strips);
    convolutions.pack(packed, const_data<E>(p.input) + part / p.strips * image_size, p.height, p.width, p.channels,
                      block, lines.begin, lines.count(), p.reach);
    convolutions.take_weights_of(block);
    for (int i = 0; i < p.branches; ++i) {
      const BranchMoments<T> moments = branch_moments(packed, lines.count(), p.width, convolutions, i);
      const int64_t at = (part * p.branches + i) * p.channels;
      store_block(static_cast<T*>(p.means) + at, block, moments.mean);
      store_block(static_cast<T*>(p.squares) + at, block, moments.square);
    }
  }
}

template <typename T>
void branch_statistics(const BranchNormsParams& p, int64_t begin, int64_t end) {
  if constexpr (kMultipliesBFloat16 && sizeof(T) == sizeof(float)) {
    if (p.bfloat16) return statistics_of_maps<T, BFloat16>(p, begin, end);
  }
  statistics_of_maps<T, T>(p, begin, end);
}

/// A channel block of the images of E that an item of the backward works on, packed.
template <typename T, typename E>
class BranchImages {
 public:
  static int64_t size(const BranchNormsParams& p, int64_t images) {
    return images * (2 * Packed<T>::size(p.height, p.width, p.reach) + 2 * Packed<T>::size(p.height, p.width, 0));
  }

  BranchImages(const BranchNormsParams& p, int64_t images, Scratch<T>& scratch)
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
  /// Distances of a branch's output from its mean; then the gradient of that output.
  Packed<T> distance(int64_t i) const { return {distances_ + i * bordered_, bordered_width()}; }
  Packed<T> grad(int64_t i) const { return {grads_ + i * plain_, p_.width}; }
  Packed<T> grad_input(int64_t i) const { return {grad_inputs_ + i * plain_, p_.width}; }

  void pack(int64_t first, const ChannelBlock& block) {
    const int64_t image_size = p_.height * p_.width * p_.channels;
    const Vector<T> grad_mean = load_block(const_data<T>(p_.grad_mean), block);
    for (int64_t i = 0; i < images_; ++i) {
      const int64_t from = (first + i) * image_size;
      BranchConvolutions<T, E>::pack(input(i), const_data<E>(p_.input) + from, p_.height, p_.width, p_.channels, block,
                                     0, p_.height, p_.reach);
      grad(i).pack(const_data<E>(p_.grad_output) + from, p_.height, p_.width, p_.channels, block, 0, p_.height, 0,
                   grad_mean);
    }
    for (int64_t i = 0; i < images_ * plain_; ++i) grad_inputs_[i] = T(0);
  }

 private:
  const BranchNormsParams& p_;
  int64_t images_, bordered_, plain_;
  T *inputs_, *distances_, *grads_, *grad_inputs_;
};

/// The gradients of a channel block, on one thread. Those of branches and taps are in T.
template <typename T, typename E>
class BranchGradients {
 public:
  explicit BranchGradients(const BranchNormsParams& p)
      : p_(p),
        images_(p.whole_batch ? p.batch : 1),
        taps_(p.taps()),
        scratch_(BranchImages<T, E>::size(p, images_) + (2 + images_) * taps_ * lanes),
        maps_(p, images_, scratch_),
        flipped_(scratch_.take(taps_ * lanes)),
        sums_(scratch_.take(images_ * taps_ * lanes)),
        branches_(p, maps_.bordered_width()),
        convolutions_(p, branches_, maps_.bordered_width(), scratch_.take(taps_ * lanes)) {}

  /// A block of an image, or of the whole batch.
  void run(int64_t item) {
    const int64_t blocks = number_of_blocks<T>(p_.channels);
    first_image_ = item / blocks;
    block_ = block_of<T>(p_.channels, item % blocks);
    maps_.pack(first_image_, block_);
    convolutions_.take_weights_of(block_);
    branches_.pack_weights_of(block_, /*flipped=*/true, flipped_);
    for (int64_t i = 0; i < images_ * taps_ * lanes; ++i) sums_[i] = T(0);
    for (int b = 0; b < p_.branches; ++b) {
      Vector<T> product = multiply_distances(b);
      if (!p_.grad_input) continue;
      if (p_.product) product = load_statistic(p_.product, b);
      for (int64_t i = 0; i < images_; ++i) {
        differentiate_norm(b, i, product);
        correlate_with_input(b, i);
        add_to_grad_input(b, i);
      }
    }
    for (int64_t i = 0; p_.grad_input && i < images_; ++i) write(i);
  }

 private:
  static constexpr int64_t lanes = Simd<T>::lanes;

  Vector<T> load_statistic(const void* statistic, int b) const {
    return load_block(const_data<T>(statistic) + b * p_.channels, block_);
  }
  T* product_at(int64_t image, int b) const {
    return static_cast<T*>(p_.products) + (image * p_.branches + b) * p_.channels;
  }

  /// Compute the distances of branch b's output from its mean; the sum of their products with the gradient.
  Vector<T> multiply_distances(int b) {
    const Vector<T> mean = load_statistic(p_.mean, b);
    Vector<T> product{};
    for (int64_t i = 0; i < images_; ++i) {
      const Vector<T> own = multiply_distances(b, i, mean);
      product += own;
      if (!p_.product) store_block(product_at(first_image_ + i, b), block_, own);
    }
    return product;
  }

  Vector<T> multiply_distances(int b, int64_t i, Vector<T> mean) {
    const Packed<T> input = maps_.input(i), grad = maps_.grad(i), distance = maps_.distance(i);
    Vector<T> product{};
    for (int64_t y = 0; y < p_.height; ++y) {
      Vector<T> line_product{};
      in_even_tiles(p_.width, [&](int64_t x, int64_t n) OVERLOCK_MM_INLINE_LAMBDA {
        Vector<T> out[kColumns] = {};
        convolutions_.convolve(b, n, input.at(y, x), out);
        const T* const from = grad.at(y, x);
        T* const to = distance.at(y + p_.reach, x + p_.reach);
        for (int64_t j = 0; j < n; ++j) {
          const Vector<T> own = out[j] - mean;
          store(to + j * lanes, own);
          line_product += own * load(from + j * lanes);
        }
      });
      product += line_product;
    }
    return product;
  }

  /// The gradient of branch b's output, in the place of its distances.
  void differentiate_norm(int b, int64_t i, Vector<T> product) {
    const Vector<T> slope = product * load_statistic(p_.slope_of_product, b), scale = load_statistic(p_.scale, b);
    const Packed<T> distance = maps_.distance(i);
    for (int64_t y = 0; y < p_.height; ++y) {
      const T* const grad = maps_.grad(i).at(y, 0);
      T* const to = distance.at(y + p_.reach, p_.reach);
      for (int64_t x = 0; x < p_.width * lanes; x += lanes)
        store(to + x, scale * (load(grad + x) - slope * load(to + x)));
    }
  }

  /// Gradients of the taps.
  void correlate_with_input(int b, int64_t i) {
    const BranchTaps<T>& taps = branches_[b];
    const Packed<T> grad_branch = maps_.distance(i);
    correlate<T, &BranchConvolutions<T, E>::input_at>(
        {grad_branch.at(p_.reach, p_.reach), grad_branch.width}, {maps_.input(i).data + taps.corner, grad_branch.width},
        p_.height, p_.width, taps.kernel_size, taps.dilation, sums_ + (i * taps_ + taps.first) * lanes);
  }

  void add_to_grad_input(int b, int64_t i) {
    const BranchTaps<T>& taps = branches_[b];
    const T* const weights = flipped_ + taps.first * lanes;
    const Packed<T> grad_branch = maps_.distance(i), grad_input = maps_.grad_input(i);
    for (int64_t y = 0; y < p_.height; ++y) {
      in_even_tiles(p_.width, [&](int64_t x, int64_t n) OVERLOCK_MM_INLINE_LAMBDA {
        Vector<T> out[kColumns];
        T* const to = grad_input.at(y, x);
        for (int64_t j = 0; j < n; ++j) out[j] = load(to + j * lanes);
        convolve_positions<T>(n, grad_branch.at(y, x) + taps.corner, taps.offsets, weights, taps.kernel_size,
                              taps.dilation, out);
        for (int64_t j = 0; j < n; ++j) store(to + j * lanes, out[j]);
      });
    }
  }

  void write(int64_t i) const {
    const int64_t image = first_image_ + i;
    unpack_gradients(sums_ + i * taps_ * lanes, taps_, block_, taps_,
                     static_cast<T*>(p_.grad_weights) + image * p_.channels * taps_);
    E* to = static_cast<E*>(p_.grad_input) + image * p_.height * p_.width * p_.channels;
    const T* from = maps_.grad_input(i).data;
    for (int64_t at = 0; at < p_.height * p_.width; ++at, to += p_.channels, from += lanes)
      store_block(to, block_, load(from));
  }

  const BranchNormsParams& p_;
  const int64_t images_, taps_;
  Scratch<T> scratch_;
  BranchImages<T, E> maps_;
  T* const flipped_;  ///< (taps, lanes): weights, each kernel turned round
  T* const sums_;     ///< (images, taps, lanes): gradients of the taps
  const TapsOfBranches<T> branches_;
  BranchConvolutions<T, E> convolutions_;
  int64_t first_image_ = 0;
  ChannelBlock block_{};
};

template <typename T, typename E>
void gradients_of_maps(const BranchNormsParams& p, int64_t begin, int64_t end) {
  BranchGradients<T, E> gradients(p);
  for (int64_t item = begin; item < end; ++item) gradients.run(item);
}

template <typename T>
void branch_gradients(const BranchNormsParams& p, int64_t begin, int64_t end) {
  if constexpr (kMultipliesBFloat16 && sizeof(T) == sizeof(float)) {
    if (p.bfloat16) return gradients_of_maps<T, BFloat16>(p, begin, end);
  }
  gradients_of_maps<T, T>(p, begin, end);
}

template <typename T>
constexpr BranchNormsKernels<T> kBranchNormsKernels = {Simd<T>::lanes, kMultipliesBFloat16, &branch_statistics<T>,
                                                       &branch_gradients<T>};

}  // namespace

template <>
const BranchNormsKernels<float>& table() {
  return kBranchNormsKernels<float>;
}
template <>
const BranchNormsKernels<double>& table() {
  return kBranchNormsKernels<double>;
}

}  // namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE
