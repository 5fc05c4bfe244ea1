// Which kernel of contmix_kernels.cuh runs with how many threads and how much shared memory.
#include <algorithm>
#include <type_traits>

#include "contmix_kernels.cuh"
#include "contmix_launch.h"
#include "launch.cuh"

namespace overlock_mm {
namespace {

using namespace contmix_kernels;

// Blocks of backward_query that keep the largest devices busy for a few rounds. More would only write more partial
// sums.
constexpr int64_t kQueryBlocks = 768;

// The general variant's channels in a block, and query channels at a time.
constexpr int kGeneralChannels = 8;
constexpr int kGeneralQueries = 16;

int64_t horizontal_tiles(const ContMixParams& params) { return ceil_div(params.width, kTileWidth); }

/// Blocks of a forward or backward_value: one for each tile, chunk of channels, group, image and branch.
int64_t tile_blocks(const ContMixParams& params, int64_t tile_height, int64_t chunk) {
  return horizontal_tiles(params) * ceil_div(params.height, tile_height) * ceil_div(params.channels, chunk) *
         params.groups * params.batch * 2;
}

/// Positions along an axis that a tile's windows cover, at most.
int64_t window_extent(int64_t size, int64_t tile, int64_t kernel_size) {
  return std::min(size, tile + kernel_size - 1);
}

/// Positions along an axis that read a tile, at most.
int64_t reader_extent(int64_t size, int64_t tile, int64_t kernel_size) {
  int64_t extent = 0;
  for (int64_t first = 0; first < size; first += tile) {
    const int64_t last = std::min(first + tile, size) - 1;
    extent = std::max(extent, last_reader(last, size, kernel_size) + 1 - first_reader(first, kernel_size));
  }
  return extent;
}

template <typename T, int kChannels, int kQuery>
int64_t forward_bytes(const ContMixParams& params, int64_t tile_height) {
  int64_t numbers = 0;
  for (const int64_t k : params.kernel_size) {
    const int64_t positions = window_extent(params.height, tile_height, k) * window_extent(params.width, kTileWidth, k);
    numbers = std::max(numbers, StagedLayout(static_cast<int>(k), kQuery).maps + positions * pitch(kChannels));
  }
  return numbers * static_cast<int64_t>(sizeof(typename Accumulator<T>::type));
}

template <typename T, int kChannels, int kQuery>
int64_t backward_value_bytes(const ContMixParams& params) {
  constexpr int64_t kNumbers = pitch(kQuery) + pitch(kChannels) + 1;  // query, grad_output, log-sum-exp
  int64_t numbers = 0;
  for (const int64_t k : params.kernel_size) {
    const int64_t positions = kBandRows * reader_extent(params.width, kTileWidth, k);
    numbers = std::max(numbers, StagedLayout(static_cast<int>(k), kQuery).maps + positions * kNumbers);
  }
  return numbers * static_cast<int64_t>(sizeof(typename Accumulator<T>::type));
}

template <typename T, int kChannels, int kQuery, bool kStaged>
int64_t backward_query_bytes(const ContMixParams& params) {
  const int64_t k = std::max(params.kernel_size[0], params.kernel_size[1]);
  int64_t numbers = QueryLayout(static_cast<int>(k), kQuery, kStaged).value;
  if (kStaged) {
    numbers +=
        window_extent(params.height, kQueryTile, k) * window_extent(params.width, kTileWidth, k) * pitch(kChannels);
  }
  return numbers * static_cast<int64_t>(sizeof(typename Accumulator<T>::type));
}

bool wants_query_kernel(const ContMixParams& params) {
  return params.grad_query.data || params.grad_keys || params.grad_bias || params.grad_rpb[0] || params.grad_rpb[1];
}

/// Calls body(channels, query) with the numbers of channels, two integral constants, of the smallest staged variant
/// that holds a group: body returns whether it could launch it. Double has none: its vectors are two of a float's.
template <typename T, typename Body>
bool try_staged(const ContMixParams& params, const Body& body) {
  if constexpr (!std::is_same_v<T, double>) {
    using Eight = std::integral_constant<int, 8>;
    using Sixteen = std::integral_constant<int, 16>;
    // No tile of a larger kernel fits in shared memory, and its size might not fit in an int.
    if (std::max(params.kernel_size[0], params.kernel_size[1]) > 255) return false;
    const int64_t size = std::max(params.channels, params.query_channels);
    if (size <= 8) return body(Eight{}, Eight{});
    if (size <= 16) return body(Sixteen{}, Sixteen{});
  }
  return false;
}

/// Threads of a block that has two positions for each. A low map would leave half of a high tile empty.
constexpr int kThreads[] = {kMaxThreads, kMaxThreads / 2};
constexpr int64_t two_row_tile(int threads) { return threads / kTileWidth * 2; }

template <typename T>
cudaError_t forward(const ContMixParams& params, cudaStream_t stream) {
  int64_t limit = 0;
  cudaError_t error = shared_memory_limit(&limit);
  if (error != cudaSuccess) return error;
  const bool staged = try_staged<T>(params, [&](auto channels, auto query) {
    constexpr int kChannels = decltype(channels)::value, kQuery = decltype(query)::value;
    for (const int threads : kThreads) {
      const int64_t tile_height = two_row_tile(threads),
                    bytes = forward_bytes<T, kChannels, kQuery>(params, tile_height);
      if (bytes > limit || (threads == kMaxThreads && params.height <= tile_height / 2)) continue;
      error = launch(contmix_forward_kernel<T, kChannels, kQuery, 2>, tile_blocks(params, tile_height, kChannels),
                     threads, bytes, params, stream);
      return true;
    }
    return false;
  });
  if (staged) return error;
  const int64_t blocks = tile_blocks(params, kMaxThreads / kTileWidth, kGeneralChannels);
  return launch(contmix_forward_kernel<T, kGeneralChannels, 0, 1>, blocks, kMaxThreads, 0, params, stream);
}

template <typename T>
cudaError_t backward_value(const ContMixParams& params, int64_t limit, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  const bool staged = try_staged<T>(params, [&](auto channels, auto query) {
    constexpr int kChannels = decltype(channels)::value, kQuery = decltype(query)::value;
    const int64_t bytes = backward_value_bytes<T, kChannels, kQuery>(params);
    if (bytes > limit) return false;
    const int threads = kThreads[params.height <= two_row_tile(kThreads[1])];
    error = launch(contmix_backward_value_kernel<T, kChannels, kQuery, 2>,
                   tile_blocks(params, two_row_tile(threads), kChannels), threads, bytes, params, stream);
    return true;
  });
  if (staged) return error;
  const int64_t blocks = tile_blocks(params, kMaxThreads / kTileWidth, kGeneralChannels);
  return launch(contmix_backward_value_kernel<T, kGeneralChannels, 0, 1>, blocks, kMaxThreads, 0, params, stream);
}

template <typename T>
cudaError_t backward_query(const ContMixParams& params, int64_t limit, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  const int64_t blocks = params.partials * params.groups * params.batch;
  const bool staged = try_staged<T>(params, [&](auto channels, auto query) {
    constexpr int kChannels = decltype(channels)::value, kQuery = decltype(query)::value;
    const int64_t bytes = backward_query_bytes<T, kChannels, kQuery, true>(params);
    if (bytes > limit) return false;
    error =
        launch(contmix_backward_query_kernel<T, kChannels, kQuery, true>, blocks, kMaxThreads, bytes, params, stream);
    return true;
  });
  if (staged) return error;
  const int64_t bytes = backward_query_bytes<T, 0, kGeneralQueries, false>(params);
  return launch(contmix_backward_query_kernel<T, 0, kGeneralQueries, false>, blocks, kMaxThreads, bytes, params,
                stream);
}

template <typename T>
cudaError_t backward(const ContMixParams& params, cudaStream_t stream) {
  int64_t limit = 0;
  cudaError_t error = shared_memory_limit(&limit);
  if (error == cudaSuccess && wants_query_kernel(params)) error = backward_query<T>(params, limit, stream);
  if (error == cudaSuccess && params.grad_value.data) error = backward_value<T>(params, limit, stream);
  return error;
}

bool is_empty(const ContMixParams& params) { return params.batch == 0; }

}  // namespace

int64_t contmix_backward_partials(const ContMixParams& params) {
  if (is_empty(params)) return 1;
  const int64_t tiles = horizontal_tiles(params) * ceil_div(params.height, kQueryTile);
  const int64_t wanted = std::max<int64_t>(kQueryBlocks / (params.batch * params.groups), 1);
  // As few tiles to a block as that allows, and the same for every block but the last ones.
  return ceil_div(tiles, ceil_div(tiles, wanted));
}

cudaError_t launch_contmix_forward(const ContMixParams& params, Dtype dtype, cudaStream_t stream) {
  if (is_empty(params)) return cudaSuccess;
  return for_dtype(dtype, [&](auto* type) { return forward<std::remove_pointer_t<decltype(type)>>(params, stream); });
}

cudaError_t launch_contmix_backward(const ContMixParams& params, Dtype dtype, cudaStream_t stream) {
  if (is_empty(params)) return cudaSuccess;
  return for_dtype(dtype, [&](auto* type) { return backward<std::remove_pointer_t<decltype(type)>>(params, stream); });
}

}  // namespace overlock_mm
