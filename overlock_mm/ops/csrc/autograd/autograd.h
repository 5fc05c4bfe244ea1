// Shared by the derivatives of all operators.
//
// They are registered for the devices with compiled kernels, and for meta. The references
// (overlock_mm/ops/_library.py), which ATen's autograd differentiates, take the alias key Autograd, which stands for
// all devices that have no registration of their own.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "../tensors.h"

namespace overlock_mm {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

/// Register the function that an operator is under autograd, for the CPU and meta, and for CUDA if it has kernels there
/// (and the binary has CUDA).
template <typename Function>
void impl_autograd(torch::Library& library, const char* name, Function* function, bool has_cuda = false) {
  library.impl(name, torch::dispatch(c10::DispatchKey::AutogradCPU, function));
  library.impl(name, torch::dispatch(c10::DispatchKey::AutogradMeta, function));
#if defined(OVERLOCK_MM_WITH_CUDA)
  if (has_cuda) library.impl(name, torch::dispatch(c10::DispatchKey::AutogradCUDA, function));
#else
  static_cast<void>(has_cuda);
#endif
}

/// Whether a backward has to be prepared. On a small map the preparation takes longer than the operator.
template <typename... Tensors>
bool wants_gradient(const Tensors&... tensors) {
  // A tangent of forward mode goes to autograd, which refuses it.
  return (tensors._fw_grad(/*level=*/0).defined() || ...) ||
         (at::GradMode::is_enabled() && (tensors.requires_grad() || ...));
}

/// For backward operators. Their results have no derivative, and say so if one is asked for.
inline void call_without_derivative(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  variable_list differentiated;
  for (const c10::IValue& input : torch::jit::last(*stack, op.schema().arguments().size())) {
    const bool is_list = input.isTensorList();
    if (!is_list && !input.isTensor()) continue;
    for (const Tensor& tensor : is_list ? input.toTensorVector() : variable_list{input.toTensor()}) {
      if (tensor.requires_grad()) differentiated.push_back(tensor);
    }
  }
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    op.callBoxed(stack);
  }
  if (!at::GradMode::is_enabled() || differentiated.empty()) return;
  const auto error = std::make_shared<torch::autograd::Error>(
      "the compiled operators of overlock_mm have no second derivative, and their references in plain PyTorch have "
      "one: run forward and backward in `with overlock_mm.ops.use_references():`",
      torch::autograd::collect_next_edges(differentiated));
  for (const c10::IValue& output : torch::jit::last(*stack, op.schema().returns().size())) {
    Tensor tensor = output.isTensor() ? output.toTensor() : Tensor();
    if (tensor.defined()) torch::autograd::set_history(tensor, error);
  }
}

inline torch::CppFunction without_derivative() {
  return torch::CppFunction::makeFromBoxedFunction<&call_without_derivative>();
}

}  // namespace overlock_mm
