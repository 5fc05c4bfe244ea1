// Transposition: schema, and shapes for the meta device.
#include <torch/library.h>

#include "checks.h"

namespace overlock_mm {
namespace {

Tensor transpose_meta(const Tensor& matrices) {
  check_matrices(matrices);
  c10::SymDimVector shape(matrices.sym_sizes());
  std::swap(shape[shape.size() - 1], shape[shape.size() - 2]);
  return at::empty_symint(shape, matrices.options());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) {
  // The last two dimensions change places, in memory too. The compiled operator has no derivative.
  m.def("transpose(Tensor matrices) -> Tensor");
}

TORCH_LIBRARY_IMPL(overlock_mm, Meta, m) { m.impl("transpose", &transpose_meta); }

}  // namespace overlock_mm
