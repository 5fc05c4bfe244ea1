// Shared by all code that deals with tensors.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/version.h>

#include <array>
#include <optional>
#include <tuple>

namespace overlock_mm {

using at::Tensor;
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 3
using OptionalTensor = c10::optional<Tensor>;  // torch < 2.3 does not use std::optional
#else
using OptionalTensor = std::optional<Tensor>;
#endif

/// The type that sums are accumulated in: float64 for float64, else float32.
inline at::ScalarType accumulation_type(const Tensor& map) {
  return map.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

/// The memory format of a map (B, C, H, W). A map that is both counts as contiguous.
inline at::MemoryFormat memory_format_of(const Tensor& map) {
  const bool channels_last = map.is_contiguous(at::MemoryFormat::ChannelsLast) && !map.is_contiguous();
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

/// A map of the same shape, dtype, device and memory format, not initialised.
inline Tensor empty_like_map(const Tensor& map) {
  return at::empty_symint(map.sym_sizes(), map.options(), memory_format_of(map));
}

/// The operator `overlock_mm::name` as a C++ function that goes through the dispatcher.
template <typename Signature>
auto operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace overlock_mm
