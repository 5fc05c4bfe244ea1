// Where the kernels of an instruction set are found: in tables of functions, Kernels<T> (contmix_cpu.h) and
// MapKernels<T> (maps_cpu.h), for float and double.
#pragma once

#include "contmix_cpu.h"
#include "maps_cpu.h"

namespace overlock_mm::cpu {

#define OVERLOCK_MM_TABLES(instruction_set) \
  namespace instruction_set {               \
  template <typename Table>                 \
  const Table& table();                     \
  template <>                               \
  const Kernels<float>& table();            \
  template <>                               \
  const Kernels<double>& table();           \
  template <>                               \
  const MapKernels<float>& table();         \
  template <>                               \
  const MapKernels<double>& table();        \
  }

OVERLOCK_MM_TABLES(baseline)
#if defined(__x86_64__)
OVERLOCK_MM_TABLES(avx2)
OVERLOCK_MM_TABLES(avx512)
#endif

#undef OVERLOCK_MM_TABLES

}  // namespace overlock_mm::cpu
