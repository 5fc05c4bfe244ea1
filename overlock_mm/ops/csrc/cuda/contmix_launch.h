// Launchers of the CUDA kernels of ContMix. They do not allocate or synchronise, so that a CUDA graph may capture them,
// and no sum depends on the order in which threads run.
#pragma once

#include <cuda_runtime_api.h>

#include "../contmix.h"
#include "dtype.h"

namespace overlock_mm {

/// ContMixParams::partials of a backward on a CUDA device: depends on the shapes only.
int64_t contmix_backward_partials(const ContMixParams& params);

/// Launch on the current device; an empty batch launches nothing. Kernel sizes are bounded by shared memory alone: in
/// float64, the backward of one beyond about 150 does not fit on every GPU, and the launch fails with
/// cudaErrorInvalidValue.
///
/// A forward is one kernel. A backward is one for grad_value and one for all other gradients, and the operator then
/// sums the partial sums, one launch for each. tools/benchmarks/gpu_cost.py counts these launches and their bytes, and
/// tests/test_ops/test_cuda_emulation.py compares its launches with those of the emulation.
cudaError_t launch_contmix_forward(const ContMixParams& params, Dtype dtype, cudaStream_t stream);
cudaError_t launch_contmix_backward(const ContMixParams& params, Dtype dtype, cudaStream_t stream);

}  // namespace overlock_mm
