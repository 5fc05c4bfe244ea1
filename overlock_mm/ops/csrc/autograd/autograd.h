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

#include <vector>

#include "../tensors.h"

namespace overlock_mm {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

/// The devices for which operators have functions under autograd: the CPU and meta, and CUDA if there are kernels for
/// it, and the binary has CUDA.
inline std::vector<c10::DispatchKey> autograd_keys([[maybe_unused]] bool has_cuda) {
  std::vector<c10::DispatchKey> keys{c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutogradMeta};
#if defined(OVERLOCK_MM_WITH_CUDA)
  if (has_cuda) keys.push_back(c10::DispatchKey::AutogradCUDA);
#endif
  return keys;
}

/// Register the function that an operator is under autograd.
template <typename Function>
void impl_autograd(torch::Library& library, const char* name, Function* function, bool has_cuda = false) {
  for (const c10::DispatchKey key : autograd_keys(has_cuda)) library.impl(name, torch::dispatch(key, function));
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

/// The same for an operator that has a reference under the alias key Autograd.
inline void impl_without_derivative(torch::Library& library, const char* name, bool has_cuda = false) {
  for (const c10::DispatchKey key : autograd_keys(has_cuda)) {
    library.impl(name, torch::dispatch(key, without_derivative()));
  }
}

}  // namespace overlock_mm
