// The CUDA kernels of ContMix. docs/contmix.md has the mathematics, contmix.h the shapes, contmix_launch.cu the rest.
//
// All three are attention over synthesised keys, z_l = M_l·q + bias_l + rpb[offset of slot l] and P = softmax(z), in
// which the slots of a position are a window of the map. They keep z and P in registers and recompute them in the
// backward:
//
//   forward         a thread per position     O = Σ_l P_l V_l, online softmax, log-sum-exp
//   backward_query  a thread per position     dZ = P ∘ (dP - D), dq = Mᵀ dZ, and over positions dM, d(bias), d(rpb)
//   backward_value  a thread per map element  dV_m = Σ_{p: m in window(p)} P_{p,l(p,m)} dO_p
//
// Shared memory bounds them: it serves 128 bytes a cycle, and the cores need 3 operands for each of 128 multiply-adds.
// So a thread holds in registers what fits there, keys are read as broadcasts, and in forward and backward_value a
// thread has two positions, one above the other, for every vector that it reads.
//
// "Staged" variants bring a tile and its halo to shared memory and hold a whole group in registers: up to kChannels
// channels and kQuery query channels, padded by zeros. The general variant (kQuery = 0) reads global memory through the
// caches and takes what the others do not: any number of channels, double, a kernel whose tile would not fit. The two
// share all but the innermost loops.
#pragma once

#include <cfloat>
#include <type_traits>

#include "../contmix.h"
#include "numbers.cuh"

namespace overlock_mm {
namespace contmix_kernels {

/// A plain load. With one that says that memory is only read, threads of sm_75 keep more registers in memory.
template <typename T>
__device__ __forceinline__ auto load(const T* at) {
  return widen(*at);
}

constexpr int kMaxThreads = 128;

/// A warp is two lines of 16 positions: nearer to a square than 32 in line, so that less of what is read is halo
/// (20 x 28 for an 8 x 16 tile and a 13 x 13 kernel, where 4 x 32 needs 16 x 44), and still 16 neighbours in a line,
/// which read whole sectors of global memory and, a quarter warp at a time, neighbouring vectors of shared memory.
constexpr int kTileWidth = 16;

constexpr int kSlotChunk = 8;      ///< Logits a thread of the forward holds between two looks at the maximum.
constexpr int kBandRows = 4;       ///< Rows of readers that backward_value has in shared memory at a time.
constexpr int kQueryTile = 8;      ///< backward_query: rows of a tile, so that it is one of 128 threads.
constexpr int kProductSlots = 16;  ///< backward_query: slots whose dZ go through shared memory at a time.

/// Rows of shared memory are padded by a vector: neighbours then start 4 banks apart, modulo the multiples of 8 that a
/// number of channels is, and 8 threads that read a vector each touch all 32 banks once.
OVERLOCK_MM_HOST_DEVICE constexpr int pitch(int channels) { return channels + 4; }

/// Positions in a row of dZ: 4 rows of 2 vectors, which a warp of the product for dM reads at once, touch 32 banks.
constexpr int kProductPitch = kMaxThreads + 8;

OVERLOCK_MM_HOST_DEVICE constexpr int round_up(int n) { return (n + 3) / 4 * 4; }

// ---------------------------------------------------------------------------------------------------------------------
// Numbers

__device__ __forceinline__ float power_of_2(float x) { return exp2f(x); }
__device__ __forceinline__ double power_of_2(double x) { return exp2(x); }
__device__ __forceinline__ float logarithm_2(float x) { return log2f(x); }
__device__ __forceinline__ double logarithm_2(double x) { return log2(x); }
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

/// Logits are scaled by it, and so exp(z - max) is one exp2.
constexpr double kLog2E = 1.4426950408889634;

/// A bias of logits, scaled. A finite one stays finite: the lowest float, which users mask with, is no -inf.
template <typename A>
__device__ __forceinline__ A in_base_2(A bias) {
  constexpr A kLargest = std::is_same<A, double>::value ? A(DBL_MAX) : A(FLT_MAX);
  const A scaled = bias * A(kLog2E);
  // x - x is 0, or NaN where x is not finite.
  if (scaled - scaled == A(0) || bias - bias != A(0)) return scaled;
  return bias > A(0) ? kLargest : -kLargest;
}

template <typename A>
__device__ __forceinline__ A minus_infinity() {
  return -static_cast<A>(INFINITY);
}

/// a·b of kSize numbers, b in shared memory. Two sums: one would wait for itself.
template <int kSize, typename A>
__device__ __forceinline__ A dot(const A (&a)[kSize], const A* b) {
  A even = 0, odd = 0;
#pragma unroll
  for (int c = 0; c < kSize; c += 4) {
    const Vector<A> vector = vector_at(b + c);
    even += a[c] * vector.at[0];
    odd += a[c + 1] * vector.at[1];
    even += a[c + 2] * vector.at[2];
    odd += a[c + 3] * vector.at[3];
  }
  return even + odd;
}

// ---------------------------------------------------------------------------------------------------------------------
// Maps and shared memory

/// The channels of one group of one image: (channels, H, W).
template <typename T>
struct Group {
  T* data;
  int64_t channel_stride, row_stride, column_stride;

  __device__ Group(const Map& map, int64_t image, int64_t first_channel)
      : data(static_cast<T*>(map.data) + image * map.batch_stride + first_channel * map.channel_stride),
        channel_stride(map.channel_stride),
        row_stride(map.row_stride),
        column_stride(map.column_stride) {}

