// Where the kernels of an instruction set are found: in tables of functions, for float and double.
//
// The kernels work in float32 or float64. Half types are converted before, but several kernels take bfloat16 in memory.
// Each function does the items [begin, end) of its phase. The items of a phase are independent, and
// how they are shared out between threads changes no result.
#pragma once

#include "branch_norms.h"
#include "contmix.h"
#include "depthwise_conv2d.h"
#include "gelu.h"
#include "response_norm.h"
#include "transpose.h"

namespace overlock_mm::cpu {

#define OVERLOCK_MM_TABLE(Kernels) \
  template <>                      \
  const Kernels<float>& table();   \
  template <>                      \
  const Kernels<double>& table();

#define OVERLOCK_MM_TABLES(instruction_set) \
  namespace instruction_set {               \
  template <typename Kernels>               \
  const Kernels& table();                   \
  OVERLOCK_MM_TABLE(ContMixKernels)         \
  OVERLOCK_MM_TABLE(TransposeKernels)       \
  OVERLOCK_MM_TABLE(DepthwiseConv2dKernels) \
  OVERLOCK_MM_TABLE(GeluKernels)            \
  OVERLOCK_MM_TABLE(BranchNormsKernels)     \
  OVERLOCK_MM_TABLE(ResponseNormKernels)    \
  }

OVERLOCK_MM_TABLES(baseline)
#if defined(__x86_64__)
OVERLOCK_MM_TABLES(avx2)
OVERLOCK_MM_TABLES(avx512)
OVERLOCK_MM_TABLES(avx512_bf16)
#endif

#undef OVERLOCK_MM_TABLES
#undef OVERLOCK_MM_TABLE

}  // namespace overlock_mm::cpu
