// For headers that C++ and CUDA code share.
#pragma once

#if defined(__CUDACC__)
#define OVERLOCK_MM_HOST_DEVICE __host__ __device__
#else
#define OVERLOCK_MM_HOST_DEVICE
#endif
