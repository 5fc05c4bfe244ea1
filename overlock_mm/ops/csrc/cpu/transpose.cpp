// Transposition for tensors on the CPU.
#include <torch/library.h>

#include "../checks.h"
#include "launch.h"

namespace overlock_mm {
namespace cpu {

void launch_transpose(const Tensor& from, const Tensor& to, int64_t batch, int64_t rows, int64_t columns) {
  const TransposeParams p{batch, rows, columns, from.const_data_ptr(), to.mutable_data_ptr()};
  const int64_t squares = divide_up(rows, p.kSquare) * divide_up(columns, p.kSquare);
  with_kernels<TransposeKernels>(from.scalar_type(), [&](const auto& kernels) {
    in_parallel(batch * squares, [&](int64_t begin, int64_t end) { kernels.transpose(p, begin, end); });
  });
}

}  // namespace cpu

namespace {

Tensor transpose_cpu(const Tensor& matrices) {
  check_matrices(matrices);
  const int64_t rows = matrices.size(-2), columns = matrices.size(-1);
  at::DimVector shape(matrices.sizes());
  std::swap(shape[shape.size() - 1], shape[shape.size() - 2]);
  const Tensor out = at::empty(shape, matrices.options());
  if (out.numel() > 0) cpu::launch_transpose(matrices, out, out.numel() / (rows * columns), rows, columns);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(overlock_mm, CPU, m) { m.impl("transpose", &transpose_cpu); }

}  // namespace overlock_mm
