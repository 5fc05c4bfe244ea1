#include "contmix_tensors.h"

namespace overlock_mm {

Map map_to_read(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2),
          tensor.stride(3)};
}

Map map_to_write(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

namespace {

Tensor contiguous(const OptionalTensor& tensor) { return tensor ? tensor->contiguous() : Tensor(); }

const void* data_or_null(const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }

void* mutable_data_or_null(const Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; }

}  // namespace

ContMixInputs::ContMixInputs(const Tensor& value, const Tensor& query, const Tensor& keys, const OptionalTensor& bias,
                             const OptionalTensor& rpb_small, const OptionalTensor& rpb_large,
                             int64_t small_kernel_size, int64_t large_kernel_size)
    : value(value), query(query), kernel_size{small_kernel_size, large_kernel_size} {
  this->keys = keys.contiguous();
  this->bias = contiguous(bias);
  this->rpb[0] = contiguous(rpb_small);
  this->rpb[1] = contiguous(rpb_large);
}

ContMixParams ContMixInputs::params() const {
  ContMixParams params{};
  params.batch = value.size(0);
  params.groups = keys.size(1);
  params.height = value.size(2);
  params.width = value.size(3);
  params.channels = value.size(1) / 2 / params.groups;
  params.query_channels = keys.size(3);
  params.value = map_to_read(value);
  params.query = map_to_read(query);
  params.keys = keys.const_data_ptr();
  params.bias = data_or_null(bias);
  for (int branch = 0; branch < 2; ++branch) {
    params.kernel_size[branch] = kernel_size[branch];
    params.rpb[branch] = data_or_null(rpb[branch]);
  }
  return params;
}

ContMixOutputs::ContMixOutputs(const ContMixInputs& inputs)
    : output(empty_like_map(inputs.value)),
      logsumexp(at::empty({inputs.value.size(0), 2, inputs.keys.size(1), inputs.value.size(2), inputs.value.size(3)},
                          inputs.keys.options())) {}

void ContMixOutputs::add_to(ContMixParams& params) const {
  params.output = map_to_write(output);
  params.logsumexp = logsumexp.mutable_data_ptr();
}

ContMixGradientBuffers::ContMixGradientBuffers(const ContMixInputs& inputs, int64_t partials,
                                               std::array<bool, 6> wanted)
    : partials(partials), wanted(wanted), options(inputs.keys.options()) {
  const int64_t batch = inputs.value.size(0), groups = inputs.keys.size(1);
  if (wanted[0]) grad_value = empty_like_map(inputs.value);
  if (wanted[1]) grad_query = empty_like_map(inputs.query);
  if (wanted[2]) partial_keys = at::empty({partials, batch, groups, inputs.keys.size(2), inputs.keys.size(3)}, options);
  if (wanted[3]) partial_bias = at::empty({partials, batch, groups, inputs.keys.size(2)}, options);
  for (int branch = 0; branch < 2; ++branch) {
    const int64_t side = 2 * inputs.kernel_size[branch] - 1;
    if (wanted[4 + branch]) partial_rpb[branch] = at::empty({partials, batch, groups, side, side}, options);
  }
}

void ContMixGradientBuffers::add_to(ContMixParams& params) const {
  params.partials = partials;
  if (grad_value.defined()) params.grad_value = map_to_write(grad_value);
  if (grad_query.defined()) params.grad_query = map_to_write(grad_query);
  params.grad_keys = mutable_data_or_null(partial_keys);
  params.grad_bias = mutable_data_or_null(partial_bias);
  for (int branch = 0; branch < 2; ++branch) params.grad_rpb[branch] = mutable_data_or_null(partial_rpb[branch]);
}

ContMixGradients ContMixGradientBuffers::sums() const {
  // Each its own: outputs of an operator may not be one another.
  const auto none = [&] { return at::empty({0}, options); };
  Tensor grad_keys = none();
  if (wanted[2]) {
    grad_keys =
        at::empty({partial_keys.size(1), partial_keys.size(3), partial_keys.size(2), partial_keys.size(4)}, options)
            .transpose(1, 2);
    at::sum_out(grad_keys, partial_keys, at::IntArrayRef{0});
  }
  return {wanted[0] ? grad_value : none(),
          wanted[1] ? grad_query : none(),
          grad_keys,
          wanted[3] ? partial_bias.sum(at::IntArrayRef{0, 1, 2}) : none(),
          wanted[4] ? partial_rpb[0].sum(at::IntArrayRef{0, 1}) : none(),
          wanted[5] ? partial_rpb[1].sum(at::IntArrayRef{0, 1}) : none()};
}

}  // namespace overlock_mm