  __device__ __forceinline__ T* at(int channel, int row, int column) const {
    return data + channel * channel_stride + row * row_stride + column * column_stride;
  }
};

/// Calls body(c, pointer) for kChannels channels from `at`. The pointer moves on, as kChannels products of a stride
/// would be kept in registers for the next time.
template <int kChannels, typename T, typename Body>
__device__ __forceinline__ void for_channels(T* at, int64_t stride, const Body& body) {
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    body(c, at);
    at += stride;
  }
}

/// Brings a rectangle of a group to shared memory: (rows, columns, pitch(kChannels)), times `scale`.
/// Neighbouring threads read neighbouring numbers of global memory: columns, or channels of a channels_last map.
template <int kChannels, typename A, typename T>
__device__ void stage_map(A* shared, const Group<T>& map, int channels, int first_row, int rows, int first_column,
                          int columns, A scale) {
  constexpr int kVectors = kChannels / 4;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const auto stage = [&](int row, int column, int first_channel) {
    Vector<A> vector;
    const T* from = map.at(first_channel, first_row + row, first_column + column);
    for_channels<4>(from, map.channel_stride,
                    [&](int c, const T* at) { vector.at[c] = first_channel + c < channels ? load(at) * scale : A(0); });
    A* to = shared + (row * columns + column) * pitch(kChannels) + first_channel;
    *reinterpret_cast<Vector<A>*>(to) = vector;
  };
  if (map.channel_stride == 1 && map.column_stride != 1) {
    for (int row = warp; row < rows; row += warps) {
      for (int i = lane; i < columns * kVectors; i += kWarp) stage(row, i / kVectors, i % kVectors * 4);
    }
  } else {
    for (int line = warp; line < rows * kVectors; line += warps) {
      for (int column = lane; column < columns; column += kWarp) stage(line / kVectors, column, line % kVectors * 4);
    }
  }
}

/// Brings keys, (slots, query_channels), to shared memory as (slots, kQuery).
template <int kQuery, typename A>
__device__ void stage_keys(A* shared, const A* keys, int slots, int query_channels) {
  for (int i = threadIdx.x; i < slots * kQuery; i += blockDim.x) {
    const int slot = i / kQuery, channel = i % kQuery;
    shared[i] = channel < query_channels ? keys[static_cast<int64_t>(slot) * query_channels + channel] : A(0);
  }
}

/// Brings biases to shared memory, scaled: zeros where there are none.
template <typename A>
__device__ void stage_biases(A* shared, const A* biases, int size) {
  for (int i = threadIdx.x; i < size; i += blockDim.x) shared[i] = biases ? in_base_2(biases[i]) : A(0);
}

/// One branch of one group of one image.
template <typename T>
struct Branch {
  using A = typename Accumulator<T>::type;

  int height, width;  ///< of the map
  int kernel_size;
  int channels, query_channels;
  int64_t first_channel;  ///< in the value and output maps
  int64_t first_slot;     ///< of all L
  int64_t group_slots;    ///< index of this branch's first slot in a (B, G, L) array
  const A* keys;          ///< (k * k, query_channels)
  const A* bias;          ///< (k * k), or null
  const A* rpb;           ///< (2k - 1, 2k - 1), or null
  A* logsumexp;           ///< (H, W)

  __device__ Branch(const ContMixParams& params, int branch, int64_t image, int64_t group)
      : height(static_cast<int>(params.height)),
        width(static_cast<int>(params.width)),
        kernel_size(static_cast<int>(params.kernel_size[branch])),
        channels(static_cast<int>(params.channels)),
        query_channels(static_cast<int>(params.query_channels)),
        first_channel((branch * params.groups + group) * params.channels),
        first_slot(branch == 0 ? 0 : params.kernel_size[0] * params.kernel_size[0]),
        group_slots((image * params.groups + group) * params.slots() + first_slot),
        keys(static_cast<const A*>(params.keys) + group_slots * params.query_channels),
        bias(params.bias ? static_cast<const A*>(params.bias) + first_slot : nullptr),
        rpb(params.rpb[branch] ? static_cast<const A*>(params.rpb[branch]) + group * entries() * entries() : nullptr),
        logsumexp(static_cast<A*>(params.logsumexp) +
                  ((image * 2 + branch) * params.groups + group) * params.height * params.width) {}

  /// Of an axis of rpb.
  __device__ __forceinline__ int entries() const { return 2 * kernel_size - 1; }
  __device__ __forceinline__ int slots() const { return kernel_size * kernel_size; }
  __device__ __forceinline__ A& logsumexp_at(int row, int column) const {
    return logsumexp[static_cast<int64_t>(row) * width + column];
  }
};

/// The work of a thread block of forward and backward_value: a tile of a branch, and channels from `channel` on.
struct Tile {
  int branch, channel, row, column;
  int64_t image, group;

  /// The large kernel's tiles, which take longest, have the lowest numbers and so start first.
  __device__ Tile(const ContMixParams& params, int tile_height, int chunk) {
    unsigned index = blockIdx.x;
    const auto next = [&index](int64_t size) {
      const unsigned part = index % static_cast<unsigned>(size);
      index /= static_cast<unsigned>(size);
      return static_cast<int>(part);
    };
    column = next(ceil_div(params.width, kTileWidth)) * kTileWidth;
    row = next(ceil_div(params.height, tile_height)) * tile_height;
    channel = next(ceil_div(params.channels, chunk)) * chunk;
    group = next(params.groups);
    image = next(params.batch);
    branch = 1 - static_cast<int>(index);
  }
};

/// Shared memory of a staged forward or backward_value: keys, bias, rpb, then maps. In numbers, not bytes.
struct StagedLayout {
  int bias, rpb, maps;

  OVERLOCK_MM_HOST_DEVICE StagedLayout(int kernel_size, int query)
      : bias(kernel_size * kernel_size * query),
        rpb(bias + round_up(kernel_size * kernel_size)),
        maps(rpb + round_up((2 * kernel_size - 1) * (2 * kernel_size - 1))) {}
};

/// Shared memory of backward_query. In numbers, not bytes.
struct QueryLayout {
  int query, products, row_sums, keys, bias, rpb, value;

