// What the kernel of a transposition is given: plain numbers and pointers, nothing of torch.
#pragma once

#include <cstdint>

namespace overlock_mm {

/// Matrices of (rows, columns), to be laid out by columns.
struct TransposeParams {
  static constexpr int64_t kSquare = 64;  ///< rows and columns that are worked on together

  int64_t batch, rows, columns;
  const void* from;
  void* to;
};

}  // namespace overlock_mm
