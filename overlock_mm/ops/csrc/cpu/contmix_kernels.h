// ContMix on the CPU. Included once for each instruction set by a file that has set
//   OVERLOCK_MM_NAMESPACE     the namespace of the instruction set,
//   OVERLOCK_MM_VECTOR_BYTES  the width of its vectors,
// has included what is used here, and has switched the compiler to the instruction set. Nothing but simd.h may be
// included here: a function of a header that is compiled for AVX-512 could be the one that the linker keeps for
// everybody.
//
// The shape of the computation (docs/contmix.md counts it):
// - Logits, softmax: the lanes of a vector are slots of one position, k * k of them rounded up to whole vectors. The
//   padding has a logit of -inf, so that it has no weight.
// - Sums over a window, and back into it: the lanes are channels, rounded up to whole vectors. Neighbouring positions
//   whose windows move on by one column ("sliding") or stay where they are (at a border) share the loads of a window.
// - Gradient of the weights: the lanes are columns of the map.
// Border positions take the same path as all others: a window is always inside the map, and a bias is looked up by
// offset.

#include "simd.h"

namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE {
namespace {

constexpr int kVectors = kVectorBytes == 64 ? 4 : 2;  // of logits in registers for each of kTile positions
constexpr int kTile = 4;
constexpr int kChunk = 16;  // positions of a line that are worked on together: their weights stay in the L1 cache

/// Sizes in elements. "Padded" is rounded up to whole vectors.
template <typename T>
struct Layout {
  int64_t slots[2], padded_slots[2], offset[2];  // offset of a branch among the padded slots of both
  int64_t all_slots;                             // padded, of both branches
  int64_t channels, query_channels;              // padded
  // Parts of the packed keys of an image and group.
  int64_t rows, bias[2], rpb[2], keys_size;
  int64_t columns = 0;  // (query_channels, all_slots): keys with slots as lanes, in base 2; bias and rpb too
  // rows (all_slots, padded query_channels): keys with channels as lanes, for the backward

  Layout(const ContMixParams& p, bool backward) {
    for (int branch = 0; branch < 2; ++branch) {
      slots[branch] = p.kernel_size[branch] * p.kernel_size[branch];
      padded_slots[branch] = round_up<T>(slots[branch]);
    }
    offset[0] = 0;
    offset[1] = padded_slots[0];
    all_slots = padded_slots[0] + padded_slots[1];
    channels = round_up<T>(p.channels);
    query_channels = round_up<T>(p.query_channels);
    int64_t size = p.query_channels * all_slots;
    rows = size;
    if (backward) size += all_slots * query_channels;
    for (int branch = 0; branch < 2; ++branch) {
      // A vector more: they are read in whole vectors from any element on.
      bias[branch] = size;
      size += round_up<T>(slots[branch]) + Simd<T>::lanes;
      rpb[branch] = size;
      const int64_t side = 2 * p.kernel_size[branch] - 1;
      size += round_up<T>(side * side) + Simd<T>::lanes;
    }
    keys_size = size;
  }
};

/// One of `strips` parts of the map, of whole lines.
struct Strip {
  int64_t begin, end;  ///< lines

  Strip(const ContMixParams& p, int64_t strips, int64_t strip)
      : begin(strip * p.height / strips), end((strip + 1) * p.height / strips) {}

  /// First line that the windows of its positions hold, and the one after the last.
  int64_t first_held(const ContMixParams& p, int branch) const {
    return window_start(begin, p.height, p.kernel_size[branch]);
  }
  int64_t end_held(const ContMixParams& p, int branch) const {
    return window_start(end - 1, p.height, p.kernel_size[branch]) + p.kernel_size[branch];
  }
  /// Lines that the windows of a strip's positions hold, at most.
  static int64_t most_held(const ContMixParams& p, int64_t strips, int branch) {
    return min((p.height + strips - 1) / strips + p.kernel_size[branch] - 1, p.height);
  }
};

template <typename T>
inline int64_t strip_size(const ContMixParams& p, const Layout<T>& layout) {
  return (Strip::most_held(p, p.partials, 0) + Strip::most_held(p, p.partials, 1)) * p.width * layout.channels;
}

template <typename T>
void workspace_sizes(const ContMixParams& p, bool backward, int64_t* keys, int64_t* grad_value) {
  const Layout<T> layout(p, backward);
  *keys = p.batch * p.groups * layout.keys_size;
  *grad_value = backward && p.grad_value.data ? p.batch * p.groups * p.partials * strip_size<T>(p, layout) : 0;
}

/// A bias of logits in base 2. A finite one stays finite: the lowest float, which users mask with, is no -inf.
template <typename T>
inline T in_base_2(T bias) {
  const T scaled = bias * T(kLog2E);
  if (scaled - scaled == T(0) || bias - bias != T(0)) return scaled;
  return bias > T(0) ? Simd<T>::largest : -Simd<T>::largest;
}

template <typename T>
void pack_keys(const ContMixParams& p, const ContMixWorkspace<T>& workspace, bool backward, int64_t begin,
               int64_t end) {
  const Layout<T> layout(p, backward);
  const int64_t d = p.query_channels;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item % p.groups;
    T* packed = workspace.keys + item * layout.keys_size;
    const T* keys = const_data<T>(p.keys) + item * p.slots() * d;
    for (int64_t i = 0; i < layout.keys_size; ++i) packed[i] = T(0);
    int64_t first = 0;
    for (int branch = 0; branch < 2; ++branch) {
      const int64_t slots = layout.slots[branch];
      for (int64_t slot = 0; slot < slots; ++slot) {
        const T* key = keys + (first + slot) * d;
        T* column = packed + layout.columns + layout.offset[branch] + slot;
        for (int64_t i = 0; i < d; ++i) column[i * layout.all_slots] = key[i] * T(kLog2E);
        if (backward) {
          T* row = packed + layout.rows + (layout.offset[branch] + slot) * layout.query_channels;
          for (int64_t i = 0; i < d; ++i) row[i] = key[i];
        }
        if (p.bias) packed[layout.bias[branch] + slot] = in_base_2(const_data<T>(p.bias)[first + slot]);
      }
      if (p.rpb[branch]) {
        const int64_t side = 2 * p.kernel_size[branch] - 1;
        const T* rpb = const_data<T>(p.rpb[branch]) + group * side * side;
        for (int64_t i = 0; i < side * side; ++i) packed[layout.rpb[branch] + i] = in_base_2(rpb[i]);
      }
      first += slots;
    }
  }
}

/// First element of a group of a map's line.
template <typename T>
inline T* line(const Map& map, int64_t image, int64_t channel, int64_t y) {
  return static_cast<T*>(map.data) + image * map.batch_stride + channel * map.channel_stride + y * map.row_stride;
}

/// Positions (n, padded channels) of a line from a map, with zeros in the padding.
template <typename T>
OVERLOCK_MM_NOINLINE void read_positions(const Map& map, const T* from, int64_t n, int64_t channels, int64_t padded,
                                         T* to) {
  constexpr int lanes = Simd<T>::lanes;
  int64_t x = 0;
  if (map.column_stride == 1 && padded % lanes == 0) {
    for (; x + lanes <= n; x += lanes) {
      for (int64_t c = 0; c < padded; c += lanes) {
        Vector<T> rows[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          rows[i] = c + i < channels ? load(from + (c + i) * map.channel_stride + x) : Vector<T>{};
        }
        transpose_square<T>(rows);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) store(to + (x + i) * padded + c, rows[i]);
      }
    }
  }
  for (; x < n; ++x) {
    for (int64_t c = 0; c < channels; ++c) to[x * padded + c] = from[c * map.channel_stride + x * map.column_stride];
    for (int64_t c = channels; c < padded; ++c) to[x * padded + c] = T(0);
  }
}

