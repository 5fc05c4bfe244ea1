// How the binary was built, and which instruction set it uses here: for `python -m overlock_mm.ops` and bug reports.
#include "build_info.h"

#include <torch/library.h>
#include <torch/version.h>

#include <sstream>
#include <string>

#ifdef OVERLOCK_MM_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace overlock_mm {
namespace {

#if defined(__VERSION__)
#define OVERLOCK_MM_COMPILER __VERSION__
#else
#define OVERLOCK_MM_COMPILER "unknown"
#endif

/// As JSON. The torch version is in the first string literal: overlock_mm/ops/_library.py reads it from the file,
/// before it loads the binary.
std::string build_info() {
  std::ostringstream out;
  out << "{\"torch\": \"" TORCH_VERSION "\", \"compiler\": \"" OVERLOCK_MM_COMPILER "\", \"cpu\": \""
      << cpu_instruction_set() << "\", \"cuda\": ";
#ifdef OVERLOCK_MM_WITH_CUDA
  out << '"' << CUDART_VERSION / 1000 << '.' << CUDART_VERSION % 1000 / 10
      << "\", \"cuda_architectures\": \"" OVERLOCK_MM_CUDA_ARCHITECTURES "\"";
#else
  out << "null, \"cuda_architectures\": null";
#endif
  out << '}';
  return out.str();
}

}  // namespace

TORCH_LIBRARY_IMPL(overlock_mm, CompositeExplicitAutograd, m) { m.impl("_build_info", &build_info); }

}  // namespace overlock_mm
