#include "contmix_tensors.h"

#include <c10/core/SymInt.h>

#include <sstream>

namespace overlock_mm {

std::string shape_of(const Tensor& tensor) {
  std::ostringstream out;
  out << '(';
  for (int64_t i = 0; i < tensor.dim(); ++i) out << (i ? ", " : "") << tensor.sym_size(i);
  out << (tensor.dim() == 1 ? ",)" : ")");
  return out.str();
}

std::string name_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return "torch.float16";
    case at::kBFloat16:
      return "torch.bfloat16";
    case at::kFloat:
      return "torch.float32";
    case at::kDouble:
      return "torch.float64";
    case at::kInt:
      return "torch.int32";
    case at::kLong:
      return "torch.int64";
    default:
      return c10::toString(dtype);
  }
}

void check_dtype(const char* name, const Tensor& tensor, const Tensor& value, const char* name_of_value) {
  const at::ScalarType dtype = tensor.scalar_type(), of_value = value.scalar_type();
  const bool half = of_value == at::kHalf || of_value == at::kBFloat16;
  TORCH_CHECK_TYPE(dtype == of_value || (half && dtype == at::kFloat), name, " must have dtype ", name_of(of_value),
                   half ? " or torch.float32" : "", " with a ", name_of_value, " of ", name_of(of_value), ", got ",
                   name_of(dtype));
}

void check_same_dtype(const char* name, const Tensor& tensor, const Tensor& value, const char* name_of_value) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == value.scalar_type(), name, " must have dtype ", name_of(value.scalar_type()),
                   " with a ", name_of_value, " of ", name_of(value.scalar_type()), ", got ",
                   name_of(tensor.scalar_type()));
}

void check_device(const char* name, const Tensor& tensor, const Tensor& value, const char* name_of_value) {
  TORCH_CHECK_VALUE(tensor.device() == value.device(), name, " must be on the device of ", name_of_value, ", ",
                    value.device(), ", got ", tensor.device());
}

void check_arguments(const Tensor& value, const Tensor& query, const OptionalTensor& proj_bias,
                     const OptionalTensor& rpb_small, const OptionalTensor& rpb_large, const c10::SymInt& num_groups,
                     int64_t small_kernel_size, int64_t large_kernel_size) {
  TORCH_CHECK_VALUE(num_groups >= 1, "num_groups must be at least 1, got ", num_groups);
  const std::pair<const char*, int64_t> kernel_sizes[] = {{"small_kernel_size", small_kernel_size},
                                                          {"large_kernel_size", large_kernel_size}};
  for (const auto& [name, size] : kernel_sizes) {
    TORCH_CHECK_VALUE(size >= 1, name, " must be at least 1, got ", size);
    TORCH_CHECK_VALUE(size % 2 == 1, name, " must be odd, got ", size);
  }

  const at::ScalarType dtype = value.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
                   "value must be float16, bfloat16, float32 or float64, got ", name_of(dtype));
  check_device("query", query, value);
  check_same_dtype("query", query, value);

  TORCH_CHECK_VALUE(value.dim() == 4, "value must have 4 dimensions, got shape ", shape_of(value));
  TORCH_CHECK_VALUE(query.dim() == 4, "query must have 4 dimensions, got shape ", shape_of(query));
  TORCH_CHECK_VALUE(value.sym_size(1) > 0 && value.sym_size(1) % (num_groups * 2) == 0,
                    "value must have channels divisible by 2 * num_groups = ", num_groups * 2, ", got ",
                    value.sym_size(1));
  TORCH_CHECK_VALUE(query.sym_size(1) > 0 && query.sym_size(1) % num_groups == 0,
                    "query must have channels divisible by num_groups = ", num_groups, ", got ", query.sym_size(1));
  TORCH_CHECK_VALUE(query.sym_size(0) == value.sym_size(0) && query.sym_size(2) == value.sym_size(2) &&
                        query.sym_size(3) == value.sym_size(3),
                    "query must have the batch and map of value, (", value.sym_size(0), ", *, ", value.sym_size(2),
                    ", ", value.sym_size(3), "), got shape ", shape_of(query));
  for (const auto& [name, size] : kernel_sizes) {
    TORCH_CHECK_VALUE(value.sym_size(2) >= size && value.sym_size(3) >= size, name,
                      " must be at most the map's smaller side, ", value.sym_size(2).min(value.sym_size(3)), ", got ",
                      size);
  }

  const int64_t slots = small_kernel_size * small_kernel_size + large_kernel_size * large_kernel_size;
  if (proj_bias) {
    check_device("proj_bias", *proj_bias, value);
    check_dtype("proj_bias", *proj_bias, value);
    TORCH_CHECK_VALUE(proj_bias->dim() == 1 && proj_bias->sym_size(0) == slots, "proj_bias must have shape (", slots,
                      ",), got ", shape_of(*proj_bias));
  }
  const std::tuple<const char*, const OptionalTensor&, int64_t> position_biases[] = {
      {"rpb_small", rpb_small, 2 * small_kernel_size - 1}, {"rpb_large", rpb_large, 2 * large_kernel_size - 1}};
  for (const auto& [name, rpb, side] : position_biases) {
    if (!rpb) continue;
    check_device(name, *rpb, value);
    check_dtype(name, *rpb, value);
    TORCH_CHECK_VALUE(
        rpb->dim() == 3 && rpb->sym_size(0) == num_groups && rpb->sym_size(1) == side && rpb->sym_size(2) == side, name,
        " must have shape (", num_groups, ", ", side, ", ", side, "), got ", shape_of(*rpb));
  }
}

