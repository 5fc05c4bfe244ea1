// Branch norms on the CPU, from channel blocks of a map. Included once for each instruction set, under the rules of
// simd.h.

#include "packed.h"

namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE {
namespace {

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
  Branches(const BranchNormsParams& p, int64_t packed_width) : offsets_(p.taps()) {
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
  Branch<T> branches_[BranchNormsParams::kMostBranches];
};

template <typename T>
void pack_branch_weights(const BranchNormsParams& p, const Branches<T>& branches, const ChannelBlock& block,
                         bool flipped, T* to) {
  for (int i = 0; i < p.branches; ++i) {
    pack_weights(const_data<T>(p.weights), p.taps(), branches[i].first_tap, branches[i].taps, block, flipped,
                 to + branches[i].first_tap * Simd<T>::lanes);
  }
}

template <typename T>
void branch_statistics(const BranchNormsParams& p, int64_t begin, int64_t end) {
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
    const ChannelBlock block = block_of<T>(p.channels, item % blocks);
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
  /// Of a branch's output from its mean; then the gradient of that output.
  Packed<T> distance(int64_t i) const { return {distances_ + i * bordered_, bordered_width()}; }
  Packed<T> grad(int64_t i) const { return {grads_ + i * plain_, p_.width}; }
  Packed<T> grad_input(int64_t i) const { return {grad_inputs_ + i * plain_, p_.width}; }

  void pack(int64_t first, const ChannelBlock& block) {
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
  const BranchNormsParams& p_;
  int64_t images_, bordered_, plain_;
  T *inputs_, *distances_, *grads_, *grad_inputs_;
};

/// Compute the distances of a branch's output from its mean; the sum of their products with the gradient.
template <typename T>
Vector<T> branch_distances(const BranchNormsParams& p, const Branch<T>& branch, const T* weights, Vector<T> mean,
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
void branch_gradients(const BranchNormsParams& p, int64_t begin, int64_t end) {
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
    const ChannelBlock block = block_of<T>(p.channels, item % blocks);
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

template <typename T>
constexpr BranchNormsKernels<T> kBranchNormsKernels = {Simd<T>::lanes, &branch_statistics<T>, &branch_gradients<T>};

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
