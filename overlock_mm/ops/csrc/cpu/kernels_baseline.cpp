// The CPU kernels for any processor: 16-byte vectors, which all of them have (SSE2, NEON).
#include <cmath>
#include <cstdint>
#include <new>

#include "tables.h"

#define OVERLOCK_MM_NAMESPACE baseline
#define OVERLOCK_MM_VECTOR_BYTES 16

#include "branch_norms_kernels.h"
#include "contmix_kernels.h"
#include "depthwise_conv2d_kernels.h"
#include "gelu_kernels.h"
#include "response_norm_kernels.h"
#include "transpose_kernels.h"
