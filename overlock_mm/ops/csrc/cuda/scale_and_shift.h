// Scales and shifts on a GPU, for operators that have one within.
#pragma once

#include "scale_and_shift_launch.h"
#include "tensors.h"

namespace overlock_mm {

/// Of a map in channels_last: its sizes, strips and data. All else is zero.
ScaleAndShiftParams scale_and_shift_params(const Tensor& input);

/// (C) or (B, C) beside a map, in its dtype.
Tensor beside(const Tensor& map, const Tensor& factors);

}  // namespace overlock_mm
