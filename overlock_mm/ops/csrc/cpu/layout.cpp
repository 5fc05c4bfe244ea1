// Between the layouts of tensors and the one that the kernels take.
#include "launch.h"

namespace overlock_mm::cpu {
namespace {

/// A map of float32 or float64 in that layout. (ATen's copy from one layout into the other takes ten times as long as
/// moving the bytes, and a hundred times where the lines of an image lie a power of two apart.)
Tensor in_layout(const Tensor& map, at::MemoryFormat format) {
  const bool to_channels_last = format == at::MemoryFormat::ChannelsLast;
  const at::MemoryFormat other = to_channels_last ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
  if (map.is_contiguous(format) || !map.is_contiguous(other) || map.numel() == 0) return map.contiguous(format);
  const Tensor out = at::empty(map.sizes(), map.options(), format);
  const int64_t channels = map.size(1), positions = map.size(2) * map.size(3);
  if (to_channels_last) {
    launch_transpose(map, out, map.size(0), channels, positions);
  } else {
    launch_transpose(map, out, map.size(0), positions, channels);
  }
  return out;
}

}  // namespace

Tensor as_input(const Tensor& map) { return in_layout(map.to(accumulation_type(map)), at::MemoryFormat::ChannelsLast); }

namespace {

bool stays_bfloat16(const Tensor& map) {
  return map.scalar_type() == at::kBFloat16 && map.is_contiguous(at::MemoryFormat::ChannelsLast);
}

}  // namespace

Tensor as_map(const Tensor& map) { return stays_bfloat16(map) ? map : as_input(map); }

std::pair<Tensor, Tensor> as_maps(const Tensor& a, const Tensor& b) {
  if (stays_bfloat16(a) && stays_bfloat16(b)) return {a, b};
  return {as_input(a), as_input(b)};
}

Tensor as_parameter(const Tensor& parameter, const Tensor& map) {
  return parameter.to(accumulation_type(map)).contiguous();
}

Tensor empty_output(const Tensor& input) {
  return at::empty(input.sizes(), input.options(), at::MemoryFormat::ChannelsLast);
}

Tensor as_output(const Tensor& map, const Tensor& like) {
  return in_layout(map, memory_format_of(like)).to(like.scalar_type());
}

}  // namespace overlock_mm::cpu
