// Response norms on a GPU, for operators that have one within.
#pragma once

#include <utility>

#include "../tensors.h"
#include "response_norm_launch.h"

namespace overlock_mm {

/// Of sums of squares, (B, strips, C): the response and the factors of the norm, (B, C) each.
std::pair<Tensor, Tensor> launch_response_and_scale(const Tensor& squares, const Tensor& gamma, double eps);

/// input * scale + shift, for maps in channels_last, in `output`, which is another map.
void launch_scale_and_shift(const Tensor& input, const Tensor& scale, const Tensor& shift, const Tensor& output);

struct ResponseGradients {
  Tensor scale, slope;     ///< (B, C): the gradient of the map is scale * grad_output + slope * map
  Tensor grads_of_images;  ///< (B, 2, C): of gamma and beta
};

/// Of sums, (B, strips, C), of grad_output * map and of grad_output.
ResponseGradients launch_response_gradients(const Tensor& products, const Tensor& sums, const Tensor& gamma,
                                            const Tensor& response, double eps);

/// Output, scale and response of a map without numbers.
std::tuple<Tensor, Tensor, Tensor> response_norm_of_empty(const Tensor& x);

// The same in PyTorch's operators: what a measurement compares the kernels with.

/// Output, scale and response.
std::tuple<Tensor, Tensor, Tensor> response_norm_by_pytorch(const Tensor& x, const Tensor& gamma, const Tensor& beta,
                                                            double eps);
Tensor response_normed_by_pytorch(const Tensor& x, const Tensor& scale, const Tensor& beta);
std::tuple<Tensor, Tensor, Tensor> response_norm_backward_by_pytorch(const Tensor& grad_output, const Tensor& x,
                                                                     const Tensor& gamma, const Tensor& response,
                                                                     double eps);

}  // namespace overlock_mm
