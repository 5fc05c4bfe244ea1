// Which kernels run, and on how many threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <string>

#include "tables.h"

namespace overlock_mm::cpu {

enum class InstructionSet { baseline, avx2, avx512 };

/// The best one of this processor, or what ATEN_CPU_CAPABILITY asks torch to make do with.
inline InstructionSet instruction_set() {
  static const InstructionSet best = [] {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability.rfind("AVX512", 0) == 0) return InstructionSet::avx512;
    if (capability.rfind("AVX2", 0) == 0) return InstructionSet::avx2;
#endif
    return InstructionSet::baseline;
  }();
  return best;
}

/// The kernels of that instruction set.
template <typename Table>
const Table& best_table() {
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::avx512) return avx512::table<Table>();
  if (instruction_set() == InstructionSet::avx2) return avx2::table<Table>();
#endif
  return baseline::table<Table>();
}

template <typename Function>
void in_parallel(int64_t items, Function function) {
  at::parallel_for(0, items, 1, function);
}

}  // namespace overlock_mm::cpu
