// Parameters of the ContMix kernels: plain numbers and pointers, nothing of torch. docs/contmix.md has the mathematics.
//
// B images, G groups, an H x W map. Branch 0 has the small kernel and the first half of the channels, branch 1 the
// large kernel and the other half. A branch of kernel size k has k * k slots a position, row-major in the position's
// window; L = ks * ks + kl * kl counts both, the small kernel's first.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace overlock_mm {

/// A (B, channels, H, W) tensor. All strides are in elements, not bytes.
struct Map {
  void* data = nullptr;
  int64_t batch_stride = 0, channel_stride = 0, row_stride = 0, column_stride = 0;
};

/// "Accumulation type" is float64 for float64 maps and float32 for all others.
struct ContMixParams {
  int64_t batch, groups, height, width;
  int64_t channels;        ///< of one group in one branch: C / 2 / G
  int64_t query_channels;  ///< of one group: Cq / G
  int64_t kernel_size[2];  ///< ks, kl: odd, at most min(H, W)

  // Maps, of one dtype.
  Map value;   ///< (B, 2 * G * channels, H, W)
  Map query;   ///< (B, G * query_channels, H, W)
  Map output;  ///< as value

  // Contiguous, of the accumulation type.
  const void* keys;    ///< (B, G, L, query_channels): M = W_d kᵀ, a synthesised key for every slot
  const void* bias;    ///< (L), or null
  const void* rpb[2];  ///< (G, 2k - 1, 2k - 1) by offset, or null
  void* logsumexp;     ///< (B, 2, G, H, W): of each kernel's logits, in base 2: log2(sum(exp(logits)))

  // Backward only. A gradient that is not wanted is null.
  Map grad_output;  ///< as output
  Map grad_value;   ///< as value
  Map grad_query;   ///< as query
  // Partial sums over the map, contiguous, of the accumulation type, to be summed over their first dimension (and B).
  // The kernels write every element. The device decides how many there are (contmix_backward_partials).
  int64_t partials;
  void* grad_keys;    ///< (partials, B, G, L, query_channels)
  void* grad_bias;    ///< (partials, B, G, L)
  void* grad_rpb[2];  ///< (partials, B, G, 2k - 1, 2k - 1)

  OVERLOCK_MM_HOST_DEVICE int64_t slots() const {
    return kernel_size[0] * kernel_size[0] + kernel_size[1] * kernel_size[1];
  }
};

// Windows along an axis. Integer is int64_t, or int, which a GPU multiplies and compares faster.

/// First index of the window of `position` along an axis of `size`: at a border the window moves inward.
template <typename Integer>
OVERLOCK_MM_HOST_DEVICE inline Integer window_start(Integer position, Integer size, Integer kernel_size) {
  const Integer start = position - kernel_size / 2;
  const Integer last = size - kernel_size;
  return start < 0 ? 0 : (start > last ? last : start);
}

/// First and last position whose window holds `position`.
template <typename Integer>
OVERLOCK_MM_HOST_DEVICE inline Integer first_reader(Integer position, Integer kernel_size) {
  return position < kernel_size ? 0 : position - kernel_size / 2;
}
template <typename Integer>
OVERLOCK_MM_HOST_DEVICE inline Integer last_reader(Integer position, Integer size, Integer kernel_size) {
  return position >= size - kernel_size ? size - 1 : position + kernel_size / 2;
}

}  // namespace overlock_mm
