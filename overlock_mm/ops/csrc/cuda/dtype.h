// The dtypes of maps that CUDA kernels have.
#pragma once

namespace overlock_mm {

enum class Dtype { float32, float64, float16, bfloat16 };

}  // namespace overlock_mm
