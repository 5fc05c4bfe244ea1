// Parameters of the GELU kernels: plain numbers and pointers, nothing of torch.
#pragma once

#include <cstdint>

namespace overlock_mm {

/// output = gelu(input), or grad_output * gelu'(input).
struct GeluParams {
  static constexpr int64_t kChunk = 4096;  ///< numbers of a work item

  int64_t count;
  bool bfloat16;            ///< All data are bfloat16.
  const void* input;        ///< (count)
  const void* grad_output;  ///< (count), or null
  void* output;             ///< (count)
};

}  // namespace overlock_mm
