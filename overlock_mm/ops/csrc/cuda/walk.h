// Maps as the kernels of walk.cuh take them: plain numbers, nothing of CUDA.
#pragma once

#include <cstdint>

namespace overlock_mm {

/// A map (B, H, W, C), and how an image is divided (divide_for_walk).
struct WalkedMap {
  int64_t batch, channels, height, width;
  int64_t rows;    ///< lines of a warp's tile
  int64_t warps;   ///< of a thread block
  int64_t strips;  ///< thread blocks for the same channels of an image: each has sums of its own
};

}  // namespace overlock_mm
