// Runs a step of branch norms: statistics, fold, products, gradients and sums of the weights' gradients, each of
// launch_branch_*. test_cuda_branch_norms.py has the order of numbers and arrays.
#include "branch_norms_launch.h"
#include "case.h"

namespace {

using overlock_mm::CudaBranchNormsParams;
using overlock_mm::Dtype;
using namespace cuda_emulation;

cudaError_t launch_all(Case& the_case) {
  auto number = the_case.numbers.begin();
  auto array = the_case.arrays.begin();
  const auto next = [&] { return (array++)->data; };

  CudaBranchNormsParams p{};
  p.dtype = static_cast<Dtype>(*number++);
  p.batch = *number++;
  p.channels = *number++;
  p.height = *number++;
  p.width = *number++;
  p.branches = static_cast<int>(*number++);
  p.eps = 1.0 / static_cast<double>(*number++);
  const bool of_means = *number++ != 0;  // of all positions; else sums
  for (int b = 0; b < p.branches; ++b) {
    p.kernel_size[b] = *number++;
    p.dilation[b] = *number++;
  }

  p.input = next();
  p.grad_output = next();
  for (int b = 0; b < p.branches; ++b) p.weights[b] = next();
  for (int b = 0; b < p.branches; ++b) p.norm_weights[b] = next();
  for (int b = 0; b < p.branches; ++b) p.norm_biases[b] = next();
  p.mean = next();
  p.variance = next();
  p.kernel = next();
  p.bias = next();
  p.grad_sum = next();
  p.products = next();
  p.grad_norm_weights = next();
  p.grad_norm_biases = next();
  p.grad_input = next();
  p.grad_weights = next();
  Array& parts = *array++;

  overlock_mm::BranchNormsParts in_parts{};
  cudaError_t error = branch_norms_parts(p, &in_parts);
  p.parts = in_parts.sums;
  p.weight_parts = in_parts.weights;
  static_cast<int64_t*>(parts.data)[0] = p.parts;
  static_cast<int64_t*>(parts.data)[1] = p.weight_parts;
  const int64_t accumulator = p.dtype == Dtype::float64 ? 8 : 4;
  const int64_t element = p.dtype == Dtype::float64 ? 8 : p.dtype == Dtype::float32 ? 4 : 2;
  const int64_t numbers = p.parts * p.branches * p.channels * accumulator;
  const Array counts(p.parts * 8), means(numbers), squares(numbers),
      products(p.parts * (p.branches + 1) * p.channels * accumulator),
      grad_branches(p.branches * p.batch * p.image_size() * element),
      grad_weights(p.weight_parts * p.channels * p.taps() * accumulator);
  p.partial_counts = static_cast<int64_t*>(counts.data);
  p.partial_means = means.data;
  p.partial_squares = squares.data;
  p.partial_products = products.data;
  p.grad_branches = grad_branches.data;
  p.partial_grad_weights = grad_weights.data;
  p.divisor = of_means ? static_cast<double>(p.positions()) : 1;
  p.grad_mean = p.grad_sum;
  p.product_mean = p.products;

  for (const auto& launch : {overlock_mm::launch_branch_statistics, overlock_mm::launch_branch_fold,
                             overlock_mm::launch_branch_products, overlock_mm::launch_branch_gradients}) {
    if (error == cudaSuccess) error = launch(p, nullptr);
  }
  return error == cudaSuccess ? overlock_mm::launch_branch_weight_sums(p, p.weight_parts, nullptr) : error;
}

}  // namespace

int main(int count, char** arguments) { return run_case(count, arguments, launch_all); }
