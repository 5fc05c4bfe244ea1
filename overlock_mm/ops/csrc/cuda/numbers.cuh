// Numbers of maps, and shared memory: what all kernels have in common.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../host_device.h"

/// The block's dynamic shared memory. A host that emulates a device defines its own.
#if !defined(OVERLOCK_MM_SHARED)
#define OVERLOCK_MM_SHARED(A, name)                                      \
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[]; \
  A* const name = reinterpret_cast<A*>(dynamic_shared_memory)
#endif

namespace overlock_mm {

constexpr int kWarp = 32;

OVERLOCK_MM_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

/// From global memory that the kernel does not write to.
__device__ __forceinline__ float load(const float* at) { return __ldg(at); }
__device__ __forceinline__ double load(const double* at) { return __ldg(at); }
__device__ __forceinline__ float load(const __half* at) { return __half2float(__ldg(at)); }
__device__ __forceinline__ float load(const __nv_bfloat16* at) {
  // The toolkits of torch 2.1 have no __ldg of this type for devices older than 8.0.
  const unsigned short bits = __ldg(reinterpret_cast<const unsigned short*>(at));
  __nv_bfloat16 number;
  memcpy(&number, &bits, sizeof(number));
  return __bfloat162float(number);
}

__device__ __forceinline__ void store(float* at, float number) { *at = number; }
__device__ __forceinline__ void store(double* at, double number) { *at = number; }
__device__ __forceinline__ void store(__half* at, float number) { *at = __float2half_rn(number); }
__device__ __forceinline__ void store(__nv_bfloat16* at, float number) { *at = __float2bfloat16_rn(number); }

/// Shared memory is read in units of it.
template <typename A>
struct alignas(16) Vector {
  A at[4];
};

template <typename A>
__device__ __forceinline__ const Vector<A>& vector_at(const A* shared) {
  return *reinterpret_cast<const Vector<A>*>(shared);
}

}  // namespace overlock_mm
