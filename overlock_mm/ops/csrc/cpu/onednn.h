// Where oneDNN's convolution, which is PyTorch's, takes the place of the kernels here: chosen by measurement
// (tools/benchmarks/bench_depthwise.py, docs/notes/depthwise.md).
#pragma once

#include "../tensors.h"

namespace overlock_mm::cpu {

/// For a channels_last float32 map, forward.
bool onednn_is_fast(const Tensor& input, int64_t kernel_size, int64_t dilation);

/// For channels_last arguments that are all bfloat16, as those of a model that was cast, forward. (Under autocast the
/// parameters stay float32.)
bool onednn_is_fast_in_bfloat16(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t dilation);

/// For a contiguous map, which the kernels here copy to channels_last and back; `differentiates`: forward and backward.
/// Works on arguments that are not checked yet.
bool onednn_is_fast_for_contiguous(const Tensor& x, const Tensor& weight, int64_t dilation, bool differentiates);

/// Autograd differentiates it.
Tensor onednn_conv2d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t dilation);

}  // namespace overlock_mm::cpu