  /// `largest` is the larger kernel size, so that both branches have one layout.
  OVERLOCK_MM_HOST_DEVICE QueryLayout(int largest, int query_chunk, bool staged)
      : query(kProductSlots * kProductPitch),
        products(query + kMaxThreads * pitch(query_chunk)),
        row_sums(products + kMaxThreads / kWarp * kProductSlots * query_chunk),
        keys(row_sums + round_up(kQueryTile * (2 * largest - 1))),
        bias(keys + (staged ? kProductSlots * query_chunk : 0)),
        rpb(bias + (staged ? kProductSlots : 0)),
        value(rpb + (staged ? round_up((2 * largest - 1) * (2 * largest - 1)) : 0)) {}
};

/// Calls body(first, last), two integral constants, with the part of kRows positions that `holds` a row of slots: a
/// part that is known when compiling keeps the positions in registers and the body free of branches.
template <int kRows, typename Holds, typename Body>
__device__ __forceinline__ void for_rows(const Holds& holds, const Body& body) {
  using Zero = std::integral_constant<int, 0>;
  using One = std::integral_constant<int, 1>;
  if constexpr (kRows == 1) {
    if (holds(0)) body(Zero{}, One{});
  } else {
    static_assert(kRows == 2, "a thread has one position or two");
    using Two = std::integral_constant<int, 2>;
    const bool first = holds(0), second = holds(1);
    if (first && second) {
      body(Zero{}, Two{});
    } else if (first) {
      body(Zero{}, One{});
    } else if (second) {
      body(One{}, Two{});
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

/// Rows and columns of the map, from `top` and `left` on.
struct Rectangle {
  int top, left, rows, columns;
};

/// kRows positions of a thread, one above the other. Those beyond the map stand for positions of its last row or
/// column, and nothing is written for them.
template <int kRows>
struct Positions {
  int column, x;
  int row[kRows], y[kRows];

  __device__ __forceinline__ Positions(const Tile& tile, int height, int width)
      : column(tile.column + static_cast<int>(threadIdx.x) % kTileWidth), x(min(column, width - 1)) {
#pragma unroll
    for (int t = 0; t < kRows; ++t) {
      row[t] = tile.row + static_cast<int>(threadIdx.x) / kTileWidth * kRows + t;
      y[t] = min(row[t], height - 1);
    }
  }
};

__device__ __forceinline__ int tile_height(int rows_of_thread) {
  return static_cast<int>(blockDim.x) / kTileWidth * rows_of_thread;
}

/// A thread of the forward. It walks down the lines of the map that its positions' windows cover: a line's slots give
/// each position up to kSlotChunk logits, with which it updates the running maximum and sum, and every value that it
/// reads serves all positions whose window holds it.
template <typename T, int kChannels, int kQuery, int kRows>
class ForwardThread {
 public:
  using A = typename Accumulator<T>::type;

  __device__ __forceinline__ ForwardThread(const ContMixParams& params, A* shared)
      : params_(params),
        shared_(shared),
        tile_(params, tile_height(kRows), kChannels),
        branch_(params, tile_.branch, tile_.image, tile_.group),
        k_(branch_.kernel_size),
        chunk_(static_cast<int>(ceil_div(k_, ceil_div(k_, kSlotChunk)))),
        channels_(min(branch_.channels - tile_.channel, kChannels)),
        layout_(k_, kQuery),
        value_(params.value, tile_.image, branch_.first_channel + tile_.channel),
        query_(params.query, tile_.image, tile_.group * params.query_channels),
        at_(tile_, branch_.height, branch_.width),
        left_(window_start(at_.x, branch_.width, k_)),
        windows_(windows_of_tile()) {
#pragma unroll
    for (int t = 0; t < kRows; ++t) {
      top_[t] = window_start(at_.y[t], branch_.height, k_);
      maximum_[t] = minus_infinity<A>();
      sum_[t] = 0;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) out_[t][c] = 0;
    }
  }

  /// Bring the data of the tile to shared memory, and the queries to registers. All threads must call.
  __device__ __forceinline__ void stage() {
    if constexpr (kStaged) {
      stage_keys<kQuery>(shared_, branch_.keys, branch_.slots(), branch_.query_channels);
      stage_biases(shared_ + layout_.bias, branch_.bias, branch_.slots());
      stage_biases(shared_ + layout_.rpb, branch_.rpb, branch_.entries() * branch_.entries());
      stage_map<kChannels>(shared_ + layout_.maps, value_, channels_, windows_.top, windows_.rows, windows_.left,
                           windows_.columns, A(1));
#pragma unroll
      for (int t = 0; t < kRows; ++t) {
        for_channels<kQuery>(query_.at(0, at_.y[t], at_.x), query_.channel_stride, [&](int d, const T* at) {
          q_[t][d] = d < branch_.query_channels ? load(at) * A(kLog2E) : A(0);
        });
      }
      __syncthreads();
    }
  }

  __device__ __forceinline__ bool is_beyond_map() const { return at_.row[0] >= branch_.height; }

  __device__ __forceinline__ void run() {
    for (int line = top_[0]; line < top_[kRows - 1] + k_; ++line) {
      const auto holds = [&](int t) { return line >= top_[t] && line < top_[t] + k_; };
      for_rows<kRows>(holds, [&](auto first, auto last) {
        this->template take_line<decltype(first)::value, decltype(last)::value>(line);
      });
    }
  }

  __device__ __forceinline__ void write() const {
    const Group<T> output(params_.output, tile_.image, branch_.first_channel + tile_.channel);
#pragma unroll
    for (int t = 0; t < kRows; ++t) {
      if (at_.row[t] >= branch_.height || at_.column >= branch_.width) continue;
      // A position whose slots are all masked has sum 0 and, as in eager PyTorch, gives NaN.
      const A scale = A(1) / sum_[t];
      for_channels<kChannels>(output.at(0, at_.row[t], at_.column), output.channel_stride, [&](int c, T* at) {
        if (c < channels_) store(at, out_[t][c] * scale);
      });
      if (tile_.channel == 0) branch_.logsumexp_at(at_.row[t], at_.column) = maximum_[t] + logarithm_2(sum_[t]);
    }
  }

 private:
  static constexpr bool kStaged = kQuery > 0;

  __device__ __forceinline__ Rectangle windows_of_tile() const {
    const int height = branch_.height, width = branch_.width;
    const int last_row = min(tile_.row + tile_height(kRows), height) - 1;
    const int last_column = min(tile_.column + kTileWidth, width) - 1;
    const int top = window_start(tile_.row, height, k_), left = window_start(tile_.column, width, k_);
    return {top, left, window_start(last_row, height, k_) + k_ - top, window_start(last_column, width, k_) + k_ - left};
  }

  /// The slots of a line of the map, for positions kFirst to kLast.
  template <int kFirst, int kLast>
  __device__ __forceinline__ void take_line(int line) {
    for (int start = 0; start < k_; start += chunk_) {
      const int size = min(chunk_, k_ - start);
      A p[kRows][kSlotChunk];
#pragma unroll
      for (int t = kFirst; t < kLast; ++t) {
        const A largest = logits(t, line, start, size, p[t]);
        update_softmax(t, size, largest, p[t]);
      }
      add_values<kFirst, kLast>(line, start, size, p);
    }
  }

  /// Logits of position t, in base 2; the largest.
  __device__ __forceinline__ A logits(int t, int line, int start, int size, A (&z)[kSlotChunk]) const {
    const int slot = (line - top_[t]) * k_ + start;
    const int entry = (line - at_.y[t] + k_ - 1) * branch_.entries() + (left_ + start - at_.x + k_ - 1);
    if constexpr (!kStaged) {
#pragma unroll
      for (int u = 0; u < kSlotChunk; ++u) z[u] = 0;
      const A* keys = branch_.keys + static_cast<int64_t>(slot) * branch_.query_channels;
      for (int d = 0; d < branch_.query_channels; ++d) {
        const A q_d = load(query_.at(d, at_.y[t], at_.x));
#pragma unroll
        for (int u = 0; u < kSlotChunk; ++u) {
          if (u < size) z[u] += q_d * keys[static_cast<int64_t>(u) * branch_.query_channels + d];
        }
      }
    }
    const A *const keys = shared_ + slot * kQuery, *const biases = shared_ + layout_.bias + slot,
                   *const offsets = shared_ + layout_.rpb + entry;
    A largest = minus_infinity<A>();
#pragma unroll
    for (int u = 0; u < kSlotChunk; ++u) {
      if (u < size) {
        if constexpr (kStaged) {
          z[u] = dot(q_[t], keys + u * kQuery) + biases[u] + offsets[u];
        } else {
          z[u] *= A(kLog2E);
          if (branch_.bias) z[u] += in_base_2(branch_.bias[slot + u]);
          if (branch_.rpb) z[u] += in_base_2(branch_.rpb[entry + u]);
        }
        largest = larger(largest, z[u]);
      }
    }
    return largest;
  }

  /// Logits of position t to exponentials, relative to the running maximum, in the running sum.
  __device__ __forceinline__ void update_softmax(int t, int size, A largest, A (&p)[kSlotChunk]) {
    if (largest > maximum_[t]) {
      // The first time the maximum is -inf, the factor 0, and everything it multiplies 0.
      const A factor = power_of_2(maximum_[t] - largest);
      maximum_[t] = largest;
      sum_[t] *= factor;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) out_[t][c] *= factor;
    }
    // As long as all slots are masked, any finite number in place of the maximum makes their weight 0.
    const A reference = maximum_[t] == minus_infinity<A>() ? A(0) : maximum_[t];
#pragma unroll
    for (int u = 0; u < kSlotChunk; ++u) {
      if (u < size) {
        p[u] = power_of_2(p[u] - reference);
        sum_[t] += p[u];
      }
    }
  }

  template <int kFirst, int kLast>
  __device__ __forceinline__ void add_values(int line, int start, int size, const A (&p)[kRows][kSlotChunk]) {
    const int position = (line - windows_.top) * windows_.columns + (left_ - windows_.left) + start;
    const A* const staged = shared_ + layout_.maps + position * pitch(kChannels);
#pragma unroll
    for (int u = 0; u < kSlotChunk; ++u) {
      if (u < size) {
        if constexpr (kStaged) {
#pragma unroll
          for (int c = 0; c < kChannels; c += 4) {
            const Vector<A> vector = vector_at(staged + u * pitch(kChannels) + c);
#pragma unroll
            for (int t = kFirst; t < kLast; ++t) {
#pragma unroll
              for (int i = 0; i < 4; ++i) out_[t][c + i] += p[t][u] * vector.at[i];
            }
          }
        } else {
          for_channels<kChannels>(value_.at(0, line, left_ + start + u), value_.channel_stride,
                                  [&](int c, const T* at) {
                                    if (c < channels_) {
                                      const A number = load(at);
#pragma unroll
                                      for (int t = kFirst; t < kLast; ++t) out_[t][c] += p[t][u] * number;
                                    }
                                  });
        }
      }
    }
  }

  const ContMixParams& params_;
  A* const shared_;
  const Tile tile_;
  const Branch<T> branch_;
  const int k_;
  const int chunk_;  ///< slots that are taken together: as few chunks to a line as hold them, and even, 13 = 7 + 6
  const int channels_;
  const StagedLayout layout_;
  const Group<const T> value_, query_;
  const Positions<kRows> at_;
  const int left_;           ///< of the windows
  const Rectangle windows_;  ///< of the tile
  int top_[kRows];           ///< of the windows
  A q_[kRows][kStaged ? kQuery : 1];
  A maximum_[kRows], sum_[kRows], out_[kRows][kChannels];
};

/// O = Σ_l softmax(z)_l V_l for a tile of (blockDim / 16 * kRows) x 16 positions and kChannels channels.
///
/// Grid: tiles x chunks of channels x G x B x 2 branches.
template <typename T, int kChannels, int kQuery, int kRows>
__global__ void __launch_bounds__(kMaxThreads, 3) contmix_forward_kernel(const ContMixParams params) {
  OVERLOCK_MM_SHARED(typename Accumulator<T>::type, shared);
  ForwardThread<T, kChannels, kQuery, kRows> thread(params, shared);
  thread.stage();
  if (thread.is_beyond_map()) return;  // No barrier follows.
  thread.run();
  thread.write();
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward: queries, keys, biases

/// dM_l += Σ_p dZ_lp q_p for kProductSlots slots, a product of (slots, positions) by (positions, kQuery) in shared
/// memory.
///
/// A thread has 4 slots and 4 channels, and one in kSplits of the positions; 8 vectors feed 64 multiply-adds. A warp's
/// sums go through registers, those of the warps through `products`, (warps, kProductSlots, kQuery). All threads must
/// call.
template <int kQuery, typename A>
__device__ void sum_products(const A* dz, const A* query, A* products, int slots) {
  constexpr int kVectors = kQuery / 4;                  // of channels
  constexpr int kTiles = kProductSlots / 4 * kVectors;  // in a product
  constexpr int kSplits = kMaxThreads / kTiles;         // of positions
  static_assert(kTiles <= kWarp && kWarp % kTiles == 0, "the tiles of a product are in one warp");
  const int channel = static_cast<int>(threadIdx.x) % kVectors * 4;
  const int slot = static_cast<int>(threadIdx.x) / kVectors % 4;  // and every 4th after it: other banks
  A sums[4][4] = {};
#pragma unroll 1
  for (int position = static_cast<int>(threadIdx.x) / kTiles * 4; position < kMaxThreads; position += kSplits * 4) {
    Vector<A> q[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) q[n] = vector_at(query + (position + n) * pitch(kQuery) + channel);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i * 4 < slots) {
        const Vector<A> vector = vector_at(dz + (slot + i * 4) * kProductPitch + position);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) sums[i][c] += vector.at[n] * q[n].at[c];
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Vector<A> vector;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int lanes = kTiles; lanes < kWarp; lanes *= 2) sums[i][c] += __shfl_xor_sync(0xffffffffu, sums[i][c], lanes);
      vector.at[c] = sums[i][c];
    }
    if (static_cast<int>(threadIdx.x) % kWarp < kTiles) {
      A* to = products + (static_cast<int>(threadIdx.x) / kWarp * kProductSlots + slot + i * 4) * kQuery + channel;
      *reinterpret_cast<Vector<A>*>(to) = vector;
    }
  }
}

