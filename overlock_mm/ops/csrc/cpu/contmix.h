// The CPU kernels of ContMix, compiled once for every instruction set. They take maps of any strides.
#pragma once

#include "../contmix.h"

namespace overlock_mm::cpu {

/// Memory that the phases of one call share. The caller owns it; only the kernels know its layout.
template <typename T>
struct ContMixWorkspace {
  T* keys;        ///< keys and biases, laid out for the vectors
  T* grad_value;  ///< backward: of every strip, for the lines that the windows of its positions hold
};

template <typename T>
struct ContMixKernels {
  const char* instruction_set;

  /// Elements of the parts of a workspace.
  void (*workspace_sizes)(const ContMixParams&, bool backward, int64_t* keys, int64_t* grad_value);

  /// B * G items.
  void (*pack_keys)(const ContMixParams&, const ContMixWorkspace<T>&, bool backward, int64_t begin, int64_t end);
  /// B * G * strips items: a strip of the map each.
  void (*forward)(const ContMixParams&, const ContMixWorkspace<T>&, int64_t strips, int64_t begin, int64_t end);
  /// B * G * partials items: a strip each.
  void (*backward)(const ContMixParams&, const ContMixWorkspace<T>&, int64_t begin, int64_t end);
  /// B * 2 * G * H items: a line of grad_value each, from the strips that hold it.
  void (*gather_grad_value)(const ContMixParams&, const ContMixWorkspace<T>&, int64_t begin, int64_t end);
};

/// How many strips of the map the forward works on apart: enough for all threads, and few enough positions in each that
/// their values, which are packed strip by strip, stay in a core's cache. No result depends on it.
inline int64_t forward_strips(const ContMixParams& params, int64_t threads) {
  const int64_t groups = params.batch * params.groups;
  const int64_t for_threads = groups == 0 ? 1 : (2 * threads + groups - 1) / groups;
  const int64_t for_cache = (params.height * params.width + 8191) / 8192;
  const int64_t wanted = for_threads > for_cache ? for_threads : for_cache;
  const int64_t most = (params.height + 3) / 4;
  return wanted < most ? wanted : most;
}

/// How many strips of the map the backward works on apart. It depends on the shape alone, so that every number of
/// threads sums in the same order.
inline int64_t backward_partials(const ContMixParams& params) {
  const int64_t groups = params.batch * params.groups;
  const int64_t wanted = groups == 0 ? 1 : (32 + groups - 1) / groups;
  const int64_t most = (params.height + 7) / 8;
  return wanted < most ? wanted : most;
}

}  // namespace overlock_mm::cpu
