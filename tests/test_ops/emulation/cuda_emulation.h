// Enough of CUDA to run the launchers and kernels of csrc/cuda on a host, compiled by a C++ compiler, thread by thread.
//
// Every thread of a block is a fiber with a stack of its own; a barrier or a shuffle switches to the next. The headers
// named like CUDA's in this folder include this one, and so the sources are compiled as they are.
//
// It is stricter than a device. Shared memory is an allocation of exactly the size of the launch (AddressSanitizer sees
// overruns), and full of NaN before each block. It is an error if threads of a block wait in different barriers, or if
// one returns while others wait. The order in which threads run between barriers can be reversed, which shows missing
// barriers.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define OVERLOCK_MM_SHARED(A, name) A* const name = reinterpret_cast<A*>(cuda_emulation::shared_memory())

// ---------------------------------------------------------------------------------------------------------------------
// The part of the runtime's interface that is used.

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulation {

/// Settings of a case, and its results.
struct Device {
  int shared_memory_limit = 232448;
  bool reversed = false;  ///< Threads run from the last to the first.
  bool counts_reads = false;
  /// A line for each: the kernel's mangled name, blocks, threads, bytes of shared memory, and bytes of global memory
  /// that were read through __ldg, each byte once (if they are counted).
  std::string launches;
};
Device& device();

void* shared_memory();
void note_read(const void* at, size_t bytes);
void synchronize_block(int line);

/// Lends `number` to the other threads of the warp and returns what that of `lane ^ mask` lent.
uint64_t shuffle_xor(uint64_t number, int mask, int line);

cudaError_t allow_shared_memory(const void* kernel, int bytes);
cudaError_t run(const void* kernel, const std::function<void()>& thread, dim3 grid, dim3 block, size_t shared_bytes);

}  // namespace cuda_emulation

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = cuda_emulation::device().shared_memory_limit;
  return cudaSuccess;
}
template <typename Parameter>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameter), cudaFuncAttribute, int value) {
  return cuda_emulation::allow_shared_memory(reinterpret_cast<const void*>(kernel), value);
}
template <typename Parameter>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameter), dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t) {
  const Parameter parameter = *static_cast<const Parameter*>(arguments[0]);
  return cuda_emulation::run(
      reinterpret_cast<const void*>(kernel), [=] { kernel(parameter); }, grid, block, shared_bytes);
}

// ---------------------------------------------------------------------------------------------------------------------
// Functions that kernels call.

#define __syncthreads() cuda_emulation::synchronize_block(__LINE__)
#define __shfl_xor_sync(lanes, number, mask) cuda_emulation::shuffle(lanes, number, mask, __LINE__)

namespace cuda_emulation {
template <typename T>
T shuffle(unsigned lanes, T number, int mask, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
  if (lanes != 0xffffffffu) __builtin_trap();
  uint64_t bits = 0;
  std::memcpy(&bits, &number, sizeof(T));
  bits = shuffle_xor(bits, mask, line);
  std::memcpy(&number, &bits, sizeof(T));
  return number;
}
}  // namespace cuda_emulation

template <typename T>
T __ldg(const T* at) {
  cuda_emulation::note_read(at, sizeof(T));
  T value;
  std::memcpy(&value, at, sizeof(T));  // it may be a vector of the numbers that are there
  return value;
}

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

// Half types: bits, and a conversion each way that rounds to nearest, ties to even.

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half half) {
  const int exponent = half.bits >> 10 & 31, mantissa = half.bits & 1023;
  const float sign = half.bits >> 15 ? -1.f : 1.f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * std::ldexp(static_cast<float>(exponent ? mantissa + 1024 : mantissa), (exponent ? exponent : 1) - 25);
}
inline __half __float2half_rn(float number) {
  const uint16_t sign = std::signbit(number) ? 0x8000 : 0;
  const float size = std::fabs(number);
  if (std::isnan(size)) return {0x7fff};
  if (size >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = 0;
  std::frexp(size, &exponent);                 // size < 2^exponent
  exponent = exponent < -13 ? -13 : exponent;  // below it, the numbers are as far apart as above it
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));  // of 2^(exponent - 11)
  // 1024 steps are the implicit bit, which adds 1 to the exponent, as does rounding up to 2048.
  return {static_cast<uint16_t>(sign | (((exponent + 13) << 10) + steps))};
}
inline float __bfloat162float(__nv_bfloat16 number) {
  const uint32_t bits = static_cast<uint32_t>(number.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float number) {
  if (std::isnan(number)) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