template <typename T>
OVERLOCK_MM_NOINLINE void write_positions(const Map& map, T* to, int64_t n, int64_t channels, int64_t padded,
                                          const T* from) {
  constexpr int lanes = Simd<T>::lanes;
  int64_t x = 0;
  if (map.column_stride == 1) {
    for (; x + lanes <= n; x += lanes) {
      for (int64_t c = 0; c < channels; c += lanes) {
        Vector<T> rows[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) rows[i] = load(from + (x + i) * padded + c);
        transpose_square<T>(rows);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          if (c + i < channels) store(to + (c + i) * map.channel_stride + x, rows[i]);
        }
      }
    }
  }
  for (; x < n; ++x) {
    for (int64_t c = 0; c < channels; ++c) to[c * map.channel_stride + x * map.column_stride] = from[x * padded + c];
  }
}

/// Sums over the channels of the products of two maps, for n positions of a line.
template <typename T>
OVERLOCK_MM_NOINLINE void channel_products(const Map& first_map, const T* first, const Map& second_map, const T* second,
                                           int64_t n, int64_t channels, T* sums) {
  constexpr int lanes = Simd<T>::lanes;
  int64_t t = 0;
  if (first_map.column_stride == 1 && second_map.column_stride == 1) {
    for (; t + lanes <= n; t += lanes) {
      Vector<T> sum = {};
      for (int64_t c = 0; c < channels; ++c) {
        sum += load(first + c * first_map.channel_stride + t) * load(second + c * second_map.channel_stride + t);
      }
      store(sums + t, sum);
    }
  }
  for (; t < n; ++t) {
    T sum = 0;
    for (int64_t c = 0; c < channels; ++c) {
      sum += first[c * first_map.channel_stride + t * first_map.column_stride] *
             second[c * second_map.channel_stride + t * second_map.column_stride];
    }
    sums[t] = sum;
  }
}

/// Lines of a group of the value: (lines, W, padded channels), a position's channels side by side.
template <typename T>
void pack_value(const ContMixParams& p, int64_t image, int64_t channel, int64_t begin, int64_t end, int64_t padded,
                T* to) {
  for (int64_t y = begin; y < end; ++y, to += p.width * padded) {
    read_positions(p.value, line<T>(p.value, image, channel, y), p.width, p.channels, padded, to);
  }
}

/// The same as (channels, lines, W). What is read beyond the last, in whole vectors, is 0.
template <typename T>
void pack_value_by_channel(const ContMixParams& p, int64_t image, int64_t channel, int64_t begin, int64_t end, T* to) {
  for (int64_t c = 0; c < p.channels; ++c) {
    for (int64_t y = begin; y < end; ++y) {
      const T* from = line<T>(p.value, image, channel + c, y);
      for (int64_t x = 0; x < p.width; ++x) *to++ = from[x * p.value.column_stride];
    }
  }
  for (int64_t i = 0; i < 2 * Simd<T>::lanes; ++i) *to++ = T(0);
}

/// Slots' biases by their offset from the position, for a line of the map.
///
/// The window of position x starts `start - x + k - 1` entries into a row of relative position biases: k values at
/// most, one inside the map. For each there is a table of all the branch's slots, which the logits start from. In the
/// backward tables of the same form take up the gradients of the logits.
template <typename T>
class BiasTables {
 public:
  static int64_t size(const ContMixParams& p, const Layout<T>& layout) {
    return p.kernel_size[0] * stride(layout, 0) + p.kernel_size[1] * stride(layout, 1);
  }

  BiasTables(const ContMixParams& p, const Layout<T>& layout, T* memory) : p_(p), layout_(layout) {
    tables_[0] = memory;
    tables_[1] = memory + p.kernel_size[0] * stride(layout, 0);
  }

  T* table(int branch, int64_t x) const {
    return tables_[branch] + entry(p_.width, branch, x) * stride(layout_, branch);
  }

  /// Whether the tables of line y differ from those of the line before it.
  bool differs_from_line_before(int64_t y) const {
    for (int branch = 0; branch < 2; ++branch) {
      if (entry(p_.height, branch, y) != entry(p_.height, branch, y - 1)) return true;
    }
    return false;
  }

