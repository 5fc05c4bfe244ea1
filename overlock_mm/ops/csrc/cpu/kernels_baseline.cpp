// The CPU kernels for any processor: 16-byte vectors, which all of them have (SSE2, NEON).
#include <cmath>
#include <cstdint>
#include <new>

#include "contmix_cpu.h"
#include "maps_cpu.h"
#include "tables.h"

#define OVERLOCK_MM_NAMESPACE baseline
#define OVERLOCK_MM_VECTOR_BYTES 16

#include "contmix_kernels.h"
#include "map_kernels.h"