void check_internal_arguments(const Tensor& value, const Tensor& query, const Tensor& keys, const OptionalTensor& bias,
                              const OptionalTensor& rpb_small, const OptionalTensor& rpb_large,
                              int64_t small_kernel_size, int64_t large_kernel_size) {
  TORCH_CHECK_VALUE(keys.dim() == 4, "keys must have 4 dimensions, got shape ", shape_of(keys));
  check_arguments(value, query, bias, rpb_small, rpb_large, keys.sym_size(1), small_kernel_size, large_kernel_size);
  const int64_t slots = small_kernel_size * small_kernel_size + large_kernel_size * large_kernel_size;
  TORCH_CHECK_VALUE(keys.sym_size(0) == value.sym_size(0) && keys.sym_size(2) == slots &&
                        keys.sym_size(1) * keys.sym_size(3) == query.sym_size(1),
                    "keys must have shape (", value.sym_size(0), ", G, ", slots, ", ", query.sym_size(1), " / G), got ",
                    shape_of(keys));
  check_device("keys", keys, value);
  const std::pair<const char*, OptionalTensor> parameters[] = {
      {"keys", keys}, {"bias", bias}, {"rpb_small", rpb_small}, {"rpb_large", rpb_large}};
  for (const auto& [name, tensor] : parameters) {
    TORCH_CHECK_TYPE(!tensor || tensor->scalar_type() == accumulation_type(value), name, " must have dtype ",
                     name_of(accumulation_type(value)), ", got ", name_of(tensor->scalar_type()));
  }
}

