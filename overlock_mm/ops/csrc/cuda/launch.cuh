// Shared by the launchers of the CUDA kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"
#include "numbers.cuh"

namespace overlock_mm {

/// Shared memory that a block may have on the current device, in bytes.
inline cudaError_t shared_memory_limit(int64_t* bytes) {
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *bytes = limit;
  return error;
}

/// Launch a kernel that takes its parameters as one structure, with `bytes` of dynamic shared memory.
template <typename Params>
cudaError_t launch(void (*kernel)(Params), int64_t blocks, int threads, int64_t bytes, const Params& params,
                   cudaStream_t stream) {
  constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1, kDefaultSharedMemory = 48 << 10;
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  if (bytes > kDefaultSharedMemory) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
  }
  Params copy = params;
  void* arguments[] = {&copy};
  const cudaError_t error = cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), arguments,
                                             static_cast<size_t>(bytes), stream);
  return error == cudaSuccess ? cudaGetLastError() : error;
}

/// Calls body with a null pointer to the dtype's type.
template <typename Body>
cudaError_t for_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float32:
      return body(static_cast<float*>(nullptr));
    case Dtype::float64:
      return body(static_cast<double*>(nullptr));
    case Dtype::float16:
      return body(static_cast<__half*>(nullptr));
    case Dtype::bfloat16:
      return body(static_cast<__nv_bfloat16*>(nullptr));
  }
  return cudaErrorInvalidValue;
}

}  // namespace overlock_mm
