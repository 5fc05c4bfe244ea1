// ContMix on a CUDA device: what contmix_launch.cu gives to the torch glue. Nothing here allocates or synchronises, so
// that all of it may be captured in a CUDA graph, and no sum depends on the order in which threads happen to run.
#pragma once

#include <cuda_runtime_api.h>

#include "../contmix.h"

namespace overlock_mm {

/// ContMixParams::partials of a backward on a CUDA device: depends on the shapes only.
int64_t contmix_backward_partials_cuda(const ContMixParams& params);

/// Launch on the current device; an empty batch launches nothing. Kernel sizes are bounded by shared memory alone: in
/// float64, the backward of one beyond about 150 does not fit on every GPU, and the launch fails with
/// cudaErrorInvalidValue.
cudaError_t contmix_forward_cuda(const ContMixParams& params, Dtype dtype, cudaStream_t stream);
cudaError_t contmix_backward_cuda(const ContMixParams& params, Dtype dtype, cudaStream_t stream);

}  // namespace overlock_mm
