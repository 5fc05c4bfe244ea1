// ContMix for tensors on a GPU.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "../contmix_tensors.h"
#include "contmix_launch.h"
#include "tensors.h"

namespace overlock_mm {
namespace {

std::tuple<Tensor, Tensor> contmix_cuda(const Tensor& value, const Tensor& query, const Tensor& keys,
                                        const OptionalTensor& bias, const OptionalTensor& rpb_small,
                                        const OptionalTensor& rpb_large, int64_t small_kernel_size,
                                        int64_t large_kernel_size) {
  check_contmix_keys(value, query, keys, bias, rpb_small, rpb_large, small_kernel_size, large_kernel_size);
  const c10::cuda::CUDAGuard guard(value.device());
  const ContMixInputs inputs(value, query, keys, bias, rpb_small, rpb_large, small_kernel_size, large_kernel_size);
  const ContMixOutputs outputs(inputs);
  ContMixParams params = inputs.params();
  outputs.add_to(params);
  if (params.batch > 0) {
    C10_CUDA_CHECK(launch_contmix_forward(params, dtype_of(value), c10::cuda::getCurrentCUDAStream()));
  }
  return {outputs.output, outputs.logsumexp};
}

ContMixGradients contmix_gradients_cuda(const Tensor& grad_output, const Tensor& value, const Tensor& query,
                                        const Tensor& keys, const OptionalTensor& bias, const OptionalTensor& rpb_small,
                                        const OptionalTensor& rpb_large, const Tensor& output, const Tensor& logsumexp,
                                        int64_t small_kernel_size, int64_t large_kernel_size,
                                        std::array<bool, 6> output_mask) {
  check_contmix_keys(value, query, keys, bias, rpb_small, rpb_large, small_kernel_size, large_kernel_size);
  check_contmix_backward(grad_output, value, keys, output, logsumexp);
  const c10::cuda::CUDAGuard guard(value.device());
  const ContMixInputs inputs(value, query, keys, bias, rpb_small, rpb_large, small_kernel_size, large_kernel_size);
  ContMixParams params = inputs.params();
  const ContMixGradientBuffers gradients(inputs, contmix_backward_partials(params), output_mask);
  const Tensor contiguous_sums = logsumexp.contiguous();
  params.grad_output = map_to_read(grad_output);
  params.output = map_to_read(output);
  params.logsumexp = const_cast<void*>(contiguous_sums.const_data_ptr());
  gradients.add_to(params);
  if (params.batch > 0) {
    C10_CUDA_CHECK(launch_contmix_backward(params, dtype_of(value), c10::cuda::getCurrentCUDAStream()));
  }
  return gradients.sums();
}

}  // namespace

TORCH_LIBRARY_IMPL(overlock_mm, CUDA, m) {
  m.impl("_contmix", &contmix_cuda);
  m.impl("_contmix_backward", &contmix_gradients_cuda);
}

}  // namespace overlock_mm