/// Adds to a sum that only this block has.
template <typename A>
__device__ __forceinline__ void add(A* to, A number, bool first) {
  *to = first ? number : *to + number;
}

/// A tile of one branch, as a thread of backward_query sees it.
template <typename T, int kChannels, bool kStaged>
struct QueryTile {
  using A = typename Accumulator<T>::type;

  int index;
  Branch<T> branch;
  int k, entries;
  Group<const T> value, grad_output;
  int top, left;      ///< of the thread's window
  Rectangle windows;  ///< of the tile
  bool interior;      ///< No window is clamped: a slot has one entry of rpb for the whole tile.
  A grad_out[kStaged ? kChannels : 1], grad_dot_out = 0, logsumexp;

  __device__ __forceinline__ QueryTile(const ContMixParams& params, int index, int64_t image, int64_t group, int row,
                                       int column, int y, int x)
      : index(index),
        branch(params, index, image, group),
        k(branch.kernel_size),
        entries(branch.entries()),
        value(params.value, image, branch.first_channel),
        grad_output(params.grad_output, image, branch.first_channel),
        top(window_start(y, branch.height, k)),
        left(window_start(x, branch.width, k)) {
    const int last_row = min(row + kQueryTile, branch.height) - 1;
    const int last_column = min(column + kTileWidth, branch.width) - 1;
    const int bottom = window_start(last_row, branch.height, k), right = window_start(last_column, branch.width, k);
    windows.top = window_start(row, branch.height, k);
    windows.left = window_start(column, branch.width, k);
    windows.rows = bottom + k - windows.top;
    windows.columns = right + k - windows.left;
    interior = windows.top == row - k / 2 && windows.left == column - k / 2 && bottom == last_row - k / 2 &&
               right == last_column - k / 2;
    logsumexp = branch.logsumexp_at(y, x);
  }

