// The CPU kernel of a transposition, compiled once for every instruction set.
#pragma once

#include "../transpose.h"

namespace overlock_mm::cpu {

template <typename T>
struct TransposeKernels {
  /// B * squares of rows * squares of columns items.
  void (*transpose)(const TransposeParams&, int64_t begin, int64_t end);
};

}  // namespace overlock_mm::cpu
