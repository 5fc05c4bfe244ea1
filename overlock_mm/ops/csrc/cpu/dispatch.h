// Which kernels run.
#pragma once

#include <ATen/Version.h>

#include <cstdlib>
#include <string>

#include "tables.h"

namespace overlock_mm::cpu {

enum class InstructionSet { baseline, avx2, avx512, avx512_bf16 };

/// The best one of this processor, or the one that ATEN_CPU_CAPABILITY limits torch to. AVX-512 is then the one without
/// instructions for bfloat16.
inline InstructionSet instruction_set() {
  static const InstructionSet best = [] {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability.rfind("AVX512", 0) == 0) {
      const bool limited = std::getenv("ATEN_CPU_CAPABILITY") != nullptr;
      return !limited && __builtin_cpu_supports("avx512bf16") ? InstructionSet::avx512_bf16 : InstructionSet::avx512;
    }
    if (capability.rfind("AVX2", 0) == 0) return InstructionSet::avx2;
#endif
    return InstructionSet::baseline;
  }();
  return best;
}

/// The kernels of that instruction set.
template <typename Kernels>
const Kernels& best_table() {
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::avx512_bf16) return avx512_bf16::table<Kernels>();
  if (instruction_set() == InstructionSet::avx512) return avx512::table<Kernels>();
  if (instruction_set() == InstructionSet::avx2) return avx2::table<Kernels>();
#endif
  return baseline::table<Kernels>();
}

}  // namespace overlock_mm::cpu