void check_backward_arguments(const Tensor& grad_output, const Tensor& value, const Tensor& keys, const Tensor& output,
                              const Tensor& logsumexp) {
  for (const auto& [name, map] : {std::pair{"grad_output", grad_output}, std::pair{"output", output}}) {
    check_device(name, map, value);
    check_same_dtype(name, map, value);
    TORCH_CHECK_VALUE(map.sym_sizes() == value.sym_sizes(), name, " must have the shape of value, ", shape_of(value),
                      ", got ", shape_of(map));
  }
  check_device("logsumexp", logsumexp, value);
  TORCH_CHECK_TYPE(logsumexp.scalar_type() == keys.scalar_type(), "logsumexp must have dtype ",
                   name_of(keys.scalar_type()), ", got ", name_of(logsumexp.scalar_type()));
  const std::array<c10::SymInt, 5> sizes{value.sym_size(0), 2, keys.sym_size(1), value.sym_size(2), value.sym_size(3)};
  TORCH_CHECK_VALUE(logsumexp.sym_sizes() == c10::SymIntArrayRef(sizes), "logsumexp must have shape (", sizes[0],
                    ", 2, ", sizes[2], ", ", sizes[3], ", ", sizes[4], "), got ", shape_of(logsumexp));
}

Map as_map(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

namespace {

Tensor contiguous(const OptionalTensor& tensor) { return tensor ? tensor->contiguous() : Tensor(); }

void* data_or_null(const Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }

Tensor empty_like_map(const Tensor& map) { return at::empty(map.sizes(), map.options(), memory_format_of(map)); }

}  // namespace

Inputs::Inputs(const Tensor& value, const Tensor& query, const Tensor& keys, const OptionalTensor& bias,
               const OptionalTensor& rpb_small, const OptionalTensor& rpb_large, int64_t small_kernel_size,
               int64_t large_kernel_size)
    : value(value), query(query), kernel_size{small_kernel_size, large_kernel_size} {
  this->keys = keys.contiguous();
  this->bias = contiguous(bias);
  this->rpb[0] = contiguous(rpb_small);
  this->rpb[1] = contiguous(rpb_large);
}

ContMixParams Inputs::params() const {
  ContMixParams params{};
  params.batch = value.size(0);
  params.groups = keys.size(1);
  params.height = value.size(2);
  params.width = value.size(3);
  params.channels = value.size(1) / 2 / params.groups;
  params.query_channels = keys.size(3);
  params.value = as_map(value);
  params.query = as_map(query);
  params.keys = keys.data_ptr();
  params.bias = data_or_null(bias);
  for (int branch = 0; branch < 2; ++branch) {
    params.kernel_size[branch] = kernel_size[branch];
    params.rpb[branch] = data_or_null(rpb[branch]);
  }
  return params;
}

Outputs::Outputs(const Inputs& inputs)
    : output(empty_like_map(inputs.value)),
      logsumexp(at::empty({inputs.value.size(0), 2, inputs.keys.size(1), inputs.value.size(2), inputs.value.size(3)},
                          inputs.keys.options())) {}

void Outputs::add_to(ContMixParams& params) const {
  params.output = as_map(output);
  params.logsumexp = logsumexp.data_ptr();
}

GradientBuffers::GradientBuffers(const Inputs& inputs, int64_t partials, std::array<bool, 6> wanted)
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

void GradientBuffers::add_to(ContMixParams& params) const {
  params.partials = partials;
  if (grad_value.defined()) params.grad_value = as_map(grad_value);
  if (grad_query.defined()) params.grad_query = as_map(grad_query);
  params.grad_keys = data_or_null(partial_keys);
  params.grad_bias = data_or_null(partial_bias);
  for (int branch = 0; branch < 2; ++branch) params.grad_rpb[branch] = data_or_null(partial_rpb[branch]);
}

Gradients GradientBuffers::sums() const {
  // Each its own: outputs of an operator may not be one another.
  const auto none = [&] { return at::empty({0}, options); };
  return {wanted[0] ? grad_value : none(),
          wanted[1] ? grad_query : none(),
          wanted[2] ? partial_keys.sum(at::IntArrayRef{0}) : none(),
          wanted[3] ? partial_bias.sum(at::IntArrayRef{0, 1, 2}) : none(),
          wanted[4] ? partial_rpb[0].sum(at::IntArrayRef{0, 1}) : none(),
          wanted[5] ? partial_rpb[1].sum(at::IntArrayRef{0, 1}) : none()};
}

}  // namespace overlock_mm
