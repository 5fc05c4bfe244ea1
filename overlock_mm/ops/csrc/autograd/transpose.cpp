// Transposition has no derivative, and says so if one is asked for.
#include "autograd.h"

namespace overlock_mm {

TORCH_LIBRARY_IMPL(overlock_mm, AutogradCPU, m) {
  m.impl("transpose", torch::autograd::autogradNotImplementedFallback());
}
TORCH_LIBRARY_IMPL(overlock_mm, AutogradMeta, m) {
  m.impl("transpose", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace overlock_mm
