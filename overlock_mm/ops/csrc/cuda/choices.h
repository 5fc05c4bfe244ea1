// The book of choices between implementations. It knows neither torch nor CUDA.
#pragma once

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace overlock_mm {

enum class Implementation { ours, pytorch };

class Choices {
 public:
  /// Times of each are taken this often, after a call that is not counted. The shortest counts.
  static constexpr int kRounds = 3;

  /// Which implementation runs a call of this kind. `may_measure()` says whether it may be measured now, if it is not
  /// known: else PyTorch's runs. `time_of(implementation)` runs one and returns milliseconds.
  template <typename MayMeasure, typename TimeOf>
  Implementation choose(const std::string& kind, const MayMeasure& may_measure, const TimeOf& time_of) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (forced_) return *forced_;
    const auto known = measured_.find(kind);
    if (known != measured_.end()) return known->second.faster();
    if (!may_measure()) return Implementation::pytorch;
    Times times;
    for (int round = 0; round <= kRounds; ++round) {
      const float ours = time_of(Implementation::ours), pytorch = time_of(Implementation::pytorch);
      if (round == 0) continue;  // it may have loaded kernels, and chosen algorithms
      times.ours = std::min(times.ours, ours);
      times.pytorch = std::min(times.pytorch, pytorch);
    }
    measured_[kind] = times;
    return times.faster();
  }

  /// From now on, for all calls: "ours", "pytorch", or "measured" as at first.
  void force(const std::string& which) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (which == "measured") {
      forced_.reset();
    } else if (which == "ours") {
      forced_ = Implementation::ours;
    } else if (which == "pytorch") {
      forced_ = Implementation::pytorch;
    } else {
      throw std::invalid_argument(which);
    }
  }

  /// A line for each kind, of four parts between tabs: kind, implementation, milliseconds of ours and PyTorch's.
  std::string describe() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::ostringstream out;
    for (const auto& [kind, times] : measured_) {
      out << kind << '\t' << (times.faster() == Implementation::ours ? "ours" : "pytorch") << '\t' << times.ours << '\t'
          << times.pytorch << '\n';
    }
    return out.str();
  }

 private:
  struct Times {
    float ours = std::numeric_limits<float>::infinity(), pytorch = std::numeric_limits<float>::infinity();
    Implementation faster() const { return ours <= pytorch ? Implementation::ours : Implementation::pytorch; }
  };

  mutable std::mutex mutex_;
  std::optional<Implementation> forced_;
  std::map<std::string, Times> measured_;
};

}  // namespace overlock_mm
