// GELU for tensors on the CPU.
#include <torch/library.h>

#include "../checks.h"
#include "launch.h"

namespace overlock_mm {
namespace cpu {

Tensor launch_gelu(const Tensor& x, const Tensor& grad_output) {
  // Numbers side by side in memory, in the same order for all three tensors. float16 goes through float32.
  const at::ScalarType dtype = x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type();
  const Tensor output = at::empty_like(x, x.options().dtype(dtype));
  const auto as_output = [&](const Tensor& from) {
    const bool fits = from.scalar_type() == dtype && from.strides() == output.strides();
    return fits ? from : at::empty_like(output).copy_(from);
  };
  const Tensor input = as_output(x), grad = grad_output.defined() ? as_output(grad_output) : Tensor();
  const GeluParams p{x.numel(), dtype == at::kBFloat16, input.const_data_ptr(),
                     grad.defined() ? grad.const_data_ptr() : nullptr, output.mutable_data_ptr()};
  with_kernels<GeluKernels>(dtype, [&](const auto& kernels) {
    in_parallel(divide_up(p.count, p.kChunk), [&](int64_t begin, int64_t end) { kernels.gelu(p, begin, end); });
  });
  return output.to(x.scalar_type());
}

}  // namespace cpu

namespace {

using namespace cpu;

Tensor gelu_cpu(const Tensor& x) {
  check_floating("x", x);
  return launch_gelu(x, Tensor());
}

Tensor gelu_backward_cpu(const Tensor& grad_output, const Tensor& x) {
  check_floating("x", x);
  check_grad_output(grad_output, x);
  return launch_gelu(x, grad_output);
}

}  // namespace

TORCH_LIBRARY_IMPL(overlock_mm, CPU, m) {
  m.impl("gelu", &gelu_cpu);
  m.impl("_gelu_backward", &gelu_backward_cpu);
}

}  // namespace overlock_mm
