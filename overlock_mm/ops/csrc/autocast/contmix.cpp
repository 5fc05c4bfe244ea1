// ContMix under autocast: value, query and key are cast.
#include <ATen/autocast_mode.h>
#include <torch/library.h>
#include <torch/version.h>

#include "../tensors.h"

namespace overlock_mm {
namespace {

template <at::DeviceType device, c10::DispatchKey key_of_device>
Tensor contmix_autocast(const Tensor& value, const Tensor& query, const Tensor& key, const Tensor& proj_weight,
                        const OptionalTensor& proj_bias, const OptionalTensor& rpb_small,
                        const OptionalTensor& rpb_large, int64_t num_groups, int64_t small_kernel_size,
                        int64_t large_kernel_size, double scale) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key_of_device);
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 4
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
#else
  const at::ScalarType dtype =
      device == at::kCPU ? at::autocast::get_autocast_cpu_dtype() : at::autocast::get_autocast_gpu_dtype();
#endif
  static const auto op =
      operator_named<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                            const OptionalTensor&, const OptionalTensor&, int64_t, int64_t, int64_t, double)>(
          "overlock_mm::contmix");
  // The parameters stay as they are: the computation with them is in float32.
  const auto cast = [&](const Tensor& tensor) { return at::autocast::cached_cast(dtype, tensor, device); };
  return op.call(cast(value), cast(query), cast(key), proj_weight, proj_bias, rpb_small, rpb_large, num_groups,
                 small_kernel_size, large_kernel_size, scale);
}

}  // namespace

TORCH_LIBRARY_IMPL(overlock_mm, AutocastCPU, m) {
  m.impl("contmix", &contmix_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(overlock_mm, AutocastCUDA, m) {
  m.impl("contmix", &contmix_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace overlock_mm
