#include "choice.h"

#include <ATen/Context.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <sstream>

namespace overlock_mm {
namespace {

/// A point in the current stream. (ATen's event needs headers that small toolkits do not have.)
class Event {
 public:
  Event() {
    C10_CUDA_CHECK(cudaEventCreate(&event_));
    C10_CUDA_CHECK(cudaEventRecord(event_, c10::cuda::getCurrentCUDAStream()));
  }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() { C10_CUDA_IGNORE_ERROR(cudaEventDestroy(event_)); }

  /// Waits for this one.
  float milliseconds_since(const Event& before) const {
    float milliseconds = 0;
    C10_CUDA_CHECK(cudaEventSynchronize(event_));
    C10_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, before.event_, event_));
    return milliseconds;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

/// Milliseconds of a call on the current stream.
float time_of(const std::function<void()>& call) {
  const Event begin;
  call();
  const Event end;
  return end.milliseconds_since(begin);
}

bool may_measure() {
  return !at::globalContext().deterministicAlgorithms() &&
         c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None;
}

Choices& all_choices() {
  static Choices choices;
  return choices;
}

}  // namespace

std::string kind_of_call(const std::string& name, const Tensor& map) {
  const int64_t positions = map.size(0) * map.size(2) * map.size(3);
  int64_t rounded = 1;
  while (rounded < positions) rounded *= 2;
  std::ostringstream out;
  out << name << ", " << map.size(1) << " channels, up to " << rounded << " positions, "
      << c10::toString(map.scalar_type())
      << (memory_format_of(map) == at::MemoryFormat::ChannelsLast ? ", channels_last" : ", contiguous") << ", GPU "
      << int(map.device().index());
  return out.str();
}

std::string kind_of_call(const std::string& name, const Tensor& map, int64_t kernel_size, int64_t dilation) {
  std::ostringstream out;
  out << name << ' ' << kernel_size << 'x' << kernel_size;
  if (dilation > 1) out << " dilation " << dilation;
  return kind_of_call(out.str(), map);
}

Implementation choose(const std::string& kind, const std::function<void()>& ours,
                      const std::function<void()>& pytorch) {
  return all_choices().choose(kind, may_measure, [&](Implementation implementation) {
    return time_of(implementation == Implementation::ours ? ours : pytorch);
  });
}

TORCH_LIBRARY_FRAGMENT(overlock_mm, m) {
  // 'measured', 'ours' or 'pytorch': which implementations run on GPUs.
  m.def("_set_cuda_kernels(str which) -> ()", [](const std::string& which) { all_choices().force(which); });
  // What was chosen so far: kind, implementation, milliseconds of ours and PyTorch's, separated by tabs; a line each.
  m.def("_cuda_choices() -> str", []() { return all_choices().describe(); });
}

}  // namespace overlock_mm
