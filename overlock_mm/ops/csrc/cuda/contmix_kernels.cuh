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
// What bounds them is shared memory, which serves 128 bytes a cycle where the cores want 3 operands for each of 128
// multiply-adds. So whatever a thread can hold in registers it holds; keys are read as broadcasts; and the two kernels
// that can, give a thread two positions, one above the other, for every vector they read.
//
// "Staged" variants bring a tile and its halo to shared memory and hold a whole group in registers: up to kChannels
// channels and kQuery query channels, padded by zeros. The general variant (kQuery = 0) reads global memory through the
// caches and takes what the others do not: any number of channels, double, a kernel whose tile would not fit. The two
// share all but the innermost loops.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <type_traits>

#include "../contmix.h"

/// The block's dynamic shared memory. A host that emulates a device defines its own.
#if !defined(OVERLOCK_MM_SHARED)
#define OVERLOCK_MM_SHARED(A, name)                                      \
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[]; \
  A* const name = reinterpret_cast<A*>(dynamic_shared_memory)
#endif

namespace overlock_mm {
namespace contmix_kernels {

constexpr int kWarp = 32;
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

OVERLOCK_MM_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
OVERLOCK_MM_HOST_DEVICE constexpr int round_up(int n) { return (n + 3) / 4 * 4; }

// ---------------------------------------------------------------------------------------------------------------------
// Numbers

template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

__device__ __forceinline__ float load(const float* at) { return *at; }
__device__ __forceinline__ double load(const double* at) { return *at; }
__device__ __forceinline__ float load(const __half* at) { return __half2float(*at); }
__device__ __forceinline__ float load(const __nv_bfloat16* at) { return __bfloat162float(*at); }

__device__ __forceinline__ void store(float* at, float number) { *at = number; }
__device__ __forceinline__ void store(double* at, double number) { *at = number; }
__device__ __forceinline__ void store(__half* at, float number) { *at = __float2half_rn(number); }
__device__ __forceinline__ void store(__nv_bfloat16* at, float number) { *at = __float2bfloat16_rn(number); }

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

/// What shared memory is read in.
template <typename A>
struct alignas(16) Vector {
  A at[4];
};

template <typename A>
__device__ __forceinline__ const Vector<A>& vector_at(const A* shared) {
  return *reinterpret_cast<const Vector<A>*>(shared);
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
/// Neighbouring threads take what are neighbours in global memory: columns, or channels of a channels_last map.
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

/// What a block of forward and backward_value is: a tile of a branch, and the channels from `channel`.
struct Block {
  int branch, channel, row, column;
  int64_t image, group;

  /// The large kernel's blocks, which take longest, have the lowest numbers and so start first.
  __device__ Block(const ContMixParams& params, int tile_height, int chunk) {
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

/// O = Σ_l softmax(z)_l V_l for a tile of (blockDim / 16 * kRows) x 16 positions and kChannels channels.
///
/// Grid: tiles x chunks of channels x G x B x 2 branches. A thread has kRows positions, in one column. It walks down
/// the rows of the map that their windows cover: a row's slots give each position up to kSlotChunk logits, with which
/// it updates the running maximum and sum, and every value it reads then serves all positions whose window holds it.
template <typename T, int kChannels, int kQuery, int kRows>
__global__ void __launch_bounds__(kMaxThreads, 3) contmix_forward_kernel(const ContMixParams params) {
  using A = typename Accumulator<T>::type;
  constexpr bool kStaged = kQuery > 0;
  const int tile_height = static_cast<int>(blockDim.x) / kTileWidth * kRows;
  const Block block(params, tile_height, kChannels);
  const Branch<T> branch(params, block.branch, block.image, block.group);
  const int k = branch.kernel_size, height = branch.height, width = branch.width;
  const int channels = min(branch.channels - block.channel, kChannels);
  const Group<const T> value(params.value, block.image, branch.first_channel + block.channel);
  const Group<const T> query(params.query, block.image, block.group * params.query_channels);

  // Threads beyond the map work on its last row or column, and write nothing.
  const int column = block.column + static_cast<int>(threadIdx.x) % kTileWidth;
  const int x = min(column, width - 1);
  const int left = window_start(x, width, k);
  int row[kRows], y[kRows], top[kRows];
#pragma unroll
  for (int t = 0; t < kRows; ++t) {
    row[t] = block.row + static_cast<int>(threadIdx.x) / kTileWidth * kRows + t;
    y[t] = min(row[t], height - 1);
    top[t] = window_start(y[t], height, k);
  }

  // The tile's windows: rows from tile_top, tile_columns columns from tile_left.
  const int tile_top = window_start(block.row, height, k), tile_left = window_start(block.column, width, k);
  const int last_row = min(block.row + tile_height, height) - 1;
  const int last_column = min(block.column + kTileWidth, width) - 1;
  const int tile_rows = window_start(last_row, height, k) + k - tile_top;
  const int tile_columns = window_start(last_column, width, k) + k - tile_left;

  OVERLOCK_MM_SHARED(A, shared);
  const StagedLayout layout(k, kQuery);
  A q[kRows][kStaged ? kQuery : 1];
  if constexpr (kStaged) {
    stage_keys<kQuery>(shared, branch.keys, branch.slots(), branch.query_channels);
    stage_biases(shared + layout.bias, branch.bias, branch.slots());
    stage_biases(shared + layout.rpb, branch.rpb, branch.entries() * branch.entries());
    stage_map<kChannels>(shared + layout.maps, value, channels, tile_top, tile_rows, tile_left, tile_columns, A(1));
#pragma unroll
    for (int t = 0; t < kRows; ++t) {
      for_channels<kQuery>(query.at(0, y[t], x), query.channel_stride, [&](int d, const T* at) {
        q[t][d] = d < branch.query_channels ? load(at) * A(kLog2E) : A(0);
      });
    }
    __syncthreads();
  }
  if (row[0] >= height) return;  // No barrier follows.

  A maximum[kRows], sum[kRows], out[kRows][kChannels];
#pragma unroll
  for (int t = 0; t < kRows; ++t) {
    maximum[t] = minus_infinity<A>();
    sum[t] = 0;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) out[t][c] = 0;
  }

  // As few chunks to a row of slots as hold it, and these even: 13 = 7 + 6.
  const int chunk = static_cast<int>(ceil_div(k, ceil_div(k, kSlotChunk)));
  for (int line = top[0]; line < top[kRows - 1] + k; ++line) {
    const auto holds = [&](int t) { return line >= top[t] && line < top[t] + k; };
    for_rows<kRows>(holds, [&](auto first, auto last) {
      constexpr int kFirst = decltype(first)::value, kLast = decltype(last)::value;
      for (int start = 0; start < k; start += chunk) {
        const int size = min(chunk, k - start);
        A p[kRows][kSlotChunk];
#pragma unroll
        for (int t = kFirst; t < kLast; ++t) {
          const int slot = (line - top[t]) * k + start;
          const int entry = (line - y[t] + k - 1) * branch.entries() + (left + start - x + k - 1);
          if constexpr (!kStaged) {
#pragma unroll
            for (int u = 0; u < kSlotChunk; ++u) p[t][u] = 0;
            const A* keys = branch.keys + static_cast<int64_t>(slot) * branch.query_channels;
            for (int d = 0; d < branch.query_channels; ++d) {
              const A q_d = load(query.at(d, y[t], x));
#pragma unroll
              for (int u = 0; u < kSlotChunk; ++u) {
                if (u < size) p[t][u] += q_d * keys[static_cast<int64_t>(u) * branch.query_channels + d];
              }
            }
          }
          A largest = minus_infinity<A>();
#pragma unroll
          for (int u = 0; u < kSlotChunk; ++u) {
            if (u < size) {
              if constexpr (kStaged) {
                const A* biases = shared + layout.bias + slot + u;
                const A* offsets = shared + layout.rpb + entry + u;
                p[t][u] = dot(q[t], shared + (slot + u) * kQuery) + *biases + *offsets;
              } else {
                p[t][u] *= A(kLog2E);
                if (branch.bias) p[t][u] += in_base_2(branch.bias[slot + u]);
                if (branch.rpb) p[t][u] += in_base_2(branch.rpb[entry + u]);
              }
              largest = larger(largest, p[t][u]);
            }
          }
          if (largest > maximum[t]) {
            // The first time the maximum is -inf, the factor 0, and everything it multiplies 0.
            const A factor = power_of_2(maximum[t] - largest);
            maximum[t] = largest;
            sum[t] *= factor;
#pragma unroll
            for (int c = 0; c < kChannels; ++c) out[t][c] *= factor;
          }
          // As long as all slots are masked, any finite number in place of the maximum makes their weight 0.
          const A reference = maximum[t] == minus_infinity<A>() ? A(0) : maximum[t];
#pragma unroll
          for (int u = 0; u < kSlotChunk; ++u) {
            if (u < size) {
              p[t][u] = power_of_2(p[t][u] - reference);
              sum[t] += p[t][u];
            }
          }
        }
#pragma unroll
        for (int u = 0; u < kSlotChunk; ++u) {
          if (u < size) {
            if constexpr (kStaged) {
              const int position = (line - tile_top) * tile_columns + (left - tile_left) + start + u;
              const A* values = shared + layout.maps + position * pitch(kChannels);
#pragma unroll
              for (int c = 0; c < kChannels; c += 4) {
                const Vector<A> vector = vector_at(values + c);
#pragma unroll
                for (int t = kFirst; t < kLast; ++t) {
#pragma unroll
                  for (int i = 0; i < 4; ++i) out[t][c + i] += p[t][u] * vector.at[i];
                }
              }
            } else {
              for_channels<kChannels>(value.at(0, line, left + start + u), value.channel_stride,
                                      [&](int c, const T* at) {
                                        if (c < channels) {
                                          const A number = load(at);
#pragma unroll
                                          for (int t = kFirst; t < kLast; ++t) out[t][c] += p[t][u] * number;
                                        }
                                      });
            }
          }
        }
      }
    });
  }

  const Group<T> output(params.output, block.image, branch.first_channel + block.channel);
#pragma unroll
  for (int t = 0; t < kRows; ++t) {
    if (row[t] >= height || column >= width) continue;
    // A row without any slot left has sum 0 and, as in eager PyTorch, gives NaN.
    const A scale = A(1) / sum[t];
    for_channels<kChannels>(output.at(0, row[t], column), output.channel_stride, [&](int c, T* at) {
      if (c < channels) store(at, out[t][c] * scale);
    });
    if (block.channel == 0) branch.logsumexp_at(row[t], column) = maximum[t] + logarithm_2(sum[t]);
  }
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

/// dq of tiles of 8 x 16 positions, and this block's share of the sums over the map: dM, d(bias) and d(rpb).
///
/// Grid: partials x G x B. A block has every params.partials-th tile of its group, both branches of a tile one after
/// the other, and adds to its own slice of the partial sums. A thread has a position. All threads have the same slot at
/// the same time, so that dZ of a row of slots, (slots, positions) in shared memory, can be summed over positions by
/// all of them together.
///
/// A general variant has query channels kQuery at a time, and computes dZ again for the next.
///
/// Three blocks, which is what shared memory has room for, leave 168 registers to a thread: enough, as long as the
/// short loops beside the main one are not unrolled.
template <typename T, int kChannels, int kQuery, bool kStaged>
__global__ void __launch_bounds__(kMaxThreads, kStaged ? 3 : 1)
    contmix_backward_query_kernel(const ContMixParams params) {
  using A = typename Accumulator<T>::type;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t partials = params.partials;
  const int64_t partial = blockIdx.x % partials;
  const int64_t group = blockIdx.x / partials % params.groups, image = blockIdx.x / partials / params.groups;
  const int64_t slice = (partial * params.batch + image) * params.groups + group;
  const int height = static_cast<int>(params.height), width = static_cast<int>(params.width);
  const int query_channels = static_cast<int>(params.query_channels);
  const int horizontal_tiles = static_cast<int>(ceil_div(width, kTileWidth));
  const int tiles = static_cast<int>(ceil_div(height, kQueryTile)) * horizontal_tiles;
  const Group<const T> query(params.query, image, group * query_channels);

  OVERLOCK_MM_SHARED(A, shared);
  const QueryLayout layout(static_cast<int>(max(params.kernel_size[0], params.kernel_size[1])), kQuery, kStaged);
  A* const dz = shared;
  A* const shared_query = shared + layout.query;
  A* const products = shared + layout.products;
  A* const row_sums = shared + layout.row_sums;

  for (int index = 0; index < 2; ++index) {
    if (!params.grad_rpb[index]) continue;
    const int64_t size = (2 * params.kernel_size[index] - 1) * (2 * params.kernel_size[index] - 1);
    for (int64_t i = thread; i < size; i += kMaxThreads) static_cast<A*>(params.grad_rpb[index])[slice * size + i] = 0;
  }

  for (int tile = static_cast<int>(partial); tile < tiles; tile += static_cast<int>(partials)) {
    const bool first_tile = tile == partial;
    const int tile_row = tile / horizontal_tiles * kQueryTile, tile_column = tile % horizontal_tiles * kTileWidth;
    const int last_row = min(tile_row + kQueryTile, height) - 1;
    const int last_column = min(tile_column + kTileWidth, width) - 1;
    // Threads beyond the map work on its last row or column, and their dZ is 0.
    const int row = tile_row + thread / kTileWidth, column = tile_column + thread % kTileWidth;
    const bool in_map = row < height && column < width;
    const int y = min(row, height - 1), x = min(column, width - 1);

    for (int first_query = 0; first_query < query_channels; first_query += kQuery) {
      const int queries = min(query_channels - first_query, kQuery);
      A q[kQuery], grad_q[kQuery];
      for_channels<kQuery>(query.at(first_query, y, x), query.channel_stride, [&](int d, const T* at) {
        const A number = d < queries ? load(at) : A(0);
        shared_query[thread * pitch(kQuery) + d] = number;
        q[d] = number * A(kLog2E);
        grad_q[d] = 0;
      });

      for (int index = 0; index < 2; ++index) {
        const Branch<T> branch(params, index, image, group);
        const int k = branch.kernel_size, entries = branch.entries();
        const Group<const T> value(params.value, image, branch.first_channel);
        const Group<const T> output(params.output, image, branch.first_channel);
        const Group<const T> grad_output(params.grad_output, image, branch.first_channel);
        const int top = window_start(y, height, k), left = window_start(x, width, k);
        const int tile_top = window_start(tile_row, height, k), tile_left = window_start(tile_column, width, k);
        const int tile_bottom = window_start(last_row, height, k), tile_right = window_start(last_column, width, k);
        const int tile_columns = tile_right + k - tile_left;
        // Where no window is clamped, a slot has one entry of rpb for the whole tile.
        const bool interior = tile_top == tile_row - k / 2 && tile_left == tile_column - k / 2 &&
                              tile_bottom == last_row - k / 2 && tile_right == last_column - k / 2;

        // Values, queries and keys may be overwritten: the threads that read the last ones have since met in a barrier.
        A grad_out[kStaged ? kChannels : 1], grad_dot_out = 0;
        if constexpr (kStaged) {
          stage_map<kChannels>(shared + layout.value, value, branch.channels, tile_top, tile_bottom + k - tile_top,
                               tile_left, tile_columns, A(1));
          stage_biases(shared + layout.rpb, branch.rpb, entries * entries);
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
        const A logsumexp = branch.logsumexp_at(y, x);

        // As few pieces to a row of slots as hold it, and these even.
        const int chunk = static_cast<int>(ceil_div(k, ceil_div(k, kProductSlots)));
        for (int line = 0; line < k; ++line) {
          for (int start = 0; start < k; start += chunk) {
            const int size = min(chunk, k - start);
            const int first_slot = line * k + start;
            const int first_entry = (top + line - y + k - 1) * entries + (left + start - x + k - 1);
            const A* keys = branch.keys + static_cast<int64_t>(first_slot) * query_channels;
            if constexpr (kStaged) {
              stage_keys<kQuery>(shared + layout.keys, keys, size, query_channels);
              stage_biases(shared + layout.bias, branch.bias ? branch.bias + first_slot : nullptr, size);
              __syncthreads();
            }

#pragma unroll(kStaged ? 2 : 1)
            for (int u = 0; u < size; ++u) {
              A z = 0, grad_p = 0;
              if constexpr (kStaged) {
                const int position = (top + line - tile_top) * tile_columns + (left - tile_left) + start + u;
                z = dot(q, shared + layout.keys + u * kQuery) + shared[layout.bias + u] +
                    shared[layout.rpb + first_entry + u];
                grad_p = dot(grad_out, shared + layout.value + position * pitch(kChannels));
              } else {
                const A* key = keys + static_cast<int64_t>(u) * query_channels;
                for (int d = 0; d < query_channels; ++d) z += load(query.at(d, y, x)) * key[d];
                z *= A(kLog2E);
                if (branch.bias) z += in_base_2(branch.bias[first_slot + u]);
                if (branch.rpb) z += in_base_2(branch.rpb[first_entry + u]);
                const T* values = value.at(0, top + line, left + start + u);
                const T* grads = grad_output.at(0, y, x);
                for (int c = 0; c < branch.channels; ++c) {
                  grad_p += load(grads + c * grad_output.channel_stride) * load(values + c * value.channel_stride);
                }
              }
              const A grad_z = power_of_2(z - logsumexp) * (grad_p - grad_dot_out);
              if constexpr (kStaged) {
#pragma unroll
                for (int d = 0; d < kQuery; d += 4) {
                  const Vector<A> vector = vector_at(shared + layout.keys + u * kQuery + d);
#pragma unroll
                  for (int i = 0; i < 4; ++i) grad_q[d + i] += grad_z * vector.at[i];
                }
              } else {
                const A* key = keys + static_cast<int64_t>(u) * query_channels + first_query;
#pragma unroll
                for (int d = 0; d < kQuery; ++d) {
                  if (d < queries) grad_q[d] += grad_z * key[d];
                }
              }
              // Last, as after a write to shared memory the compiler would read the key again.
              dz[u * kProductPitch + thread] = in_map ? grad_z : A(0);
            }
            __syncthreads();

            if (params.grad_keys) sum_products<kQuery>(dz, shared_query, products, size);
            A* grad_rpb = static_cast<A*>(params.grad_rpb[index]);
            if (grad_rpb) grad_rpb += slice * entries * entries;
            const bool sums_rpb = grad_rpb && first_query == 0;
            if (first_query == 0 && (params.grad_bias || (grad_rpb && interior))) {
              // 8 threads to a slot. d(bias) is the sum over the tile, and so, inside the map, is d(rpb).
              constexpr int kThreads = kMaxThreads / kProductSlots;
              const int slot = thread / kThreads;
              A sum = 0;
              if (slot < size) {
#pragma unroll 1
                for (int position = thread % kThreads * 4; position < kMaxThreads; position += kThreads * 4) {
                  const Vector<A> vector = vector_at(dz + slot * kProductPitch + position);
                  sum += (vector.at[0] + vector.at[1]) + (vector.at[2] + vector.at[3]);
                }
              }
#pragma unroll
              for (int lanes = 1; lanes < kThreads; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
              if (slot < size && thread % kThreads == 0) {
                if (params.grad_bias) {
                  A* grad_bias = static_cast<A*>(params.grad_bias) + slice * params.slots() + branch.first_slot;
                  add(grad_bias + first_slot + slot, sum, first_tile);
                }
                if (sums_rpb && interior) {
                  const int entry = (line - k / 2 + k - 1) * entries + start - k / 2 + k - 1 + slot;
                  add(grad_rpb + entry, sum, false);
                }
              }
            }
            if (sums_rpb && !interior) {
              // A row of positions of the tile, by column of rpb: each position has one slot there, or none.
              for (int i = thread; i < kQueryTile * entries; i += kMaxThreads) {
                const int tile_line = i / entries, entry = i % entries;
                A sum = 0;
#pragma unroll 1
                for (int n = 0; n < kTileWidth; ++n) {
                  const int position = min(tile_column + n, width - 1);
                  const int slot = entry - (k - 1) + position - window_start(position, width, k) - start;
                  if (slot >= 0 && slot < size) sum += dz[slot * kProductPitch + tile_line * kTileWidth + n];
                }
                row_sums[i] = sum;
              }
            }
            __syncthreads();

            if (params.grad_keys) {
              A* grad_keys = static_cast<A*>(params.grad_keys) +
                             (slice * params.slots() + branch.first_slot + first_slot) * query_channels + first_query;
              for (int i = thread; i < size * kQuery; i += kMaxThreads) {
                const int slot = i / kQuery, channel = i % kQuery;
                if (channel < queries) {
                  A sum = products[i];
#pragma unroll
                  for (int w = 1; w < kMaxThreads / kWarp; ++w) sum += products[w * kProductSlots * kQuery + i];
                  add(grad_keys + static_cast<int64_t>(slot) * query_channels + channel, sum, first_tile);
                }
              }
            }
            if (sums_rpb && !interior) {
              // A thread has a column of rpb, always the same. Rows of positions that share an entry are summed before
              // they are added to it.
              for (int entry = thread; entry < entries; entry += kMaxThreads) {
                A sum = 0;
#pragma unroll 1
                for (int n = 0; n < kQueryTile; ++n) {
                  const int position = min(tile_row + n, height - 1), next = min(position + 1, height - 1);
                  const int offset = window_start(position, height, k) - position;
                  sum += row_sums[n * entries + entry];
                  if (n == kQueryTile - 1 || window_start(next, height, k) - next != offset) {
                    add(grad_rpb + static_cast<int64_t>(offset + line + k - 1) * entries + entry, sum, false);
                    sum = 0;
                  }
                }
              }
            }
          }
        }
      }

      if (params.grad_query.data && in_map) {
        const Group<T> grad_query(params.grad_query, image, group * query_channels + first_query);
        for_channels<kQuery>(grad_query.at(0, row, column), grad_query.channel_stride, [&](int d, T* at) {
          if (d < queries) store(at, grad_q[d]);
        });
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward: values

/// dV_m = Σ_{p: m in window(p)} P_{p,l(p,m)} dO_p for a tile of (blockDim / 16 * kRows) x 16 elements m of the map.
///
/// Grid as forward's. A thread has kRows elements, in one column. The tile's readers pass through shared memory, their
/// queries, gradients and log-sum-exps, kBandRows rows of the map at a time: at a border an element has up to
/// k + k // 2 readers along an axis, and all of them at once would leave room for one block on a processor.
template <typename T, int kChannels, int kQuery, int kRows>
__global__ void __launch_bounds__(kMaxThreads, 4) contmix_backward_value_kernel(const ContMixParams params) {
  using A = typename Accumulator<T>::type;
  constexpr bool kStaged = kQuery > 0;
  const int tile_height = static_cast<int>(blockDim.x) / kTileWidth * kRows;
  const Block block(params, tile_height, kChannels);
  const Branch<T> branch(params, block.branch, block.image, block.group);
  const int k = branch.kernel_size, height = branch.height, width = branch.width, entries = branch.entries();
  const int channels = min(branch.channels - block.channel, kChannels);
  const Group<const T> grad_output(params.grad_output, block.image, branch.first_channel + block.channel);
  const Group<const T> query(params.query, block.image, block.group * params.query_channels);

  // Threads beyond the map work on its last row or column, and write nothing.
  const int column = block.column + static_cast<int>(threadIdx.x) % kTileWidth;
  const int x = min(column, width - 1);
  const int left = first_reader(x, k), right = last_reader(x, width, k);
  int row[kRows], y[kRows];
#pragma unroll
  for (int t = 0; t < kRows; ++t) {
    row[t] = block.row + static_cast<int>(threadIdx.x) / kTileWidth * kRows + t;
    y[t] = min(row[t], height - 1);
  }

  // The readers of the tile.
  const int tile_top = first_reader(block.row, k), tile_left = first_reader(block.column, k);
  const int tile_bottom = last_reader(min(block.row + tile_height, height) - 1, height, k);
  const int tile_columns = last_reader(min(block.column + kTileWidth, width) - 1, width, k) + 1 - tile_left;

  OVERLOCK_MM_SHARED(A, shared);
  const StagedLayout layout(k, kQuery);
  const int band_positions = kBandRows * tile_columns;
  A* const band_query = shared + layout.maps;
  A* const band_grad = band_query + band_positions * pitch(kQuery);
  A* const band_logsumexp = band_grad + band_positions * pitch(kChannels);
  if constexpr (kStaged) {
    stage_keys<kQuery>(shared, branch.keys, branch.slots(), branch.query_channels);
    stage_biases(shared + layout.bias, branch.bias, branch.slots());
    stage_biases(shared + layout.rpb, branch.rpb, entries * entries);
  }

  A grad_value[kRows][kChannels];
#pragma unroll
  for (int t = 0; t < kRows; ++t) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) grad_value[t][c] = 0;
  }

  for (int band = tile_top; band <= tile_bottom; band += kBandRows) {
    const int band_rows = min(kBandRows, tile_bottom + 1 - band);
    if constexpr (kStaged) {
      if (band > tile_top) __syncthreads();  // Until here, other threads may read the last band.
      stage_map<kQuery>(band_query, query, branch.query_channels, band, band_rows, tile_left, tile_columns, A(kLog2E));
      stage_map<kChannels>(band_grad, grad_output, channels, band, band_rows, tile_left, tile_columns, A(1));
      for (int i = threadIdx.x; i < band_rows * tile_columns; i += blockDim.x) {
        band_logsumexp[i] = branch.logsumexp_at(band + i / tile_columns, tile_left + i % tile_columns);
      }
      __syncthreads();
    }

    for (int line = band; line < band + band_rows; ++line) {
      const int top = window_start(line, height, k);
      const auto holds = [&](int t) { return row[t] < height && y[t] >= top && y[t] < top + k; };
      for_rows<kRows>(holds, [&](auto first, auto last) {
        constexpr int kFirst = decltype(first)::value, kLast = decltype(last)::value;
#pragma unroll 1
        for (int reader = left; reader <= right; ++reader) {
          const int slot_column = x - window_start(reader, width, k);
          const int entry_column = x - reader + k - 1;
          A p[kRows];
          if constexpr (kStaged) {
            const int position = (line - band) * tile_columns + reader - tile_left;
            A q[kQuery];
#pragma unroll
            for (int d = 0; d < kQuery; d += 4) {
              const Vector<A> vector = vector_at(band_query + position * pitch(kQuery) + d);
#pragma unroll
              for (int i = 0; i < 4; ++i) q[d + i] = vector.at[i];
            }
#pragma unroll
            for (int t = kFirst; t < kLast; ++t) {
              const int slot = (y[t] - top) * k + slot_column;
              const int entry = (y[t] - line + k - 1) * entries + entry_column;
              const A z = dot(q, shared + slot * kQuery) + shared[layout.bias + slot] + shared[layout.rpb + entry];
              p[t] = power_of_2(z - band_logsumexp[position]);
            }
#pragma unroll
            for (int c = 0; c < kChannels; c += 4) {
              const Vector<A> vector = vector_at(band_grad + position * pitch(kChannels) + c);
#pragma unroll
              for (int t = kFirst; t < kLast; ++t) {
#pragma unroll
                for (int i = 0; i < 4; ++i) grad_value[t][c + i] += p[t] * vector.at[i];
              }
            }
          } else {
#pragma unroll
            for (int t = kFirst; t < kLast; ++t) {
              const int slot = (y[t] - top) * k + slot_column;
              const A* key = branch.keys + static_cast<int64_t>(slot) * branch.query_channels;
              const T* queries = query.at(0, line, reader);
              A z = 0;
              for (int d = 0; d < branch.query_channels; ++d) z += load(queries + d * query.channel_stride) * key[d];
              z *= A(kLog2E);
              if (branch.bias) z += in_base_2(branch.bias[slot]);
              if (branch.rpb) z += in_base_2(branch.rpb[(y[t] - line + k - 1) * entries + entry_column]);
              p[t] = power_of_2(z - branch.logsumexp_at(line, reader));
            }
            for_channels<kChannels>(grad_output.at(0, line, reader), grad_output.channel_stride,
                                    [&](int c, const T* at) {
                                      if (c < channels) {
                                        const A number = load(at);
#pragma unroll
                                        for (int t = kFirst; t < kLast; ++t) grad_value[t][c] += p[t] * number;
                                      }
                                    });
          }
        }
      });
    }
  }

  const Group<T> to(params.grad_value, block.image, branch.first_channel + block.channel);
#pragma unroll
  for (int t = 0; t < kRows; ++t) {
    if (row[t] >= height || column >= width) continue;
    for_channels<kChannels>(to.at(0, row[t], column), to.channel_stride, [&](int c, T* at) {
      if (c < channels) store(at, grad_value[t][c]);
    });
  }
}

}  // namespace contmix_kernels
}  // namespace overlock_mm