  /// dO, if it is held in registers, and dO · O.
  __device__ __forceinline__ void load_gradients(const ContMixParams& params, int64_t image, int y, int x) {
    const Group<const T> output(params.output, image, branch.first_channel);
    if constexpr (kStaged) {
      for_channels<kChannels>(grad_output.at(0, y, x), grad_output.channel_stride,
                              [&](int c, const T* at) { grad_out[c] = c < branch.channels ? load(at) : A(0); });
      for_channels<kChannels>(output.at(0, y, x), output.channel_stride, [&](int c, const T* at) {
        if (c < branch.channels) grad_dot_out += grad_out[c] * load(at);
      });
    } else {
      for (int c = 0; c < branch.channels; ++c) {
        grad_dot_out += load(grad_output.at(c, y, x)) * load(output.at(c, y, x));
      }
    }
  }
};

/// Up to kProductSlots slots of a row of slots, which all threads work on at the same time.
struct Piece {
  int line, start, size;
  int first_slot;  ///< of the branch
};

/// A thread of backward_query, which has a position of each tile. All threads must call `run`.
template <typename T, int kChannels, int kQuery, bool kStaged>
class QueryThread {
 public:
  using A = typename Accumulator<T>::type;
  using BranchTile = QueryTile<T, kChannels, kStaged>;

  __device__ __forceinline__ QueryThread(const ContMixParams& params, A* shared)
      : params_(params),
        shared_(shared),
        layout_(static_cast<int>(max(params.kernel_size[0], params.kernel_size[1])), kQuery, kStaged),
        thread_(static_cast<int>(threadIdx.x)),
        partial_(blockIdx.x % params.partials),
        group_(blockIdx.x / params.partials % params.groups),
        image_(blockIdx.x / params.partials / params.groups),
        slice_((partial_ * params.batch + image_) * params.groups + group_),
        height_(static_cast<int>(params.height)),
        width_(static_cast<int>(params.width)),
        query_channels_(static_cast<int>(params.query_channels)),
        query_(params.query, image_, group_ * query_channels_) {}

  __device__ __forceinline__ void run() {
    clear_grad_rpb();
    const int horizontal_tiles = static_cast<int>(ceil_div(width_, kTileWidth));
    const int tiles = static_cast<int>(ceil_div(height_, kQueryTile)) * horizontal_tiles;
    for (int tile = static_cast<int>(partial_); tile < tiles; tile += static_cast<int>(params_.partials)) {
      go_to(tile == partial_, tile / horizontal_tiles * kQueryTile, tile % horizontal_tiles * kTileWidth);
      for (first_query_ = 0; first_query_ < query_channels_; first_query_ += kQuery) {
        load_queries();
        for (int index = 0; index < 2; ++index) differentiate(index);
        write_grad_query();
      }
    }
  }

 private:
  __device__ __forceinline__ void clear_grad_rpb() const {
    for (int index = 0; index < 2; ++index) {
      if (!params_.grad_rpb[index]) continue;
      const int64_t size = (2 * params_.kernel_size[index] - 1) * (2 * params_.kernel_size[index] - 1);
      A* const to = static_cast<A*>(params_.grad_rpb[index]) + slice_ * size;
      for (int64_t i = thread_; i < size; i += kMaxThreads) to[i] = 0;
    }
  }

  __device__ __forceinline__ void go_to(bool first_tile, int tile_row, int tile_column) {
    first_tile_ = first_tile;
    tile_row_ = tile_row;
    tile_column_ = tile_column;
    // Threads beyond the map work on its last row or column, and their dZ is 0.
    row_ = tile_row + thread_ / kTileWidth;
    column_ = tile_column + thread_ % kTileWidth;
    y_ = min(row_, height_ - 1);
    x_ = min(column_, width_ - 1);
  }

  __device__ __forceinline__ bool in_map() const { return row_ < height_ && column_ < width_; }

  /// Query channels that count, of kQuery from first_query_ on.
  __device__ __forceinline__ int queries() const { return min(query_channels_ - first_query_, kQuery); }

  __device__ __forceinline__ void load_queries() {
    A* const to = shared_ + layout_.query + thread_ * pitch(kQuery);
    const int queries = this->queries();
    for_channels<kQuery>(query_.at(first_query_, y_, x_), query_.channel_stride, [&](int d, const T* at) {
      const A number = d < queries ? load(at) : A(0);
      to[d] = number;
      q_[d] = number * A(kLog2E);
      grad_q_[d] = 0;
    });
  }

