// Tensors as the CUDA kernels take them.
#pragma once

#include "../tensors.h"
#include "dtype.h"

namespace overlock_mm {

inline Dtype dtype_of(const Tensor& map) {
  switch (map.scalar_type()) {
    case at::kFloat:
      return Dtype::float32;
    case at::kDouble:
      return Dtype::float64;
    case at::kHalf:
      return Dtype::float16;
    default:  // the arguments are checked
      return Dtype::bfloat16;
  }
}

/// A map, channels_last. That of the network is: it is not copied.
inline Tensor as_channels_last(const Tensor& map) { return map.contiguous(at::MemoryFormat::ChannelsLast); }

/// A map of the same shape and dtype, channels_last, not initialised.
inline Tensor empty_channels_last(const Tensor& map) {
  return at::empty(map.sizes(), map.options(), at::MemoryFormat::ChannelsLast);
}

/// A result as the meta kernels describe it: in the memory format of `like`.
inline Tensor laid_out_as(const Tensor& like, const Tensor& map) { return map.contiguous(memory_format_of(like)); }

/// A parameter in the type that sums are accumulated in.
inline Tensor as_parameter(const Tensor& parameter, const Tensor& map) {
  return parameter.to(accumulation_type(map)).contiguous();
}

}  // namespace overlock_mm
