#pragma once

#include <string>

namespace overlock_mm {

/// The instruction set that the CPU kernels use on this processor.
std::string cpu_instruction_set();

}  // namespace overlock_mm
