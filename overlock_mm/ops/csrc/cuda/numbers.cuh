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

__device__ __forceinline__ float widen(float number) { return number; }
__device__ __forceinline__ double widen(double number) { return number; }
__device__ __forceinline__ float widen(__half number) { return __half2float(number); }
__device__ __forceinline__ float widen(__nv_bfloat16 number) { return __bfloat162float(number); }

/// From global memory that the kernel does not write to.
template <typename T>
__device__ __forceinline__ T read(const T* at) {
  return __ldg(at);
}
__device__ __forceinline__ __nv_bfloat16 read(const __nv_bfloat16* at) {
  // The toolkits of torch 2.1 have no __ldg of this type for devices older than 8.0.
  const unsigned short bits = __ldg(reinterpret_cast<const unsigned short*>(at));
  __nv_bfloat16 number;
  memcpy(&number, &bits, sizeof(number));
  return number;
}

template <typename T>
__device__ __forceinline__ auto load(const T* at) {
  return widen(read(at));
}

/// Channels that a thread moves at a time: 16 bytes.
template <typename T>
struct alignas(16) Channels {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

/// 16 bytes at once.
template <typename V>
__device__ __forceinline__ V load_vector(const V* at) {
  static_assert(sizeof(V) == 16 && alignof(V) == 16, "a vector has 16 bytes");
  const uint4 bits = read(reinterpret_cast<const uint4*>(at));
  V vector;
  memcpy(&vector, &bits, sizeof(V));
  return vector;
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
