// Channels of channels_last maps as vectors, and strips of lines. Included by the kernels' headers, under the rules of
// simd.h.
#pragma once

#include "simd.h"

namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE {
namespace {

/// The channels that a vector holds: `count` from `first` on. The last block of a map begins earlier, so that it fills
/// a vector, and its first `skip` lanes repeat channels of the block before.
struct ChannelBlock {
  int64_t first, skip, count;
};

template <typename T>
inline int64_t number_of_blocks(int64_t channels) {
  return (channels + Simd<T>::lanes - 1) / Simd<T>::lanes;
}

template <typename T>
inline ChannelBlock block_of(int64_t channels, int64_t index) {
  constexpr int64_t lanes = Simd<T>::lanes;
  if (channels < lanes) return {0, 0, channels};
  const int64_t first = min(index * lanes, channels - lanes);
  return {first, index * lanes - first, lanes};
}

/// Channels of the position at `from`.
template <typename E>
OVERLOCK_MM_INLINE Vector<Computed<E>> load_block(const E* from, const ChannelBlock& block) {
  if (block.count == Simd<Computed<E>>::lanes) return load(from + block.first);
  Vector<Computed<E>> out{};
  for (int64_t i = 0; i < block.count; ++i) out[i] = load_one(from + i);
  return out;
}

template <typename E>
OVERLOCK_MM_INLINE void store_block(E* to, const ChannelBlock& block, Vector<Computed<E>> x) {
  constexpr int64_t lanes = Simd<Computed<E>>::lanes;
  if (block.skip == 0 && block.count == lanes) {
    store(to + block.first, x);
  } else {
    E all[lanes];
    store(all, x);
    for (int64_t i = block.skip; i < block.count; ++i) to[block.first + i] = all[i];
  }
}

/// The same where all channels are written by one thread: repeated ones are written twice.
template <typename E>
OVERLOCK_MM_INLINE void store_repeated(E* to, const ChannelBlock& block, Vector<Computed<E>> x) {
  if (block.count == Simd<Computed<E>>::lanes) {
    store(to + block.first, x);
  } else {
    store_lanes(to, x, block.count);
  }
}

/// Weights (C, taps) of a block as (taps, lanes).
template <typename T>
void pack_weights(const T* weights, int64_t taps_of_channel, int64_t first_tap, int64_t taps, const ChannelBlock& block,
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

}  // namespace
}  // namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE
