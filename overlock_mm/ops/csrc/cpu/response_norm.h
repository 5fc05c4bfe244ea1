// The CPU kernels of response norms, compiled once for every instruction set.
#pragma once

#include "../response_norm.h"

namespace overlock_mm::cpu {

template <typename T>
struct ResponseNormKernels {
  // B * strips items.
  void (*channel_sums)(const ResponseNormParams&, int64_t begin, int64_t end);
  void (*scale_and_shift)(const ResponseNormParams&, int64_t begin, int64_t end);
};

}  // namespace overlock_mm::cpu
