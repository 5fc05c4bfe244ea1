// Shared by the derivatives of all operators.
//
// They are registered for the keys AutogradCPU and AutogradMeta, since the compiled kernels are for the CPU. The
// references (overlock_mm/ops/_library.py), which ATen's autograd differentiates, take the alias key Autograd, which
// stands for all devices that have no registration of their own.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "../tensors.h"

namespace overlock_mm {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

/// Whether a backward has to be prepared. On a small map the preparation takes longer than the operator.
template <typename... Tensors>
bool wants_gradient(const Tensors&... tensors) {
  // A tangent of forward mode goes to autograd, which refuses it.
  return (tensors._fw_grad(/*level=*/0).defined() || ...) ||
         (at::GradMode::is_enabled() && (tensors.requires_grad() || ...));
}

}  // namespace overlock_mm