  /// One branch of the tile.
  __device__ __forceinline__ void differentiate(int index) {
    BranchTile tile(params_, index, image_, group_, tile_row_, tile_column_, y_, x_);
    // Values, queries and keys may be overwritten: the threads that read the last ones have since met in a barrier.
    if constexpr (kStaged) {
      stage_map<kChannels>(shared_ + layout_.value, tile.value, tile.branch.channels, tile.windows.top,
                           tile.windows.rows, tile.windows.left, tile.windows.columns, A(1));
      stage_biases(shared_ + layout_.rpb, tile.branch.rpb, tile.entries * tile.entries);
    }
    tile.load_gradients(params_, image_, y_, x_);

    // As few pieces to a row of slots as hold it, and these even.
    const int k = tile.k, chunk = static_cast<int>(ceil_div(k, ceil_div(k, kProductSlots)));
    for (int line = 0; line < k; ++line) {
      for (int start = 0; start < k; start += chunk) {
        differentiate_piece(tile, Piece{line, start, min(chunk, k - start), line * k + start});
      }
    }
  }

  __device__ __forceinline__ void differentiate_piece(const BranchTile& tile, const Piece& piece) {
    const A* keys = tile.branch.keys + static_cast<int64_t>(piece.first_slot) * query_channels_;
    if constexpr (kStaged) {
      stage_keys<kQuery>(shared_ + layout_.keys, keys, piece.size, query_channels_);
      stage_biases(shared_ + layout_.bias, tile.branch.bias ? tile.branch.bias + piece.first_slot : nullptr,
                   piece.size);
      __syncthreads();
    }
    differentiate_slots(tile, piece, keys);
    __syncthreads();

    A* grad_rpb = static_cast<A*>(params_.grad_rpb[tile.index]);
    if (grad_rpb) grad_rpb += slice_ * tile.entries * tile.entries;
    const bool sums_rpb = grad_rpb && first_query_ == 0;
    if (params_.grad_keys) sum_products<kQuery>(dz(), shared_ + layout_.query, shared_ + layout_.products, piece.size);
    if (first_query_ == 0 && (params_.grad_bias || (grad_rpb && tile.interior)))
      add_slot_sums(tile, piece, tile.interior ? grad_rpb : nullptr);
    if (sums_rpb && !tile.interior) sum_rows(tile, piece);
    __syncthreads();

    if (params_.grad_keys) add_to_grad_keys(tile, piece);
    if (sums_rpb && !tile.interior) add_row_sums(tile, piece, grad_rpb);
  }

  __device__ __forceinline__ A* dz() const { return shared_; }

  /// dZ of the piece to shared memory, and dq.
  __device__ __forceinline__ void differentiate_slots(const BranchTile& tile, const Piece& piece, const A* keys) {
    const int k = tile.k, queries = this->queries();
    const int first_entry =
        (tile.top + piece.line - y_ + k - 1) * tile.entries + (tile.left + piece.start - x_ + k - 1);
    const bool in_map = this->in_map();
#pragma unroll(kStaged ? 2 : 1)
    for (int u = 0; u < piece.size; ++u) {
      A z = 0, grad_p = 0;
      if constexpr (kStaged) {
        const int position = (tile.top + piece.line - tile.windows.top) * tile.windows.columns +
                             (tile.left - tile.windows.left) + piece.start + u;
        z = dot(q_, shared_ + layout_.keys + u * kQuery) + shared_[layout_.bias + u] +
            shared_[layout_.rpb + first_entry + u];
        grad_p = dot(tile.grad_out, shared_ + layout_.value + position * pitch(kChannels));
      } else {
        const A* key = keys + static_cast<int64_t>(u) * query_channels_;
        for (int d = 0; d < query_channels_; ++d) z += load(query_.at(d, y_, x_)) * key[d];
        z *= A(kLog2E);
        if (tile.branch.bias) z += in_base_2(tile.branch.bias[piece.first_slot + u]);
        if (tile.branch.rpb) z += in_base_2(tile.branch.rpb[first_entry + u]);
        const T* values = tile.value.at(0, tile.top + piece.line, tile.left + piece.start + u);
        const T* grads = tile.grad_output.at(0, y_, x_);
        for (int c = 0; c < tile.branch.channels; ++c) {
          grad_p += load(grads + c * tile.grad_output.channel_stride) * load(values + c * tile.value.channel_stride);
        }
      }
      const A grad_z = power_of_2(z - tile.logsumexp) * (grad_p - tile.grad_dot_out);
      if constexpr (kStaged) {
#pragma unroll
        for (int d = 0; d < kQuery; d += 4) {
          const Vector<A> vector = vector_at(shared_ + layout_.keys + u * kQuery + d);
#pragma unroll
          for (int i = 0; i < 4; ++i) grad_q_[d + i] += grad_z * vector.at[i];
        }
      } else {
        const A* key = keys + static_cast<int64_t>(u) * query_channels_ + first_query_;
#pragma unroll
        for (int d = 0; d < kQuery; ++d) {
          if (d < queries) grad_q_[d] += grad_z * key[d];
        }
      }
      // Last, as after a write to shared memory the compiler would read the key again.
      dz()[u * kProductPitch + thread_] = in_map ? grad_z : A(0);
    }
  }

