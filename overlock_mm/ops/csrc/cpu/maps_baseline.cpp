// Kernels over maps for any processor: 16-byte vectors, which all of them have (SSE2, NEON).
#include <cmath>
#include <cstdint>
#include <new>

#include "maps_cpu.h"

#define OVERLOCK_MM_NAMESPACE baseline
#define OVERLOCK_MM_VECTOR_BYTES 16

#include "map_kernels.h"