  void fill(const T* packed_keys, int64_t y) const {
    for (int branch = 0; branch < 2; ++branch) {
      const int64_t k = p_.kernel_size[branch], side = 2 * k - 1;
      const T* bias = packed_keys + layout_.bias[branch];
      const T* rpb = packed_keys + layout_.rpb[branch] + entry(p_.height, branch, y) * side;
      // Not every entry occurs on a map narrower than twice the kernel; the others cost little.
      for (int64_t first = 0; first < k; ++first) {
        T* table = tables_[branch] + first * stride(layout_, branch);
        for (int64_t i = 0; i < k; ++i) {
          // Whole vectors: what goes too far is overwritten by the next row, or is padding.
          for (int64_t j = 0; j < k; j += Simd<T>::lanes) {
            store(table + i * k + j, load(bias + i * k + j) + load(rpb + i * side + first + j));
          }
        }
        for (int64_t slot = layout_.slots[branch]; slot < layout_.padded_slots[branch]; ++slot) {
          table[slot] = -__builtin_huge_val();
        }
      }
    }
  }

  void clear() const {
    for (int64_t i = 0, n = size(p_, layout_); i < n; ++i) tables_[0][i] = T(0);
  }

  /// Add the tables of line y to the gradients by slot (L) and by offset (2k - 1, 2k - 1), and clear them.
  void take_gradients(int64_t y, T* grad_bias, T* const grad_rpb[2]) const {
    int64_t first_slot = 0;
    for (int branch = 0; branch < 2; ++branch) {
      const int64_t k = p_.kernel_size[branch], side = 2 * k - 1;
      T* rpb = grad_rpb[branch] + entry(p_.height, branch, y) * side;
      for (int64_t first = 0; first < k; ++first) {
        const T* table = tables_[branch] + first * stride(layout_, branch);
        for (int64_t i = 0; i < k; ++i) {
          for (int64_t j = 0; j < k; ++j) rpb[i * side + first + j] += table[i * k + j];
        }
        for (int64_t slot = 0; slot < k * k; ++slot) grad_bias[first_slot + slot] += table[slot];
      }
      first_slot += k * k;
    }
    clear();
  }

 private:
  static int64_t stride(const Layout<T>& layout, int branch) { return layout.padded_slots[branch] + Simd<T>::lanes; }

  int64_t entry(int64_t size, int branch, int64_t position) const {
    const int64_t k = p_.kernel_size[branch];
    return window_start(position, size, k) - position + k - 1;
  }

  const ContMixParams& p_;
  const Layout<T>& layout_;
  T* tables_[2];
};

/// Logits of n_positions x n_vectors * lanes slots, in base 2: z = M q + bias.
template <typename T, int n_positions, int n_vectors>
OVERLOCK_MM_NOINLINE void logits_tile(const T* const* bias, int64_t first, const T* keys, int64_t keys_stride,
                                      const T* query, int64_t query_stride, int64_t query_channels, T* z,
                                      int64_t z_stride) {
  constexpr int lanes = Simd<T>::lanes;
  Vector<T> sums[n_positions][n_vectors];
#pragma GCC unroll 8
  for (int t = 0; t < n_positions; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < n_vectors; ++v) sums[t][v] = load(bias[t] + first + v * lanes);
  }
  for (int64_t i = 0; i < query_channels; ++i) {
    Vector<T> key[n_vectors];
#pragma GCC unroll 8
    for (int v = 0; v < n_vectors; ++v) key[v] = load(keys + i * keys_stride + first + v * lanes);
#pragma GCC unroll 8
    for (int t = 0; t < n_positions; ++t) {
      const T q = query[t * query_stride + i];
#pragma GCC unroll 8
      for (int v = 0; v < n_vectors; ++v) sums[t][v] += key[v] * q;
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < n_positions; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < n_vectors; ++v) store(z + t * z_stride + first + v * lanes, sums[t][v]);
  }
}

template <typename T, int n_positions>
inline void logits_of_positions(const T* const* bias, int64_t slots, const T* keys, int64_t keys_stride, const T* query,
                                int64_t query_stride, int64_t query_channels, T* z, int64_t z_stride) {
  constexpr int lanes = Simd<T>::lanes;
  int64_t slot = 0;
  for (; slot + kVectors * lanes <= slots; slot += kVectors * lanes) {
    logits_tile<T, n_positions, kVectors>(bias, slot, keys, keys_stride, query, query_stride, query_channels, z,
                                          z_stride);
  }
  switch ((slots - slot) / lanes) {
    case 3:
      logits_tile<T, n_positions, 3>(bias, slot, keys, keys_stride, query, query_stride, query_channels, z, z_stride);
      break;
    case 2:
      logits_tile<T, n_positions, 2>(bias, slot, keys, keys_stride, query, query_stride, query_channels, z, z_stride);
      break;
    case 1:
      logits_tile<T, n_positions, 1>(bias, slot, keys, keys_stride, query, query_stride, query_channels, z, z_stride);
      break;
    default:
      break;
  }
}

/// Logits of a branch for n positions from x on: (n, padded slots) in z.
template <typename T>
void logits(const ContMixParams& p, const Layout<T>& layout, const BiasTables<T>& tables, int branch, int64_t x,
            int64_t n, const T* packed_keys, const T* query, int64_t query_stride, T* z, int64_t z_stride) {
  const T* keys = packed_keys + layout.columns + layout.offset[branch];
  int64_t t = 0;
  while (t < n) {
    const T* bias[kTile];
    const int64_t tile = n - t >= kTile ? kTile : 1;
    for (int64_t i = 0; i < tile; ++i) bias[i] = tables.table(branch, x + t + i);
    if (tile == kTile) {
      logits_of_positions<T, kTile>(bias, layout.padded_slots[branch], keys, layout.all_slots, query + t * query_stride,
                                    query_stride, p.query_channels, z + t * z_stride, z_stride);
    } else {
      logits_of_positions<T, 1>(bias, layout.padded_slots[branch], keys, layout.all_slots, query + t * query_stride,
                                query_stride, p.query_channels, z + t * z_stride, z_stride);
    }
    t += tile;
  }
}