  /// d(bias) is the sum over the tile, and so, where no window is clamped, is d(rpb): null where one is. 8 threads to a
  /// slot.
  __device__ __forceinline__ void add_slot_sums(const BranchTile& tile, const Piece& piece, A* grad_rpb) const {
    constexpr int kThreads = kMaxThreads / kProductSlots;
    const int slot = thread_ / kThreads;
    A sum = 0;
    if (slot < piece.size) {
#pragma unroll 1
      for (int position = thread_ % kThreads * 4; position < kMaxThreads; position += kThreads * 4) {
        const Vector<A> vector = vector_at(dz() + slot * kProductPitch + position);
        sum += (vector.at[0] + vector.at[1]) + (vector.at[2] + vector.at[3]);
      }
    }
#pragma unroll
    for (int lanes = 1; lanes < kThreads; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (slot < piece.size && thread_ % kThreads == 0) {
      if (params_.grad_bias) {
        A* grad_bias = static_cast<A*>(params_.grad_bias) + slice_ * params_.slots() + tile.branch.first_slot;
        add(grad_bias + piece.first_slot + slot, sum, first_tile_);
      }
      if (grad_rpb) {
        const int k = tile.k;
        const int entry = (piece.line - k / 2 + k - 1) * tile.entries + piece.start - k / 2 + k - 1 + slot;
        add(grad_rpb + entry, sum, false);
      }
    }
  }

  /// Where windows are clamped: sums over a row of positions of the tile, by column of rpb. Each position has one slot
  /// there, or none.
  __device__ __forceinline__ void sum_rows(const BranchTile& tile, const Piece& piece) const {
    const int k = tile.k;
    for (int i = thread_; i < kQueryTile * tile.entries; i += kMaxThreads) {
      const int tile_line = i / tile.entries, entry = i % tile.entries;
      A sum = 0;
#pragma unroll 1
      for (int n = 0; n < kTileWidth; ++n) {
        const int position = min(tile_column_ + n, width_ - 1);
        const int slot = entry - (k - 1) + position - window_start(position, width_, k) - piece.start;
        if (slot >= 0 && slot < piece.size) sum += dz()[slot * kProductPitch + tile_line * kTileWidth + n];
      }
      shared_[layout_.row_sums + i] = sum;
    }
  }

  /// A thread has a column of rpb, always the same. Rows of positions that share an entry are summed before they are
  /// added to it.
  __device__ __forceinline__ void add_row_sums(const BranchTile& tile, const Piece& piece, A* grad_rpb) const {
    const int k = tile.k;
    for (int entry = thread_; entry < tile.entries; entry += kMaxThreads) {
      A sum = 0;
#pragma unroll 1
      for (int n = 0; n < kQueryTile; ++n) {
        const int position = min(tile_row_ + n, height_ - 1), next = min(position + 1, height_ - 1);
        const int offset = window_start(position, height_, k) - position;
        sum += shared_[layout_.row_sums + n * tile.entries + entry];
        if (n == kQueryTile - 1 || window_start(next, height_, k) - next != offset) {
          add(grad_rpb + static_cast<int64_t>(offset + piece.line + k - 1) * tile.entries + entry, sum, false);
          sum = 0;
        }
      }
    }
  }

  __device__ __forceinline__ void add_to_grad_keys(const BranchTile& tile, const Piece& piece) const {
    const int queries = this->queries();
    const A* const products = shared_ + layout_.products;
    A* grad_keys = static_cast<A*>(params_.grad_keys) +
                   (slice_ * params_.slots() + tile.branch.first_slot + piece.first_slot) * query_channels_ +
                   first_query_;
    for (int i = thread_; i < piece.size * kQuery; i += kMaxThreads) {
      const int slot = i / kQuery, channel = i % kQuery;
      if (channel < queries) {
        A sum = products[i];
#pragma unroll
        for (int w = 1; w < kMaxThreads / kWarp; ++w) sum += products[w * kProductSlots * kQuery + i];
        add(grad_keys + static_cast<int64_t>(slot) * query_channels_ + channel, sum, first_tile_);
      }
    }
  }

  __device__ __forceinline__ void write_grad_query() const {
    if (!params_.grad_query.data || !in_map()) return;
    const int queries = this->queries();
    const Group<T> grad_query(params_.grad_query, image_, group_ * query_channels_ + first_query_);
    for_channels<kQuery>(grad_query.at(0, row_, column_), grad_query.channel_stride, [&](int d, T* at) {
      if (d < queries) store(at, grad_q_[d]);
    });
  }

  const ContMixParams& params_;
  A* const shared_;
  const QueryLayout layout_;
  const int thread_;
  const int64_t partial_, group_, image_;
  const int64_t slice_;  ///< of the partial sums
  const int height_, width_, query_channels_;
  const Group<const T> query_;
  // Of the tile.
  bool first_tile_ = false;
  int tile_row_ = 0, tile_column_ = 0, row_ = 0, column_ = 0, y_ = 0, x_ = 0;
  int first_query_ = 0;
  A q_[kQuery], grad_q_[kQuery];
};

/// dq of tiles of 8 x 16 positions, and this block's share of the sums over the map: dM, d(bias) and d(rpb).
///
/// Grid: partials x G x B. A block has every params.partials-th tile of its group, both branches of a tile one after
/// the other, and adds to its own slice of the partial sums. A thread has a position. All threads have the same slot at
/// the same time, so that dZ of a row of slots, (slots, positions) in shared memory, can be summed over positions by
/// all of them together.
///
/// A general variant has query channels kQuery at a time, and computes dZ again for the next.
///
/// Shared memory has room for three blocks, which leave 168 registers to a thread: enough, as long as the short loops
/// beside the main one are not unrolled.
template <typename T, int kChannels, int kQuery, bool kStaged>
__global__ void __launch_bounds__(kMaxThreads, kStaged ? 3 : 1)
    contmix_backward_query_kernel(const ContMixParams params) {
  OVERLOCK_MM_SHARED(typename Accumulator<T>::type, shared);
  QueryThread<T, kChannels, kQuery, kStaged> thread(params, shared);
  thread.run();
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward: values

/// A thread of backward_value: kRows elements of the map, one above the other, and those that read them. In a general
/// variant kQuery is 0.
template <typename T, int kChannels, int kQuery, int kRows>
class ValueThread {
 public:
  using A = typename Accumulator<T>::type;

  __device__ __forceinline__ ValueThread(const ContMixParams& params, A* shared)
      : params_(params),
        shared_(shared),
        tile_(params, tile_height(kRows), kChannels),
        branch_(params, tile_.branch, tile_.image, tile_.group),
        k_(branch_.kernel_size),
        channels_(min(branch_.channels - tile_.channel, kChannels)),
        layout_(k_, kQuery),
        grad_output_(params.grad_output, tile_.image, branch_.first_channel + tile_.channel),
        query_(params.query, tile_.image, tile_.group * params.query_channels),
        at_(tile_, branch_.height, branch_.width),
        left_(first_reader(at_.x, k_)),
        right_(last_reader(at_.x, branch_.width, k_)),
        readers_(readers_of_tile()),
        band_query_(shared + layout_.maps),
        band_grad_(band_query_ + kBandRows * readers_.columns * pitch(kQuery)),
        band_logsumexp_(band_grad_ + kBandRows * readers_.columns * pitch(kChannels)) {
#pragma unroll
    for (int t = 0; t < kRows; ++t) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) grad_value_[t][c] = 0;
    }
  }

  /// All threads must call.
  __device__ __forceinline__ void run() {
    if constexpr (kStaged) {
      stage_keys<kQuery>(shared_, branch_.keys, branch_.slots(), branch_.query_channels);
      stage_biases(shared_ + layout_.bias, branch_.bias, branch_.slots());
      stage_biases(shared_ + layout_.rpb, branch_.rpb, branch_.entries() * branch_.entries());
    }
    const int end = readers_.top + readers_.rows;
    for (int band = readers_.top; band < end; band += kBandRows) {
      const int rows = min(kBandRows, end - band);
      if constexpr (kStaged) {
        if (band > readers_.top) __syncthreads();  // Until here, other threads may read the last band.
        stage_band(band, rows);
        __syncthreads();
      }
      for (int line = band; line < band + rows; ++line) {
        const int top = window_start(line, branch_.height, k_);
        const auto holds = [&](int t) { return at_.row[t] < branch_.height && at_.y[t] >= top && at_.y[t] < top + k_; };
        for_rows<kRows>(holds, [&](auto first, auto last) {
          this->template take_readers<decltype(first)::value, decltype(last)::value>(band, line, top);
        });
      }
    }
  }

