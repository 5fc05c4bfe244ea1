// What the implementations for tensors share: argument checks, and how tensors become a kernel's parameters.
#pragma once

#include <ATen/ATen.h>
#include <torch/version.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "contmix.h"

namespace overlock_mm {

using at::Tensor;
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 3
using OptionalTensor = c10::optional<Tensor>;  // not std's before torch 2.3
#else
using OptionalTensor = std::optional<Tensor>;
#endif

/// Raise ValueError, or TypeError for a dtype, unless the arguments of `contmix` other than key and proj_weight go
/// together. Works on tensors with symbolic sizes.
void check_arguments(const Tensor& value, const Tensor& query, const OptionalTensor& proj_bias,
                     const OptionalTensor& rpb_small, const OptionalTensor& rpb_large, const c10::SymInt& num_groups,
                     int64_t small_kernel_size, int64_t large_kernel_size);

/// The same for `_contmix`: there keys and biases are of the accumulation type.
void check_internal_arguments(const Tensor& value, const Tensor& query, const Tensor& keys, const OptionalTensor& bias,
                              const OptionalTensor& rpb_small, const OptionalTensor& rpb_large,
                              int64_t small_kernel_size, int64_t large_kernel_size);

void check_backward_arguments(const Tensor& grad_output, const Tensor& value, const Tensor& keys, const Tensor& output,
                              const Tensor& logsumexp);

/// As Python writes them.
std::string shape_of(const Tensor& tensor);
std::string name_of(at::ScalarType dtype);

void check_device(const char* name, const Tensor& tensor, const Tensor& value, const char* name_of_value = "value");
void check_same_dtype(const char* name, const Tensor& tensor, const Tensor& value, const char* name_of_value = "value");
/// The dtype of value, or float32 beside half types.
void check_dtype(const char* name, const Tensor& tensor, const Tensor& value, const char* name_of_value = "value");

/// float64 for float64, else float32.
inline at::ScalarType accumulation_type(const Tensor& value) {
  return value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

/// channels_last only where it can be told from contiguous.
inline at::MemoryFormat memory_format_of(const Tensor& value) {
  const bool channels_last = value.is_contiguous(at::MemoryFormat::ChannelsLast) && !value.is_contiguous();
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

Map as_map(const Tensor& tensor);

/// The arguments of `_contmix`, checked before, with what the kernels take for granted: keys and biases are contiguous.
struct Inputs {
  Tensor value, query, keys, bias, rpb[2];
  int64_t kernel_size[2];

  Inputs(const Tensor& value, const Tensor& query, const Tensor& keys, const OptionalTensor& bias,
         const OptionalTensor& rpb_small, const OptionalTensor& rpb_large, int64_t small_kernel_size,
         int64_t large_kernel_size);

  ContMixParams params() const;
};

struct Outputs {
  Tensor output, logsumexp;

  /// Not initialised.
  explicit Outputs(const Inputs& inputs);
  void add_to(ContMixParams& params) const;
};

/// Gradients of value, query, keys, bias, rpb_small, rpb_large. One that is not wanted is an empty tensor.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

/// A partial sum is over a part of the map.
struct GradientBuffers {
  int64_t partials;
  std::array<bool, 6> wanted;
  at::TensorOptions options;
  Tensor grad_value, grad_query;
  Tensor partial_keys, partial_bias, partial_rpb[2];

  GradientBuffers(const Inputs& inputs, int64_t partials, std::array<bool, 6> wanted);
  void add_to(ContMixParams& params) const;
  Gradients sums() const;
};

}  // namespace overlock_mm