/// Neighbouring positions whose windows along the line move with them, or stand still.
struct Run {
  int64_t length;
  bool sliding;
};

/// The longest run from x on of one of the lengths 8, 4, 2 and 1, at most `most` and `n`.
inline Run run_from(int64_t x, int64_t n, int64_t width, int64_t k, int most) {
  const int64_t start = window_start(x, width, k);
  for (int64_t length = most; length > 1; length /= 2) {
    if (length > n || length > k) continue;
    const int64_t moved = window_start(x + length - 1, width, k) - start;
    if (moved == length - 1) return {length, true};
    if (moved == 0) return {length, false};
  }
  return {1, false};
}

template <int v>
struct Constant {
  static constexpr int value = v;
};

/// Call `function` with a run's length and whether it slides, as constants.
template <typename Function>
OVERLOCK_MM_INLINE void with_constants(Run run, Function function) {
  switch (run.length) {
    case 8:
      return run.sliding ? function(Constant<8>{}, Constant<true>{}) : function(Constant<8>{}, Constant<false>{});
    case 4:
      return run.sliding ? function(Constant<4>{}, Constant<true>{}) : function(Constant<4>{}, Constant<false>{});
    case 2:
      return run.sliding ? function(Constant<2>{}, Constant<true>{}) : function(Constant<2>{}, Constant<false>{});
    default:
      return function(Constant<1>{}, Constant<false>{});
  }
}

/// For every column of a line that the windows of n neighbouring positions hold: `at_column(u)`, then
/// `at_position(t, slot)` for every position t that holds it. Column u of sliding windows is slot u - t of position t.
/// t is a constant after inlining, so that what it indexes stays in registers.
template <int n, bool sliding, typename AtColumn, typename AtPosition>
OVERLOCK_MM_INLINE void for_columns(int64_t k, AtColumn at_column, AtPosition at_position) {
  if constexpr (sliding) {
#pragma GCC unroll 8
    for (int u = 0; u < n - 1; ++u) {
      at_column(u);
#pragma GCC unroll 8
      for (int t = 0; t <= u; ++t) at_position(t, u - t);
    }
    for (int64_t u = n - 1; u < k; ++u) {
      at_column(u);
#pragma GCC unroll 8
      for (int t = 0; t < n; ++t) at_position(t, u - t);
    }
#pragma GCC unroll 8
    for (int beyond = 1; beyond < n; ++beyond) {
      at_column(k - 1 + beyond);
#pragma GCC unroll 8
      for (int t = beyond; t < n; ++t) at_position(t, k - 1 + beyond - t);
    }
  } else {
    for (int64_t u = 0; u < k; ++u) {
      at_column(u);
#pragma GCC unroll 8
      for (int t = 0; t < n; ++t) at_position(t, u);
    }
  }
}

/// Sums of n positions' windows under their kernels: out (n, padded channels). `value` is the first of the window's.
template <typename T, int n, int n_vectors, bool sliding>
OVERLOCK_MM_NOINLINE void sum_windows(int64_t k, const T* weights, int64_t weights_stride, const T* value,
                                      int64_t row_stride, int64_t column_stride, T* out, int64_t out_stride) {
  constexpr int lanes = Simd<T>::lanes;
  Vector<T> sums[n][n_vectors] = {};
  for (int64_t i = 0; i < k; ++i) {
    const T* row = value + i * row_stride;
    const T* row_weights = weights + i * k;
    Vector<T> v[n_vectors];
    for_columns<n, sliding>(
        k,
        [&](int64_t u) OVERLOCK_MM_INLINE_LAMBDA {
#pragma GCC unroll 2
          for (int j = 0; j < n_vectors; ++j) v[j] = load(row + u * column_stride + j * lanes);
        },
        [&](int t, int64_t slot) OVERLOCK_MM_INLINE_LAMBDA {
          const T weight = row_weights[t * weights_stride + slot];
#pragma GCC unroll 2
          for (int j = 0; j < n_vectors; ++j) sums[t][j] += v[j] * weight;
        });
  }
#pragma GCC unroll 8
  for (int t = 0; t < n; ++t) {
#pragma GCC unroll 2
    for (int j = 0; j < n_vectors; ++j) store(out + t * out_stride + j * lanes, sums[t][j]);
  }
}

/// The way back: add n positions' gradients (n, padded channels), each under its kernel, to the windows they came from.
template <typename T, int n, int n_vectors, bool sliding>
OVERLOCK_MM_NOINLINE void spread_to_windows(int64_t k, const T* weights, int64_t weights_stride, const T* grad,
                                            int64_t grad_stride, T* grad_value, int64_t row_stride,
                                            int64_t column_stride) {
  constexpr int lanes = Simd<T>::lanes;
  Vector<T> g[n][n_vectors];
#pragma GCC unroll 8
  for (int t = 0; t < n; ++t) {
#pragma GCC unroll 2
    for (int j = 0; j < n_vectors; ++j) g[t][j] = load(grad + t * grad_stride + j * lanes);
  }
  for (int64_t i = 0; i < k; ++i) {
    T* row = grad_value + i * row_stride;
    const T* row_weights = weights + i * k;
    // A column's sum is stored when the next one begins.
    Vector<T> sum[n_vectors];
    T* column = nullptr;
    const auto finish = [&]() OVERLOCK_MM_INLINE_LAMBDA {
#pragma GCC unroll 2
      for (int j = 0; j < n_vectors; ++j) store(column + j * lanes, sum[j]);
    };
    for_columns<n, sliding>(
        k,
        [&](int64_t u) OVERLOCK_MM_INLINE_LAMBDA {
          if (u > 0) finish();
          column = row + u * column_stride;
#pragma GCC unroll 2
          for (int j = 0; j < n_vectors; ++j) sum[j] = load(column + j * lanes);
        },
        [&](int t, int64_t slot) OVERLOCK_MM_INLINE_LAMBDA {
          const T weight = row_weights[t * weights_stride + slot];
#pragma GCC unroll 2
          for (int j = 0; j < n_vectors; ++j) sum[j] += g[t][j] * weight;
        });
    finish();
  }
}

