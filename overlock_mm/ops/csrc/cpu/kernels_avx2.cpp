// The CPU kernels for x86-64 with AVX2 and FMA.
#include <cmath>
#include <cstdint>
#include <new>

#include "tables.h"

#if defined(__x86_64__)

#define OVERLOCK_MM_NAMESPACE avx2
#define OVERLOCK_MM_VECTOR_BYTES 32

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#include "branch_norms_kernels.h"
#include "contmix_kernels.h"
#include "depthwise_conv2d_kernels.h"
#include "gelu_kernels.h"
#include "response_norm_kernels.h"
#include "transpose_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
