// The CPU kernel of GELU, compiled once for every instruction set.
#pragma once

#include "../gelu.h"

namespace overlock_mm::cpu {

template <typename T>
struct GeluKernels {
  /// Items of `kChunk` numbers.
  void (*gelu)(const GeluParams&, int64_t begin, int64_t end);
};

}  // namespace overlock_mm::cpu
