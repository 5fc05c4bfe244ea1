// Parameters of the response norm kernels: plain numbers and pointers, nothing of torch. Maps are laid out as in
// depthwise_conv2d.h.
#pragma once

#include <cstdint>

namespace overlock_mm {

/// Global response normalisation: output = input * (gamma * response + 1) + beta. On CUDA, maps have any dtype, and all
/// other data the accumulation type.
struct ResponseNormParams {
  int64_t batch, channels, positions, strips;
  bool bfloat16;      ///< on the CPU: maps are bfloat16, all other data float32
  const void* input;  ///< map
  const void* other;  ///< map, or null
  void* sums;         ///< (B, strips, C): of input * other, or of the input's squares without other
  void* plain_sums;   ///< (B, strips, C): of other, or null
  // output = input * scale + other * other_scale + shift, per image and channel.
  const void *scale, *other_scale, *shift;  ///< (B, C), (B, C) or null with other, (C) or null
  void* output;
};

}  // namespace overlock_mm
