// Reads a case from a file, runs the forward and the backward of contmix_launch.cu, and writes what they wrote to
// another file. test_cuda_emulation.py has the format.
#include "case.h"
#include "contmix_launch.h"

namespace {

using overlock_mm::ContMixParams;
using overlock_mm::Dtype;
using overlock_mm::Map;
using namespace cuda_emulation;

/// A map: strides, where it begins, and the bytes of the storage it is a part of.
Array read_map(Reader& reader, Map* map, int64_t element) {
  map->batch_stride = reader.number();
  map->channel_stride = reader.number();
  map->row_stride = reader.number();
  map->column_stride = reader.number();
  const int64_t offset = reader.number();
  Array storage(reader);
  if (storage.data) map->data = static_cast<char*>(storage.data) + offset * element;
  return storage;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) fail("usage: run_contmix CASE RESULT");
  Reader reader(arguments[1]);

  ContMixParams params{};
  const auto dtype = static_cast<Dtype>(reader.number());
  params.batch = reader.number();
  params.groups = reader.number();
  params.height = reader.number();
  params.width = reader.number();
  params.channels = reader.number();
  params.query_channels = reader.number();
  for (int64_t& kernel_size : params.kernel_size) kernel_size = reader.number();
  cuda_emulation::device().shared_memory_limit = static_cast<int>(reader.number());
  cuda_emulation::device().reversed = reader.number() != 0;
  params.partials = reader.number();  // or 0: as many as for this device
  bool wants[4];                      // grad_keys, grad_bias, grad_rpb
  for (bool& want : wants) want = reader.number() != 0;

  const int64_t element = dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
  const int64_t accumulator = dtype == Dtype::float64 ? 8 : 4;
  const Array value = read_map(reader, &params.value, element), query = read_map(reader, &params.query, element);
  const Array output = read_map(reader, &params.output, element);
  const Array grad_output = read_map(reader, &params.grad_output, element);
  const Array grad_value = read_map(reader, &params.grad_value, element);
  const Array grad_query = read_map(reader, &params.grad_query, element);
  const Array keys(reader), bias(reader), rpb_small(reader), rpb_large(reader);
  params.keys = keys.data;
  params.bias = bias.data;
  params.rpb[0] = rpb_small.data;
  params.rpb[1] = rpb_large.data;
  const Array logsumexp(params.batch * 2 * params.groups * params.height * params.width * accumulator);
  params.logsumexp = logsumexp.data;

  if (launch_contmix_forward(params, dtype, nullptr) != cudaSuccess) fail("the forward was not launched");

  if (params.partials == 0) params.partials = overlock_mm::contmix_backward_partials(params);
  const int64_t copies = params.partials * params.batch * params.groups * accumulator;
  const int64_t entries[] = {2 * params.kernel_size[0] - 1, 2 * params.kernel_size[1] - 1};
  const int64_t sizes[] = {params.slots() * params.query_channels, params.slots(), entries[0] * entries[0],
                           entries[1] * entries[1]};
  Array sums[4];
  for (int i = 0; i < 4; ++i) {
    if (wants[i]) sums[i] = Array(copies * sizes[i]);
  }
  params.grad_keys = sums[0].data;
  params.grad_bias = sums[1].data;
  params.grad_rpb[0] = sums[2].data;
  params.grad_rpb[1] = sums[3].data;
  if (grad_output.data && launch_contmix_backward(params, dtype, nullptr) != cudaSuccess)
    fail("the backward was not launched");

  Writer result(arguments[2]);
  result.write(&params.partials, sizeof(params.partials));
  for (const Array* array : {&output, &logsumexp, &grad_value, &grad_query}) result.write(array->data, array->size);
  for (const Array& array : sums) result.write(array.data, array.size);
  const std::string& launches = cuda_emulation::device().launches;
  result.write(launches.data(), static_cast<int64_t>(launches.size()));
  return 0;
}
