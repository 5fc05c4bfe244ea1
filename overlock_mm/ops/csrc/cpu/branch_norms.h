// The CPU kernels of branch norms, compiled once for every instruction set.
#pragma once

#include "../branch_norms.h"

namespace overlock_mm::cpu {

template <typename T>
struct BranchNormsKernels {
  int64_t lanes;
  bool take_bfloat16;  ///< whether there are kernels for maps of bfloat16

  /// B * strips * channel blocks items.
  void (*statistics)(const BranchNormsParams&, int64_t begin, int64_t end);
  /// B * channel blocks items, or as many as there are channel blocks where an item is of the whole batch.
  void (*gradients)(const BranchNormsParams&, int64_t begin, int64_t end);
};

}  // namespace overlock_mm::cpu
