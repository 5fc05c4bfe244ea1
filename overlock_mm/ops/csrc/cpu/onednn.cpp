#include "onednn.h"

#include <ATen/Context.h>

namespace overlock_mm::cpu {
namespace {

bool has_onednn() { return at::hasMKLDNN() && at::globalContext().userEnabledMkldnn(); }

// oneDNN computes in bfloat16 from AVX-512 on, and is up to 50 times slower where the processor does not. Its kernels
// for AVX-512 are fast in more cases than those for AVX2.
#if defined(__x86_64__)
bool has_fast_bfloat16() { return __builtin_cpu_supports("avx512bf16"); }
bool has_wide_kernels() { return __builtin_cpu_supports("avx512f"); }
#else  // not measured
bool has_fast_bfloat16() { return false; }
bool has_wide_kernels() { return true; }
#endif

/// Whether a kernel reaches over so few positions that oneDNN's forward may be fast. Beyond them it is up to 20 times
/// slower than the kernels here.
bool is_near(const c10::SymInt& kernel_size, int64_t dilation) {
  const int64_t most = has_wide_kernels() ? 13 : 9;
  return dilation < most && (kernel_size - 1) * dilation + 1 <= most;  // the product may be too large
}

// oneDNN's forward is slow on maps of fewer positions than these. On contiguous ones it counts also how many
// multiply-adds there are: most of the time of few is that of the call.
constexpr int64_t kSmallMap = 512, kSmallWork = 1 << 21;

/// With AVX-512, oneDNN has a forward for near kernels up to 8, and another for large ones. Between them, for a plain
/// 3 x 3, and on small maps, it is up to three times slower than the kernels here. With AVX2 it is slower for all that
/// are not dilated.
bool is_fast_in_channels_last(int64_t kernel_size, int64_t dilation, int64_t positions) {
  const bool plain = dilation == 1;
  const bool small = kernel_size <= 8 && is_near(kernel_size, dilation) && !(plain && kernel_size == 3);
  const bool large = kernel_size >= 14 && plain;
  return has_onednn() && positions >= kSmallMap && (has_wide_kernels() ? small || large : small && !plain);
}

}  // namespace

bool onednn_is_fast(const Tensor& input, int64_t kernel_size, int64_t dilation) {
  return input.scalar_type() == at::kFloat &&
         is_fast_in_channels_last(kernel_size, dilation, input.size(2) * input.size(3));
}

bool onednn_is_fast_in_bfloat16(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t dilation) {
  // The forward alone: PyTorch's gradient of a dilated kernel is wrong in bfloat16 (torch 2.11).
  return x.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16 &&
         (!bias || bias->scalar_type() == at::kBFloat16) && memory_format_of(x) == at::MemoryFormat::ChannelsLast &&
         has_fast_bfloat16() && is_fast_in_channels_last(weight.size(2), dilation, x.size(2) * x.size(3));
}

bool onednn_is_fast_for_contiguous(const Tensor& x, const Tensor& weight, int64_t dilation, bool differentiates) {
  if (x.dim() != 4 || weight.dim() != 4 || !x.is_cpu() || !has_onednn()) return false;
  const at::ScalarType dtype = x.scalar_type();
  if (dtype != at::kFloat && !(dtype == at::kBFloat16 && has_fast_bfloat16())) return false;
  if (memory_format_of(x) == at::MemoryFormat::ChannelsLast) return false;
  const c10::SymInt kernel_size = weight.sym_size(3);
  if (x.sym_size(2) * x.sym_size(3) < kSmallMap && x.sym_numel() * kernel_size * kernel_size < kSmallWork) return false;
  if (differentiates) return kernel_size == 3 && dilation == 1;
  return is_near(kernel_size, dilation);
}

Tensor onednn_conv2d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t dilation) {
  // x has the dtype that autocast would cast it to.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  const at::ScalarType dtype = x.scalar_type();
  const OptionalTensor shift = bias ? OptionalTensor(bias->to(dtype)) : bias;
  const int64_t groups = x.sym_size(1).guard_int(__FILE__, __LINE__);
  const int64_t padding = weight.sym_size(2).guard_int(__FILE__, __LINE__) / 2 * dilation;
  return at::conv2d(x, weight.to(dtype), shift, /*stride=*/1, padding, dilation, groups);
}

}  // namespace overlock_mm::cpu