  __device__ __forceinline__ void write() const {
    const Group<T> to(params_.grad_value, tile_.image, branch_.first_channel + tile_.channel);
#pragma unroll
    for (int t = 0; t < kRows; ++t) {
      if (at_.row[t] >= branch_.height || at_.column >= branch_.width) continue;
      for_channels<kChannels>(to.at(0, at_.row[t], at_.column), to.channel_stride, [&](int c, T* at) {
        if (c < channels_) store(at, grad_value_[t][c]);
      });
    }
  }

 private:
  static constexpr bool kStaged = kQuery > 0;

  __device__ __forceinline__ Rectangle readers_of_tile() const {
    const int height = branch_.height, width = branch_.width;
    const int top = first_reader(tile_.row, k_), left = first_reader(tile_.column, k_);
    const int bottom = last_reader(min(tile_.row + tile_height(kRows), height) - 1, height, k_);
    const int right = last_reader(min(tile_.column + kTileWidth, width) - 1, width, k_);
    return {top, left, bottom + 1 - top, right + 1 - left};
  }

  /// Queries, gradients and log-sum-exps of the tile's readers in `rows` rows from `band` on.
  __device__ __forceinline__ void stage_band(int band, int rows) const {
    const int columns = readers_.columns;
    stage_map<kQuery>(band_query_, query_, branch_.query_channels, band, rows, readers_.left, columns, A(kLog2E));
    stage_map<kChannels>(band_grad_, grad_output_, channels_, band, rows, readers_.left, columns, A(1));
    for (int i = threadIdx.x; i < rows * columns; i += blockDim.x) {
      band_logsumexp_[i] = branch_.logsumexp_at(band + i / columns, readers_.left + i % columns);
    }
  }

  /// The readers in a line, whose windows begin at row `top`, of elements kFirst to kLast.
  template <int kFirst, int kLast>
  __device__ __forceinline__ void take_readers(int band, int line, int top) {
#pragma unroll 1
    for (int reader = left_; reader <= right_; ++reader) {
      const int slot_column = at_.x - window_start(reader, branch_.width, k_);
      const int entry_column = at_.x - reader + k_ - 1;
      if constexpr (kStaged) {
        const int position = (line - band) * readers_.columns + reader - readers_.left;
        take_staged_reader<kFirst, kLast>(position, line, top, slot_column, entry_column);
      } else {
        take_reader<kFirst, kLast>(reader, line, top, slot_column, entry_column);
      }
    }
  }

  template <int kFirst, int kLast>
  __device__ __forceinline__ void take_staged_reader(int position, int line, int top, int slot_column,
                                                     int entry_column) {
    A p[kRows], q[kQuery];
#pragma unroll
    for (int d = 0; d < kQuery; d += 4) {
      const Vector<A> vector = vector_at(band_query_ + position * pitch(kQuery) + d);
#pragma unroll
      for (int i = 0; i < 4; ++i) q[d + i] = vector.at[i];
    }
#pragma unroll
    for (int t = kFirst; t < kLast; ++t) {
      const int slot = (at_.y[t] - top) * k_ + slot_column;
      const int entry = (at_.y[t] - line + k_ - 1) * branch_.entries() + entry_column;
      const A z = dot(q, shared_ + slot * kQuery) + shared_[layout_.bias + slot] + shared_[layout_.rpb + entry];
      p[t] = power_of_2(z - band_logsumexp_[position]);
    }
#pragma unroll
    for (int c = 0; c < kChannels; c += 4) {
      const Vector<A> vector = vector_at(band_grad_ + position * pitch(kChannels) + c);
#pragma unroll
      for (int t = kFirst; t < kLast; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) grad_value_[t][c + i] += p[t] * vector.at[i];
      }
    }
  }

  template <int kFirst, int kLast>
  __device__ __forceinline__ void take_reader(int reader, int line, int top, int slot_column, int entry_column) {
    A p[kRows];
#pragma unroll
    for (int t = kFirst; t < kLast; ++t) {
      const int slot = (at_.y[t] - top) * k_ + slot_column;
      const A* key = branch_.keys + static_cast<int64_t>(slot) * branch_.query_channels;
      const T* queries = query_.at(0, line, reader);
      A z = 0;
      for (int d = 0; d < branch_.query_channels; ++d) z += load(queries + d * query_.channel_stride) * key[d];
      z *= A(kLog2E);
      if (branch_.bias) z += in_base_2(branch_.bias[slot]);
      if (branch_.rpb) z += in_base_2(branch_.rpb[(at_.y[t] - line + k_ - 1) * branch_.entries() + entry_column]);
      p[t] = power_of_2(z - branch_.logsumexp_at(line, reader));
    }
    for_channels<kChannels>(grad_output_.at(0, line, reader), grad_output_.channel_stride, [&](int c, const T* at) {
      if (c < channels_) {
        const A number = load(at);
#pragma unroll
        for (int t = kFirst; t < kLast; ++t) grad_value_[t][c] += p[t] * number;
      }
    });
  }

  const ContMixParams& params_;
  A* const shared_;
  const Tile tile_;
  const Branch<T> branch_;
  const int k_, channels_;
  const StagedLayout layout_;
  const Group<const T> grad_output_, query_;
  const Positions<kRows> at_;
  const int left_, right_;   ///< first and last column of the readers
  const Rectangle readers_;  ///< of the tile
  A *const band_query_, *const band_grad_, *const band_logsumexp_;
  A grad_value_[kRows][kChannels];
};

/// dV_m = Σ_{p: m in window(p)} P_{p,l(p,m)} dO_p for a tile of (blockDim / 16 * kRows) x 16 elements m of the map.
///
/// Grid as forward's. The tile's readers pass through shared memory, their queries, gradients and log-sum-exps,
/// kBandRows rows of the map at a time: at a border an element has up to k + k // 2 readers along an axis, and all of
/// them at once would leave room for one block on a processor.
template <typename T, int kChannels, int kQuery, int kRows>
__global__ void __launch_bounds__(kMaxThreads, 4) contmix_backward_value_kernel(const ContMixParams params) {
  OVERLOCK_MM_SHARED(typename Accumulator<T>::type, shared);
  ValueThread<T, kChannels, kQuery, kRows> thread(params, shared);
  thread.run();
  thread.write();
}

}  // namespace contmix_kernels
}  // namespace overlock_mm