/// Store what was summed for the columns that n windows hold together as the slots of position t, and of those after
/// it. Whole vectors are stored: what goes too far belongs to the next row, or is beyond the slots.
template <typename T, int t, int n, int n_rows, int n_vectors, bool sliding>
OVERLOCK_MM_INLINE void store_from_windows(int64_t k, const Vector<T> (&sums)[n][n_rows][n_vectors], T* out,
                                           int64_t out_stride) {
  constexpr int lanes = Simd<T>::lanes;
  constexpr int skipped = sliding ? t / lanes : 0, first_lane = sliding ? t % lanes : 0;
#pragma GCC unroll 4
  for (int i = 0; i < n_rows; ++i) {
#pragma GCC unroll 4
    for (int j = skipped; j < n_vectors; ++j) {
      if ((j - skipped) * lanes >= k) break;
      const Vector<T>& next = sums[t][i][j + 1 < n_vectors ? j + 1 : j];
      store(out + t * out_stride + i * k + (j - skipped) * lanes, lanes_from<first_lane, T>(sums[t][i][j], next));
    }
  }
  if constexpr (t + 1 < n) store_from_windows<T, t + 1, n, n_rows, n_vectors, sliding>(k, sums, out, out_stride);
}

/// Gradients of the weights of n positions, (n, padded slots): the product of each position's gradient with the values
/// in its window. `value` is (channels, H, W), at the window's first row and column.
template <typename T, int n, int n_rows, int n_vectors, bool sliding>
OVERLOCK_MM_INLINE void weight_gradients_of_rows(int64_t k, int64_t first_column, const T* grad, int64_t grad_stride,
                                                 int64_t channels, const T* value, int64_t channel_stride,
                                                 int64_t row_stride, T* out, int64_t out_stride) {
  constexpr int lanes = Simd<T>::lanes;
  Vector<T> sums[n][n_rows][n_vectors] = {};
  for (int64_t c = 0; c < channels; ++c) {
    Vector<T> v[n_rows][n_vectors];
#pragma GCC unroll 4
    for (int i = 0; i < n_rows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < n_vectors; ++j) {
        v[i][j] = load(value + c * channel_stride + i * row_stride + first_column + j * lanes);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < n; ++t) {
      const T g = grad[t * grad_stride + c];
#pragma GCC unroll 4
      for (int i = 0; i < n_rows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < n_vectors; ++j) sums[t][i][j] += v[i][j] * g;
      }
    }
  }
  store_from_windows<T, 0, n, n_rows, n_vectors, sliding>(k, sums, out, out_stride);
}

/// n positions of a run; all rows of their windows.
template <typename T, int n, int n_rows, int n_vectors, bool sliding>
OVERLOCK_MM_NOINLINE void weight_gradients(int64_t k, int64_t first_column, const T* grad, int64_t grad_stride,
                                           int64_t channels, const T* value, int64_t channel_stride, int64_t row_stride,
                                           T* out, int64_t out_stride) {
  int64_t i = 0;
  for (; i + n_rows <= k; i += n_rows) {
    weight_gradients_of_rows<T, n, n_rows, n_vectors, sliding>(k, first_column, grad, grad_stride, channels,
                                                               value + i * row_stride, channel_stride, row_stride,
                                                               out + i * k, out_stride);
  }
  for (; i < k; ++i) {
    weight_gradients_of_rows<T, n, 1, n_vectors, sliding>(k, first_column, grad, grad_stride, channels,
                                                          value + i * row_stride, channel_stride, row_stride,
                                                          out + i * k, out_stride);
  }
}

/// out[j] += sum over i of factors[j, i] * rows[i], for n rows of a vector.
template <typename T, int n>
OVERLOCK_MM_NOINLINE void add_product(int64_t terms, const T* factors, int64_t factors_stride, int64_t terms_stride,
                                      const T* rows, int64_t rows_stride, T* out, int64_t out_stride) {
  Vector<T> sums[n];
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) sums[j] = load(out + j * out_stride);
  for (int64_t i = 0; i < terms; ++i) {
    const Vector<T> row = load(rows + i * rows_stride);
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) sums[j] += row * factors[j * factors_stride + i * terms_stride];
  }
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) store(out + j * out_stride, sums[j]);
}

