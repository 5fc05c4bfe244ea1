// Which of two implementations of a call runs: the kernels here or PyTorch's.
//
// It is measured at the first call of a kind, on the GPU that it runs on, as torch.backends.cudnn.benchmark does:
// nobody is slower than with PyTorch alone because a kernel was tuned for another GPU. A setting forces one.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "../tensors.h"
#include "choices.h"

namespace overlock_mm {

/// Calls of a kind have one operator, dtype, layout, kernel and number of channels, on one GPU, and maps of about one
/// size (positions of the batch up to the next power of 2).
std::string kind_of_call(const std::string& name, const Tensor& map);
std::string kind_of_call(const std::string& name, const Tensor& map, int64_t kernel_size, int64_t dilation);

/// Which one runs. Not known yet, both run a few times, and the host waits for them, except
/// - under torch.use_deterministic_algorithms, where the choice must not depend on a measurement,
/// - while a CUDA graph captures the stream:
/// then PyTorch's runs, and the choice stays open.
Implementation choose(const std::string& kind, const std::function<void()>& ours, const std::function<void()>& pytorch);

/// The result of the implementation that runs. Both take nothing and return the same type.
template <typename Ours, typename PyTorch>
auto fastest(const std::string& kind, const Ours& ours, const PyTorch& pytorch) {
  const Implementation chosen = choose(kind, [&] { ours(); }, [&] { pytorch(); });
  return chosen == Implementation::ours ? ours() : pytorch();
}

}  // namespace overlock_mm
