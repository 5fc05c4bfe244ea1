// Parameters of the transposition kernel: plain numbers and pointers, nothing of torch.
#pragma once

#include <cstdint>

namespace overlock_mm {

/// Matrices of (rows, columns) at `from`, to be laid out by columns at `to`.
struct TransposeParams {
  static constexpr int64_t kSquare = 64;  ///< rows and columns of a work item

  int64_t batch, rows, columns;
  const void* from;
  void* to;
};

}  // namespace overlock_mm