/// z of n positions to 2^(z - its maximum) in place, with the maxima and the sums. Positions take turns at every step:
/// one alone would wait for its own results.
template <typename T, int n>
OVERLOCK_MM_NOINLINE void exponentials(T* z, int64_t z_stride, int64_t slots, T* maxima, T* sums) {
  constexpr int lanes = Simd<T>::lanes;
  Vector<T> largest[n];
#pragma GCC unroll 8
  for (int t = 0; t < n; ++t) largest[t] = load(z + t * z_stride);
  for (int64_t slot = lanes; slot < slots; slot += lanes) {
#pragma GCC unroll 8
    for (int t = 0; t < n; ++t) largest[t] = Largest{}(load(z + t * z_stride + slot), largest[t]);
  }
  Vector<T> sum[n];
#pragma GCC unroll 8
  for (int t = 0; t < n; ++t) {
    maxima[t] = reduce_lanes<Largest, T>(largest[t]);
    largest[t] = Vector<T>{} + maxima[t];
    sum[t] = Vector<T>{};
  }
  for (int64_t slot = 0; slot < slots; slot += lanes) {
#pragma GCC unroll 8
    for (int t = 0; t < n; ++t) {
      const Vector<T> weight = exp2<T>(load(z + t * z_stride + slot) - largest[t]);
      sum[t] += weight;
      store(z + t * z_stride + slot, weight);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < n; ++t) sums[t] = reduce_lanes<Add, T>(sum[t]);
}

template <typename T>
void forward(const ContMixParams& p, const ContMixWorkspace<T>& workspace, int64_t strips, int64_t begin, int64_t end) {
  constexpr int lanes = Simd<T>::lanes;
  const Layout<T> layout(p, false);
  const int64_t d = p.query_channels, cp = layout.channels, row_stride = p.width * cp;
  const int64_t tables_size = round_up<T>(BiasTables<T>::size(p, layout));
  const int64_t value_sizes[2] = {Strip::most_held(p, strips, 0) * row_stride,
                                  Strip::most_held(p, strips, 1) * row_stride};
  Scratch<T> scratch(tables_size + kChunk * (layout.all_slots + cp) + round_up<T>(kChunk * d) + value_sizes[0] +
                     value_sizes[1]);
  const BiasTables<T> tables(p, layout, scratch.take(tables_size));
  T* const weights = scratch.take(kChunk * layout.all_slots);
  T* const mixed = scratch.take(kChunk * cp);
  T* const query = scratch.take(round_up<T>(kChunk * d));
  T* const values[2] = {scratch.take(value_sizes[0]), scratch.take(value_sizes[1])};

  for (int64_t item = begin; item < end; ++item) {
    const int64_t image_and_group = item / strips;
    const int64_t image = image_and_group / p.groups, group = image_and_group % p.groups;
    const Strip strip(p, strips, item % strips);
    const T* keys = workspace.keys + image_and_group * layout.keys_size;
    for (int branch = 0; branch < 2; ++branch) {
      const int64_t channel = (branch * p.groups + group) * p.channels;
      pack_value(p, image, channel, strip.first_held(p, branch), strip.end_held(p, branch), cp, values[branch]);
    }

    for (int64_t y = strip.begin; y < strip.end; ++y) {
      if (y == strip.begin || tables.differs_from_line_before(y)) tables.fill(keys, y);
      for (int64_t x = 0; x < p.width; x += kChunk) {
        const int64_t n = min(kChunk, p.width - x);
        const T* from = line<T>(p.query, image, group * d, y) + x * p.query.column_stride;
        read_positions(p.query, from, n, d, d, query);
        for (int branch = 0; branch < 2; ++branch) {
          const int64_t k = p.kernel_size[branch], slots = layout.padded_slots[branch];
          const int64_t branch_and_group = (image * 2 + branch) * p.groups + group;
          T* const z = weights + layout.offset[branch];
          logits(p, layout, tables, branch, x, n, keys, query, d, z, layout.all_slots);

          T maxima[kChunk], sums[kChunk];
          constexpr int together = kVectorBytes == 64 ? 4 : 2;
          int64_t done = 0;
          for (; done + together <= n; done += together) {
            exponentials<T, together>(z + done * layout.all_slots, layout.all_slots, slots, maxima + done, sums + done);
          }
          for (; done < n; ++done) {
            exponentials<T, 1>(z + done * layout.all_slots, layout.all_slots, slots, maxima + done, sums + done);
          }
          T* logsumexp = static_cast<T*>(p.logsumexp) + (branch_and_group * p.height + y) * p.width + x;
          for (int64_t t = 0; t < n; ++t) logsumexp[t] = maxima[t] + std::log2(sums[t]);

          const T* window_line =
              values[branch] + (window_start(y, p.height, k) - strip.first_held(p, branch)) * row_stride;
          const auto sum_channels = [&](int64_t c, auto n_vectors) {
            for (int64_t t = 0; t < n;) {
              const Run run = run_from(x + t, n - t, p.width, k, 8 / n_vectors.value);
              const T* window = window_line + window_start(x + t, p.width, k) * cp + c;
              with_constants(run, [&](auto length, auto sliding) {
                sum_windows<T, length.value, n_vectors.value, sliding.value>(
                    k, z + t * layout.all_slots, layout.all_slots, window, row_stride, cp, mixed + t * cp + c, cp);
              });
              t += run.length;
            }
          };
          int64_t c = 0;
          for (; c + 2 * lanes <= cp; c += 2 * lanes) sum_channels(c, Constant<2>{});
          if (c < cp) sum_channels(c, Constant<1>{});

          for (int64_t t = 0; t < n; ++t) {
            const T scale = T(1) / sums[t];
            for (int64_t i = 0; i < cp; ++i) mixed[t * cp + i] *= scale;
          }
          T* to = line<T>(p.output, image, (branch * p.groups + group) * p.channels, y) + x * p.output.column_stride;
          write_positions(p.output, to, n, p.channels, cp, mixed);
        }
      }
    }
  }
}

template <typename T>
void backward(const ContMixParams& p, const ContMixWorkspace<T>& workspace, int64_t begin, int64_t end) {
  constexpr int lanes = Simd<T>::lanes;
  const Layout<T> layout(p, true);
  const int64_t d = p.query_channels, dp = layout.query_channels, cp = layout.channels;
  const int64_t tables_size = round_up<T>(BiasTables<T>::size(p, layout));
  const int64_t row_size = layout.all_slots + 3 * lanes;  // whole vectors are stored from any slot on
  const bool wants_keys = p.grad_keys, wants_value = p.grad_value.data;
  const bool wants_biases = p.grad_bias || p.grad_rpb[0] || p.grad_rpb[1];
  int64_t sides[2];
  for (int branch = 0; branch < 2; ++branch) sides[branch] = 2 * p.kernel_size[branch] - 1;
  const int64_t rpb_size = sides[0] * sides[0] + sides[1] * sides[1];
  int64_t value_sizes[2];
  for (int branch = 0; branch < 2; ++branch) {
    value_sizes[branch] = round_up<T>(p.channels * Strip::most_held(p, p.partials, branch) * p.width) + 2 * lanes;
  }
  Scratch<T> scratch(2 * tables_size + kChunk * (layout.all_slots + row_size + cp + 2 * dp) + layout.all_slots * dp +
                     round_up<T>(p.slots() + rpb_size) + value_sizes[0] + value_sizes[1]);
  const BiasTables<T> tables(p, layout, scratch.take(tables_size));
  const BiasTables<T> table_gradients(p, layout, scratch.take(tables_size));
  T* const weights = scratch.take(kChunk * layout.all_slots);
  T* const logit_gradients = scratch.take(kChunk * row_size);
  T* const grad_output = scratch.take(kChunk * cp);
  T* const query = scratch.take(kChunk * dp);
  T* const grad_query = scratch.take(kChunk * dp);
  T* const grad_keys = scratch.take(layout.all_slots * dp);
  T* const grad_bias = scratch.take(round_up<T>(p.slots() + rpb_size));
  T* const grad_rpb[2] = {grad_bias + p.slots(), grad_bias + p.slots() + sides[0] * sides[0]};
  T* const values[2] = {scratch.take(value_sizes[0]), scratch.take(value_sizes[1])};

  for (int64_t item = begin; item < end; ++item) {
    const int64_t image_and_group = item / p.partials;
    const int64_t image = image_and_group / p.groups, group = image_and_group % p.groups;
    const Strip strip(p, p.partials, item % p.partials);
    const T* keys = workspace.keys + image_and_group * layout.keys_size;
    for (int branch = 0; branch < 2; ++branch) {
      const int64_t channel = (branch * p.groups + group) * p.channels;
      pack_value_by_channel(p, image, channel, strip.first_held(p, branch), strip.end_held(p, branch), values[branch]);
    }
    T* const grad_values = workspace.grad_value + item * strip_size<T>(p, layout);
    if (wants_value) {
      for (int64_t i = 0; i < strip_size<T>(p, layout); ++i) grad_values[i] = T(0);
    }
    for (int64_t i = 0; i < layout.all_slots * dp; ++i) grad_keys[i] = T(0);
    for (int64_t i = 0; i < p.slots() + rpb_size; ++i) grad_bias[i] = T(0);
    table_gradients.clear();

    for (int64_t y = strip.begin; y < strip.end; ++y) {
      if (y == strip.begin || tables.differs_from_line_before(y)) {
        if (y > strip.begin && wants_biases) table_gradients.take_gradients(y - 1, grad_bias, grad_rpb);
        tables.fill(keys, y);
      }
      for (int64_t x = 0; x < p.width; x += kChunk) {
        const int64_t n = min(kChunk, p.width - x);
        const T* from = line<T>(p.query, image, group * d, y) + x * p.query.column_stride;
        read_positions(p.query, from, n, d, dp, query);
        for (int64_t i = 0; i < n * dp; ++i) grad_query[i] = T(0);

        for (int branch = 0; branch < 2; ++branch) {
          const int64_t k = p.kernel_size[branch], slots = layout.padded_slots[branch],
                        first_slot = layout.offset[branch];
          const int64_t branch_and_group = (image * 2 + branch) * p.groups + group;
          const int64_t channel = (branch * p.groups + group) * p.channels;
          const T* grad_from = line<T>(p.grad_output, image, channel, y) + x * p.grad_output.column_stride;
          read_positions(p.grad_output, grad_from, n, p.channels, cp, grad_output);

          T products[kChunk];  // D: the gradient times the output
          const T* output = line<T>(p.output, image, channel, y) + x * p.output.column_stride;
          channel_products(p.grad_output, grad_from, p.output, output, n, p.channels, products);

          // P, from the logits once more.
          T* const z = weights + first_slot;
          logits(p, layout, tables, branch, x, n, keys, query, dp, z, layout.all_slots);
          const T* logsumexp = const_data<T>(p.logsumexp) + (branch_and_group * p.height + y) * p.width + x;
          for (int64_t t = 0; t < n; ++t) {
            T* const row = z + t * layout.all_slots;
            for (int64_t slot = 0; slot < slots; slot += lanes)
              store(row + slot, exp2<T>(load(row + slot) - logsumexp[t]));
          }

          if (wants_value) {
            T* const held = grad_values + (branch ? Strip::most_held(p, p.partials, 0) * p.width * cp : 0);
            const int64_t held_line = window_start(y, p.height, k) - strip.first_held(p, branch);
            T* const window_line = held + held_line * p.width * cp;
            const auto spread_channels = [&](int64_t c, auto n_vectors) {
              for (int64_t t = 0; t < n;) {
                const Run run = run_from(x + t, n - t, p.width, k, 8 / n_vectors.value);
                T* window = window_line + window_start(x + t, p.width, k) * cp + c;
                with_constants(run, [&](auto length, auto sliding) {
                  spread_to_windows<T, length.value, n_vectors.value, sliding.value>(
                      k, z + t * layout.all_slots, layout.all_slots, grad_output + t * cp + c, cp, window, p.width * cp,
                      cp);
                });
                t += run.length;
              }
            };
            int64_t c = 0;
            for (; c + 2 * lanes <= cp; c += 2 * lanes) spread_channels(c, Constant<2>{});
            if (c < cp) spread_channels(c, Constant<1>{});
          }
          if (!wants_keys && !wants_biases && !p.grad_query.data) continue;

          // dP, then dZ = P (dP - D) in its place.
          T* const dz = logit_gradients + first_slot;
          const int64_t plane = (strip.end_held(p, branch) - strip.first_held(p, branch)) * p.width;
          const T* value = values[branch] + (window_start(y, p.height, k) - strip.first_held(p, branch)) * p.width;
          for (int64_t t = 0; t < n;) {
            const Run run = run_from(x + t, n - t, p.width, k, kTile);
            const int64_t columns = run.sliding ? k + run.length - 1 : k;
            const int64_t n_vectors = (columns + lanes - 1) / lanes;
            const int64_t start = window_start(x + t, p.width, k);
            T* const out = dz + t * row_size;
            if (n_vectors <= 4) {
              with_constants(run, [&](auto length, auto sliding) {
                const auto of_vectors = [&](auto vectors, auto rows) {
                  weight_gradients<T, length.value, rows.value, vectors.value, sliding.value>(
                      k, start, grad_output + t * cp, cp, p.channels, value, plane, p.width, out, row_size);
                };
                switch (n_vectors) {
                  case 1:
                    return of_vectors(Constant<1>{}, Constant < kVectorBytes == 64 ? 4 : 2 > {});
                  case 2:
                    return of_vectors(Constant<2>{}, Constant<1>{});
                  case 3:
                    return of_vectors(Constant<3>{}, Constant<1>{});
                  default:
                    return of_vectors(Constant<4>{}, Constant<1>{});
                }
              });
            } else {  // a kernel too wide for the registers: position by position, vector by vector
              for (int64_t i = 0; i < run.length; ++i) {
                for (int64_t row = 0; row < k; ++row) {
                  for (int64_t j = 0; j < k; j += lanes) {
                    weight_gradients_of_rows<T, 1, 1, 1, false>(
                        lanes, window_start(x + t + i, p.width, k) + j, grad_output + (t + i) * cp, cp, p.channels,
                        value + row * p.width, plane, p.width, out + i * row_size + row * k + j, row_size);
                  }
                }
              }
            }
            t += run.length;
          }
          for (int64_t t = 0; t < n; ++t) {
            T* const row = dz + t * row_size;
            const T* weight = z + t * layout.all_slots;
            for (int64_t slot = layout.slots[branch]; slot < slots; ++slot) row[slot] = T(0);
            for (int64_t slot = 0; slot < slots; slot += lanes) {
              store(row + slot, load(weight + slot) * (load(row + slot) - products[t]));
            }
            if (wants_biases) {
              T* const table = table_gradients.table(branch, x + t);
              for (int64_t slot = 0; slot < slots; slot += lanes)
                store(table + slot, load(table + slot) + load(row + slot));
            }
          }

          if (p.grad_query.data) {
            const T* rows = keys + layout.rows + first_slot * dp;
            for (int64_t c = 0; c < dp; c += lanes) {
              int64_t t = 0;
              for (; t + 8 <= n; t += 8) {
                add_product<T, 8>(slots, dz + t * row_size, row_size, 1, rows + c, dp, grad_query + t * dp + c, dp);
              }
              for (; t < n; ++t) {
                add_product<T, 1>(slots, dz + t * row_size, row_size, 1, rows + c, dp, grad_query + t * dp + c, dp);
              }
            }
          }
          if (wants_keys) {
            T* const rows = grad_keys + first_slot * dp;
            for (int64_t c = 0; c < dp; c += lanes) {
              int64_t slot = 0;
              for (; slot + 8 <= slots; slot += 8) {
                add_product<T, 8>(n, dz + slot, 1, row_size, query + c, dp, rows + slot * dp + c, dp);
              }
              for (; slot < slots; ++slot) {
                add_product<T, 1>(n, dz + slot, 1, row_size, query + c, dp, rows + slot * dp + c, dp);
              }
            }
          }
        }
        if (p.grad_query.data) {
          T* to = line<T>(p.grad_query, image, group * d, y) + x * p.grad_query.column_stride;
          write_positions(p.grad_query, to, n, d, dp, grad_query);
        }
      }
    }
    if (wants_biases) table_gradients.take_gradients(strip.end - 1, grad_bias, grad_rpb);

    const int64_t partial = item % p.partials * p.batch * p.groups + image_and_group;
    if (wants_keys) {
      T* to = static_cast<T*>(p.grad_keys) + partial * p.slots() * d;
      for (int branch = 0; branch < 2; ++branch) {
        for (int64_t slot = 0; slot < layout.slots[branch]; ++slot) {
          const T* row = grad_keys + (layout.offset[branch] + slot) * dp;
          for (int64_t i = 0; i < d; ++i) *to++ = row[i];
        }
      }
    }
    if (p.grad_bias) {
      T* to = static_cast<T*>(p.grad_bias) + partial * p.slots();
      for (int64_t i = 0; i < p.slots(); ++i) to[i] = grad_bias[i];
    }
    for (int branch = 0; branch < 2; ++branch) {
      if (!p.grad_rpb[branch]) continue;
      const int64_t size = sides[branch] * sides[branch];
      T* to = static_cast<T*>(p.grad_rpb[branch]) + partial * size;
      for (int64_t i = 0; i < size; ++i) to[i] = grad_rpb[branch][i];
    }
  }
}

template <typename T>
void gather_grad_value(const ContMixParams& p, const ContMixWorkspace<T>& workspace, int64_t begin, int64_t end) {
  const Layout<T> layout(p, true);
  const int64_t row_size = p.width * layout.channels;
  Scratch<T> scratch(row_size);
  T* const sums = scratch.take(row_size);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t y = item % p.height, branch_and_group = item / p.height;
    const int64_t image = branch_and_group / p.groups / 2, group = branch_and_group % p.groups;
    const int branch = branch_and_group / p.groups % 2;
    for (int64_t i = 0; i < row_size; ++i) sums[i] = T(0);
    for (int64_t i = 0; i < p.partials; ++i) {
      const Strip strip(p, p.partials, i);
      if (y < strip.first_held(p, branch) || y >= strip.end_held(p, branch)) continue;
      const T* held = workspace.grad_value + ((image * p.groups + group) * p.partials + i) * strip_size<T>(p, layout);
      if (branch) held += Strip::most_held(p, p.partials, 0) * row_size;
      const T* row = held + (y - strip.first_held(p, branch)) * row_size;
      for (int64_t j = 0; j < row_size; ++j) sums[j] += row[j];
    }
    T* to = line<T>(p.grad_value, image, (branch * p.groups + group) * p.channels, y);
    write_positions(p.grad_value, to, p.width, p.channels, layout.channels, sums);
  }
}

#define OVERLOCK_MM_STRING_OF(x) #x
#define OVERLOCK_MM_STRING(x) OVERLOCK_MM_STRING_OF(x)

template <typename T>
constexpr ContMixKernels<T> kContMixKernels = {OVERLOCK_MM_STRING(OVERLOCK_MM_NAMESPACE),
                                               &workspace_sizes<T>,
                                               &pack_keys<T>,
                                               &forward<T>,
                                               &backward<T>,
                                               &gather_grad_value<T>};

}  // namespace

template <>
const ContMixKernels<float>& table() {
  return kContMixKernels<float>;
}
template <>
const ContMixKernels<double>& table() {
  return kContMixKernels<double>;
}

}  // namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE
