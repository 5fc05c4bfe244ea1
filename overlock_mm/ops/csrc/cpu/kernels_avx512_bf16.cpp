// The CPU kernels for x86-64 with AVX-512 (F, BW, DQ, VL) and its instructions for bfloat16 (BF16).
#include <cmath>
#include <cstdint>
#include <new>

#include "tables.h"

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 10
#error "overlock_mm needs GCC 10 or later: earlier ones do not know AVX-512 BF16"
#endif

#include <immintrin.h>

#define OVERLOCK_MM_NAMESPACE avx512_bf16
#define OVERLOCK_MM_BFLOAT16
#define OVERLOCK_MM_VECTOR_BYTES 64

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
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
