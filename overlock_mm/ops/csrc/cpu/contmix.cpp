// ContMix for tensors on the CPU.
#include <torch/library.h>

#include "../build_info.h"
#include "../checks.h"
#include "../contmix_tensors.h"
#include "launch.h"

namespace overlock_mm {
namespace {

using cpu::in_parallel;

template <typename T>
void launch(const ContMixParams& params, bool backward) {
  const auto& kernel = cpu::best_table<cpu::ContMixKernels<T>>();
  int64_t keys_size, grad_value_size;
  kernel.workspace_sizes(params, backward, &keys_size, &grad_value_size);
  const auto options = at::CPU(c10::CppTypeToScalarType<T>::value);
  Tensor keys = at::empty({keys_size}, options), grad_value = at::empty({grad_value_size}, options);
  const cpu::ContMixWorkspace<T> workspace{keys.template mutable_data_ptr<T>(),
                                           grad_value.template mutable_data_ptr<T>()};

  const int64_t groups = params.batch * params.groups;
  in_parallel(groups, [&](int64_t begin, int64_t end) { kernel.pack_keys(params, workspace, backward, begin, end); });
  if (!backward) {
    const int64_t strips = cpu::forward_strips(params, at::get_num_threads());
    in_parallel(groups * strips,
                [&](int64_t begin, int64_t end) { kernel.forward(params, workspace, strips, begin, end); });
    return;
  }
  in_parallel(groups * params.partials,
              [&](int64_t begin, int64_t end) { kernel.backward(params, workspace, begin, end); });
  if (params.grad_value.data) {
    in_parallel(2 * groups * params.height,
                [&](int64_t begin, int64_t end) { kernel.gather_grad_value(params, workspace, begin, end); });
  }
}

void launch(const ContMixParams& params, at::ScalarType dtype, bool backward) {
  if (params.batch == 0) return;
  if (dtype == at::kDouble) {
    launch<double>(params, backward);
  } else {
    launch<float>(params, backward);
  }
}

/// Half types are computed through float32. The layout is that of the map: a conversion that chooses one by itself
/// could find another for a slice, and outputs would not be laid out as the meta kernels say.
Tensor widened(const Tensor& map) {
  const at::ScalarType type = accumulation_type(map);
  return map.scalar_type() == type ? map : map.to(type, /*non_blocking=*/false, /*copy=*/false, memory_format_of(map));
}

std::tuple<Tensor, Tensor> contmix_cpu(const Tensor& value, const Tensor& query, const Tensor& keys,
                                       const OptionalTensor& bias, const OptionalTensor& rpb_small,
                                       const OptionalTensor& rpb_large, int64_t small_kernel_size,
                                       int64_t large_kernel_size) {
  check_contmix_keys(value, query, keys, bias, rpb_small, rpb_large, small_kernel_size, large_kernel_size);
  const ContMixInputs inputs(widened(value), widened(query), keys, bias, rpb_small, rpb_large, small_kernel_size,
                             large_kernel_size);
  const ContMixOutputs outputs(inputs);
  ContMixParams params = inputs.params();
  outputs.add_to(params);
  launch(params, inputs.value.scalar_type(), /*backward=*/false);
  return {outputs.output.to(value.scalar_type()), outputs.logsumexp};
}

ContMixGradients contmix_backward_cpu(const Tensor& grad_output, const Tensor& value, const Tensor& query,
                                      const Tensor& keys, const OptionalTensor& bias, const OptionalTensor& rpb_small,
                                      const OptionalTensor& rpb_large, const Tensor& output, const Tensor& logsumexp,
                                      int64_t small_kernel_size, int64_t large_kernel_size,
                                      std::array<bool, 6> output_mask) {
  check_contmix_keys(value, query, keys, bias, rpb_small, rpb_large, small_kernel_size, large_kernel_size);
  check_contmix_backward(grad_output, value, keys, output, logsumexp);
  const ContMixInputs inputs(widened(value), widened(query), keys, bias, rpb_small, rpb_large, small_kernel_size,
                             large_kernel_size);
  ContMixParams params = inputs.params();
  const ContMixGradientBuffers gradients(inputs, cpu::backward_partials(params), output_mask);
  const Tensor wide_grad = widened(grad_output), wide_output = widened(output),
               contiguous_sums = logsumexp.contiguous();
  params.grad_output = map_to_read(wide_grad);
  params.output = map_to_read(wide_output);
  params.logsumexp = const_cast<void*>(contiguous_sums.const_data_ptr());
  gradients.add_to(params);
  launch(params, inputs.value.scalar_type(), /*backward=*/true);
  ContMixGradients out = gradients.sums();
  if (output_mask[0]) std::get<0>(out) = std::get<0>(out).to(value.scalar_type());
  if (output_mask[1]) std::get<1>(out) = std::get<1>(out).to(value.scalar_type());
  return out;
}

}  // namespace

std::string cpu_instruction_set() { return cpu::best_table<cpu::ContMixKernels<float>>().instruction_set; }

TORCH_LIBRARY_IMPL(overlock_mm, CPU, m) {
  m.impl("_contmix", &contmix_cpu);
  m.impl("_contmix_backward", &contmix_backward_cpu);
}

}  // namespace overlock_mm
