// Launchers of the CUDA kernels of branch norms. They do not allocate or synchronise, so that a CUDA graph may capture
// them, and no sum depends on the order in which threads run.
//
// With C channels, M the bytes of a map and t the taps of all branches, they launch (parts and weight_parts are those
// of the functions below, sums in float32 have 4 bytes):
//
//   launcher     launches  reads, from global memory                         writes
//   statistics   2         M, 4 C t; the partial sums                        partial: 8 parts C branches; 8 C branches
//   fold         1         4 C t, 16 C branches                              4 C (K² + 1)
//   products     2         2 M, 4 C t, 4 C branches; the partial sums        partial: 4 parts C (branches + 1); its
//   sums gradients    2         2 M, 4 C t, 16 C branches; then branches M, M     branches M; then M, partial: 4 parts
//   C t weight sums  1         4 weight_parts C t                                4 C t
//
// Halos of tiles are read several times, through the caches. tools/benchmarks/gpu_cost.py counts these launches and
// bytes, and tests/test_ops/test_cuda_branch_norms.py compares it with the emulation.
#pragma once

#include <cuda_runtime_api.h>

#include "branch_norms_params.h"

namespace overlock_mm {

/// CudaBranchNormsParams::parts and weight_parts.
struct BranchNormsParts {
  int64_t sums, weights;
  bool tiled;  ///< whether the branches are those of a model, and the tiled kernels run
};

/// For a map with positions, on a device whose blocks may have so many bytes of shared memory, and on the current one.
BranchNormsParts branch_norms_parts(const CudaBranchNormsParams& params, int64_t shared_memory);
cudaError_t branch_norms_parts(const CudaBranchNormsParams& params, BranchNormsParts* parts);

// Launch on the current device, for a map with positions.

/// input, weights → mean, variance, and the partial sums.
cudaError_t launch_branch_statistics(const CudaBranchNormsParams& params, cudaStream_t stream);
/// mean, variance, weights, norm_weights, norm_biases → kernel, bias.
cudaError_t launch_branch_fold(const CudaBranchNormsParams& params, cudaStream_t stream);
/// grad_output, input, weights, mean → grad_sum, products, and the partial sums; with variance → grad_norm_weights and
/// grad_norm_biases, unless they are null.
cudaError_t launch_branch_products(const CudaBranchNormsParams& params, cudaStream_t stream);
/// All but the results → grad_input, grad_branches (for its own use), partial_grad_weights.
cudaError_t launch_branch_gradients(const CudaBranchNormsParams& params, cudaStream_t stream);
/// partial_grad_weights → grad_weights. They have all parts that were made.
cudaError_t launch_branch_weight_sums(const CudaBranchNormsParams& params, int64_t parts, cudaStream_t stream);

}  // namespace overlock_mm
