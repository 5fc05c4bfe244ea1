// ContMix on the CPU. Included once for each instruction set, under the rules of simd.h.
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
constexpr int kChunk = 16;  // positions of a line that take each step together: their weights stay in the L1 cache

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

/// The same as (channels, lines, W). Vectors are read beyond the last number, where there are zeros.
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
          // Whole vectors: the next row overwrites what goes too far, or it is padding.
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

/// Neighbouring positions whose windows along the line all move with them, or all stand still.
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
/// t is a constant after inlining, so that the arrays that it indexes stay in registers.
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

/// The reverse: add n positions' gradients (n, padded channels), each weighted by its kernel, to the windows.
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

/// Store sums for the columns that n windows hold together as the slots of position t, and of those after it. Whole
/// vectors are stored: numbers that go too far belong to the next row, or are beyond the slots.
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

/// n positions of line y from column x on, which take each step together.
struct Chunk {
  int64_t y, x, n;
};

/// Shared by the forward and the backward: the strip that a thread works on, and where its data is.
template <typename T>
class StripWorker {
 protected:
  StripWorker(const ContMixParams& p, const ContMixWorkspace<T>& workspace, int64_t strips, bool backward)
      : p_(p), layout_(p, backward), workspace_(workspace), strips_(strips) {}
  StripWorker(const StripWorker&) = delete;
  StripWorker& operator=(const StripWorker&) = delete;

  /// Go to an item of B * G * strips.
  void go_to(int64_t item) {
    image_and_group_ = item / strips_;
    image_ = image_and_group_ / p_.groups;
    group_ = image_and_group_ % p_.groups;
    strip_ = Strip(p_, strips_, item % strips_);
    keys_ = workspace_.keys + image_and_group_ * layout_.keys_size;
  }

  /// First channel of the group in the value and output maps.
  int64_t channel_of(int branch) const { return (branch * p_.groups + group_) * p_.channels; }

  T* at(const Map& map, int64_t channel, Chunk chunk) const {
    return line<T>(map, image_, channel, chunk.y) + chunk.x * map.column_stride;
  }
  T* query_at(const Map& map, Chunk chunk) const { return at(map, group_ * p_.query_channels, chunk); }
  T* logsumexp_at(int branch, Chunk chunk) const {
    const int64_t branch_and_group = (image_ * 2 + branch) * p_.groups + group_;
    return static_cast<T*>(p_.logsumexp) + (branch_and_group * p_.height + chunk.y) * p_.width + chunk.x;
  }

  /// First line of the window of a position in line y, counted from the first line that the strip's windows hold.
  int64_t window_line(int branch, int64_t y) const {
    return window_start(y, p_.height, p_.kernel_size[branch]) - strip_.first_held(p_, branch);
  }

  /// Call function(t, run) for the runs, of at most `most` positions, that a chunk consists of; t is a run's first.
  template <typename Function>
  OVERLOCK_MM_INLINE void for_runs(int branch, Chunk chunk, int most, Function function) const {
    for (int64_t t = 0; t < chunk.n;) {
      const Run run = run_from(chunk.x + t, chunk.n - t, p_.width, p_.kernel_size[branch], most);
      function(t, run);
      t += run.length;
    }
  }

  const ContMixParams& p_;
  const Layout<T> layout_;
  const ContMixWorkspace<T>& workspace_;
  const int64_t strips_;
  int64_t image_and_group_ = 0, image_ = 0, group_ = 0;
  Strip strip_{p_, 1, 0};
  const T* keys_ = nullptr;
};

/// Call function(first channel, number of vectors as a constant) for padded channels, two vectors at a time.
template <typename T, typename Function>
OVERLOCK_MM_INLINE void for_channel_vectors(int64_t padded_channels, Function function) {
  constexpr int lanes = Simd<T>::lanes;
  int64_t c = 0;
  for (; c + 2 * lanes <= padded_channels; c += 2 * lanes) function(c, Constant<2>{});
  if (c < padded_channels) function(c, Constant<1>{});
}

template <typename T>
class ForwardWorker : StripWorker<T> {
 public:
  ForwardWorker(const ContMixParams& p, const ContMixWorkspace<T>& workspace, int64_t strips)
      : StripWorker<T>(p, workspace, strips, /*backward=*/false),
        scratch_(tables_size() + kChunk * (layout_.all_slots + layout_.channels) + query_size() + value_size(0) +
                 value_size(1)),
        tables_(p, layout_, scratch_.take(tables_size())),
        weights_(scratch_.take(kChunk * layout_.all_slots)),
        mixed_(scratch_.take(kChunk * layout_.channels)),
        query_(scratch_.take(query_size())),
        values_{scratch_.take(value_size(0)), scratch_.take(value_size(1))} {}

  /// A strip of a group.
  void run(int64_t item) {
    this->go_to(item);
    for (int branch = 0; branch < 2; ++branch) {
      pack_value(p_, image_, this->channel_of(branch), strip_.first_held(p_, branch), strip_.end_held(p_, branch),
                 layout_.channels, values_[branch]);
    }
    for (int64_t y = strip_.begin; y < strip_.end; ++y) {
      if (y == strip_.begin || tables_.differs_from_line_before(y)) tables_.fill(keys_, y);
      for (int64_t x = 0; x < p_.width; x += kChunk) {
        const Chunk chunk{y, x, min(kChunk, p_.width - x)};
        const int64_t d = p_.query_channels;
        read_positions(p_.query, this->query_at(p_.query, chunk), chunk.n, d, d, query_);
        for (int branch = 0; branch < 2; ++branch) mix(branch, chunk);
      }
    }
  }

 private:
  using StripWorker<T>::p_;
  using StripWorker<T>::layout_;
  using StripWorker<T>::strips_;
  using StripWorker<T>::image_;
  using StripWorker<T>::strip_;
  using StripWorker<T>::keys_;

  int64_t tables_size() const { return round_up<T>(BiasTables<T>::size(p_, layout_)); }
  int64_t query_size() const { return round_up<T>(kChunk * p_.query_channels); }
  int64_t value_size(int branch) const { return Strip::most_held(p_, strips_, branch) * p_.width * layout_.channels; }

  void mix(int branch, Chunk chunk) {
    T maxima[kChunk], sums[kChunk];
    T* const z = weights_ + layout_.offset[branch];
    logits(p_, layout_, tables_, branch, chunk.x, chunk.n, keys_, query_, p_.query_channels, z, layout_.all_slots);
    take_exponentials(branch, chunk.n, z, maxima, sums);
    T* const logsumexp = this->logsumexp_at(branch, chunk);
    for (int64_t t = 0; t < chunk.n; ++t) logsumexp[t] = maxima[t] + std::log2(sums[t]);
    sum_values(branch, chunk, z);
    write_normalised(branch, chunk, sums);
  }

  void take_exponentials(int branch, int64_t n, T* z, T* maxima, T* sums) const {
    constexpr int together = kVectorBytes == 64 ? 4 : 2;
    const int64_t stride = layout_.all_slots, slots = layout_.padded_slots[branch];
    int64_t done = 0;
    for (; done + together <= n; done += together)
      exponentials<T, together>(z + done * stride, stride, slots, maxima + done, sums + done);
    for (; done < n; ++done) exponentials<T, 1>(z + done * stride, stride, slots, maxima + done, sums + done);
  }

  void sum_values(int branch, Chunk chunk, const T* weights) {
    const int64_t k = p_.kernel_size[branch], cp = layout_.channels, row_stride = p_.width * cp,
                  weights_stride = layout_.all_slots;
    const T* const window_line = values_[branch] + this->window_line(branch, chunk.y) * row_stride;
    for_channel_vectors<T>(cp, [&](int64_t c, auto n_vectors) {
      this->for_runs(branch, chunk, 8 / n_vectors.value, [&](int64_t t, Run run) OVERLOCK_MM_INLINE_LAMBDA {
        const T* const window = window_line + window_start(chunk.x + t, p_.width, k) * cp + c;
        with_constants(run, [&](auto length, auto sliding) {
          sum_windows<T, length.value, n_vectors.value, sliding.value>(k, weights + t * weights_stride, weights_stride,
                                                                       window, row_stride, cp, mixed_ + t * cp + c, cp);
        });
      });
    });
  }

  void write_normalised(int branch, Chunk chunk, const T* sums) {
    const int64_t cp = layout_.channels;
    T* const mixed = mixed_;
    for (int64_t t = 0; t < chunk.n; ++t) {
      const T scale = T(1) / sums[t];
      for (int64_t i = 0; i < cp; ++i) mixed[t * cp + i] *= scale;
    }
    write_positions(p_.output, this->at(p_.output, this->channel_of(branch), chunk), chunk.n, p_.channels, cp, mixed);
  }

  Scratch<T> scratch_;
  const BiasTables<T> tables_;
  T* const weights_;
  T* const mixed_;
  T* const query_;
  T* const values_[2];
};

template <typename T>
void forward(const ContMixParams& p, const ContMixWorkspace<T>& workspace, int64_t strips, int64_t begin, int64_t end) {
  ForwardWorker<T> worker(p, workspace, strips);
  for (int64_t item = begin; item < end; ++item) worker.run(item);
}

/// With P the weights, O the output, and d(X) the gradient of X:
///   D = sum of d(O) O,  d(P) = d(O) V,  d(Z) = P (d(P) - D),
/// which give the gradients of queries, keys and biases. The gradient of the value is d(O), weighted by P and added to
/// the windows.
template <typename T>
class BackwardWorker : StripWorker<T> {
 public:
  BackwardWorker(const ContMixParams& p, const ContMixWorkspace<T>& workspace)
      : StripWorker<T>(p, workspace, p.partials, /*backward=*/true),
        scratch_(2 * tables_size() +
                 kChunk * (layout_.all_slots + row_size() + layout_.channels + 2 * layout_.query_channels) +
                 keys_size() + biases_size() + value_size(0) + value_size(1)),
        tables_(p, layout_, scratch_.take(tables_size())),
        table_gradients_(p, layout_, scratch_.take(tables_size())),
        weights_(scratch_.take(kChunk * layout_.all_slots)),
        logit_gradients_(scratch_.take(kChunk * row_size())),
        grad_output_(scratch_.take(kChunk * layout_.channels)),
        query_(scratch_.take(kChunk * layout_.query_channels)),
        grad_query_(scratch_.take(kChunk * layout_.query_channels)),
        grad_keys_(scratch_.take(keys_size())),
        grad_bias_(scratch_.take(biases_size())),
        grad_rpb_{grad_bias_ + p.slots(), grad_bias_ + p.slots() + rpb_size(0)},
        values_{scratch_.take(value_size(0)), scratch_.take(value_size(1))} {}

  /// A strip of a group.
  void run(int64_t item) {
    this->go_to(item);
    clear_sums(item);
    for (int branch = 0; branch < 2; ++branch) {
      pack_value_by_channel(p_, image_, this->channel_of(branch), strip_.first_held(p_, branch),
                            strip_.end_held(p_, branch), values_[branch]);
    }
    for (int64_t y = strip_.begin; y < strip_.end; ++y) {
      if (y == strip_.begin || tables_.differs_from_line_before(y)) {
        if (y > strip_.begin && wants_biases()) table_gradients_.take_gradients(y - 1, grad_bias_, grad_rpb_);
        tables_.fill(keys_, y);
      }
      for (int64_t x = 0; x < p_.width; x += kChunk) differentiate({y, x, min(kChunk, p_.width - x)});
    }
    if (wants_biases()) table_gradients_.take_gradients(strip_.end - 1, grad_bias_, grad_rpb_);
    write_sums(item % p_.partials * p_.batch * p_.groups + image_and_group_);
  }

 private:
  using StripWorker<T>::p_;
  using StripWorker<T>::layout_;
  using StripWorker<T>::workspace_;
  using StripWorker<T>::image_and_group_;
  using StripWorker<T>::image_;
  using StripWorker<T>::strip_;
  using StripWorker<T>::keys_;
  static constexpr int lanes = Simd<T>::lanes;

  bool wants_biases() const { return p_.grad_bias || p_.grad_rpb[0] || p_.grad_rpb[1]; }
  bool wants_logits() const { return p_.grad_keys || p_.grad_query.data || wants_biases(); }

  int64_t tables_size() const { return round_up<T>(BiasTables<T>::size(p_, layout_)); }
  /// Of the logits' gradients at a position: whole vectors are stored from any slot on.
  int64_t row_size() const { return layout_.all_slots + 3 * lanes; }
  int64_t keys_size() const { return layout_.all_slots * layout_.query_channels; }
  int64_t rpb_size(int branch) const {
    const int64_t side = 2 * p_.kernel_size[branch] - 1;
    return side * side;
  }
  int64_t biases_size() const { return round_up<T>(p_.slots() + rpb_size(0) + rpb_size(1)); }
  int64_t value_size(int branch) const {
    return round_up<T>(p_.channels * Strip::most_held(p_, p_.partials, branch) * p_.width) + 2 * lanes;
  }

  void clear_sums(int64_t item) {
    const int64_t size = strip_size<T>(p_, layout_);
    grad_values_ = workspace_.grad_value + item * size;
    if (p_.grad_value.data) {
      for (int64_t i = 0; i < size; ++i) grad_values_[i] = T(0);
    }
    for (int64_t i = 0, n = keys_size(); i < n; ++i) grad_keys_[i] = T(0);
    for (int64_t i = 0, n = biases_size(); i < n; ++i) grad_bias_[i] = T(0);
    table_gradients_.clear();
  }

  void differentiate(Chunk chunk) {
    const int64_t d = p_.query_channels, dp = layout_.query_channels;
    read_positions(p_.query, this->query_at(p_.query, chunk), chunk.n, d, dp, query_);
    for (int64_t i = 0; i < chunk.n * dp; ++i) grad_query_[i] = T(0);
    for (int branch = 0; branch < 2; ++branch) {
      T products[kChunk];
      read_gradients(branch, chunk, products);
      recompute_weights(branch, chunk);
      if (p_.grad_value.data) spread_gradients(branch, chunk);
      if (!wants_logits()) continue;
      differentiate_weights(branch, chunk);
      differentiate_logits(branch, chunk, products);
      if (p_.grad_query.data) add_to_grad_query(branch, chunk.n);
      if (p_.grad_keys) add_to_grad_keys(branch, chunk.n);
    }
    if (p_.grad_query.data)
      write_positions(p_.grad_query, this->query_at(p_.grad_query, chunk), chunk.n, d, dp, grad_query_);
  }

  /// d(O), and D in `products`.
  void read_gradients(int branch, Chunk chunk, T* products) {
    const int64_t channel = this->channel_of(branch);
    const T* const grad = this->at(p_.grad_output, channel, chunk);
    const T* const output = this->at(p_.output, channel, chunk);
    read_positions(p_.grad_output, grad, chunk.n, p_.channels, layout_.channels, grad_output_);
    channel_products(p_.grad_output, grad, p_.output, output, chunk.n, p_.channels, products);
  }

  /// P, from the logits once more.
  void recompute_weights(int branch, Chunk chunk) {
    T* const z = weights_ + layout_.offset[branch];
    const int64_t slots = layout_.padded_slots[branch], stride = layout_.all_slots;
    logits(p_, layout_, tables_, branch, chunk.x, chunk.n, keys_, query_, layout_.query_channels, z, stride);
    const T* const logsumexp = this->logsumexp_at(branch, chunk);
    for (int64_t t = 0; t < chunk.n; ++t) {
      T* const row = z + t * stride;
      for (int64_t slot = 0; slot < slots; slot += lanes) store(row + slot, exp2<T>(load(row + slot) - logsumexp[t]));
    }
  }

  /// d(O), weighted by P, to the windows of d(V).
  void spread_gradients(int branch, Chunk chunk) {
    const int64_t k = p_.kernel_size[branch], cp = layout_.channels, row_stride = p_.width * cp,
                  weights_stride = layout_.all_slots;
    const T* const weights = weights_ + layout_.offset[branch];
    T* const held = grad_values_ + (branch ? Strip::most_held(p_, p_.partials, 0) * row_stride : 0);
    T* const window_line = held + this->window_line(branch, chunk.y) * row_stride;
    for_channel_vectors<T>(cp, [&](int64_t c, auto n_vectors) {
      this->for_runs(branch, chunk, 8 / n_vectors.value, [&](int64_t t, Run run) OVERLOCK_MM_INLINE_LAMBDA {
        T* const window = window_line + window_start(chunk.x + t, p_.width, k) * cp + c;
        with_constants(run, [&](auto length, auto sliding) {
          spread_to_windows<T, length.value, n_vectors.value, sliding.value>(
              k, weights + t * weights_stride, weights_stride, grad_output_ + t * cp + c, cp, window, row_stride, cp);
        });
      });
    });
  }

  /// d(P), in the place of d(Z).
  void differentiate_weights(int branch, Chunk chunk) {
    const int64_t k = p_.kernel_size[branch], row_stride = p_.width;
    T* const grad_weights = logit_gradients_ + layout_.offset[branch];
    const int64_t plane = (strip_.end_held(p_, branch) - strip_.first_held(p_, branch)) * row_stride;
    const T* const value = values_[branch] + this->window_line(branch, chunk.y) * row_stride;
    this->for_runs(branch, chunk, kTile, [&](int64_t t, Run run) OVERLOCK_MM_INLINE_LAMBDA {
      differentiate_weights_of_run(run, k, chunk.x + t, grad_output_ + t * layout_.channels, value, plane,
                                   grad_weights + t * row_size());
    });
  }

  /// d(P) of the positions of a run from column x on.
  OVERLOCK_MM_INLINE void differentiate_weights_of_run(Run run, int64_t k, int64_t x, const T* grad, const T* value,
                                                       int64_t plane, T* out) const {
    const int64_t columns = run.sliding ? k + run.length - 1 : k, start = window_start(x, p_.width, k),
                  cp = layout_.channels;
    const auto in_registers = [&](auto n_vectors, auto n_rows) OVERLOCK_MM_INLINE_LAMBDA {
      with_constants(run, [&](auto length, auto sliding) {
        weight_gradients<T, length.value, n_rows.value, n_vectors.value, sliding.value>(
            k, start, grad, cp, p_.channels, value, plane, p_.width, out, row_size());
      });
    };
    switch ((columns + lanes - 1) / lanes) {
      case 1:
        return in_registers(Constant<1>{}, Constant<(kVectorBytes == 64 ? 4 : 2)>{});
      case 2:
        return in_registers(Constant<2>{}, Constant<1>{});
      case 3:
        return in_registers(Constant<3>{}, Constant<1>{});
      case 4:
        return in_registers(Constant<4>{}, Constant<1>{});
    }
    // A kernel too wide for the registers: position by position, vector by vector.
    for (int64_t i = 0; i < run.length; ++i) {
      const int64_t first = window_start(x + i, p_.width, k);
      for (int64_t row = 0; row < k; ++row) {
        for (int64_t j = 0; j < k; j += lanes) {
          weight_gradients_of_rows<T, 1, 1, 1, false>(lanes, first + j, grad + i * cp, cp, p_.channels,
                                                      value + row * p_.width, plane, p_.width,
                                                      out + i * row_size() + row * k + j, row_size());
        }
      }
    }
  }

  /// d(Z), from d(P) in its place, and its sums for the biases.
  void differentiate_logits(int branch, Chunk chunk, const T* products) {
    const int64_t slots = layout_.padded_slots[branch], first_slot = layout_.offset[branch];
    for (int64_t t = 0; t < chunk.n; ++t) {
      T* const row = logit_gradients_ + first_slot + t * row_size();
      const T* const weight = weights_ + first_slot + t * layout_.all_slots;
      for (int64_t slot = layout_.slots[branch]; slot < slots; ++slot) row[slot] = T(0);
      for (int64_t slot = 0; slot < slots; slot += lanes)
        store(row + slot, load(weight + slot) * (load(row + slot) - products[t]));
      if (wants_biases()) {
        T* const table = table_gradients_.table(branch, chunk.x + t);
        for (int64_t slot = 0; slot < slots; slot += lanes) store(table + slot, load(table + slot) + load(row + slot));
      }
    }
  }

  /// The product of d(Z) and the keys.
  void add_to_grad_query(int branch, int64_t n) {
    const int64_t slots = layout_.padded_slots[branch], dp = layout_.query_channels, stride = row_size();
    const T* const dz = logit_gradients_ + layout_.offset[branch];
    const T* const rows = keys_ + layout_.rows + layout_.offset[branch] * dp;
    for (int64_t c = 0; c < dp; c += lanes) {
      int64_t t = 0;
      for (; t + 8 <= n; t += 8)
        add_product<T, 8>(slots, dz + t * stride, stride, 1, rows + c, dp, grad_query_ + t * dp + c, dp);
      for (; t < n; ++t)
        add_product<T, 1>(slots, dz + t * stride, stride, 1, rows + c, dp, grad_query_ + t * dp + c, dp);
    }
  }

  /// The product of d(Z) and the queries.
  void add_to_grad_keys(int branch, int64_t n) {
    const int64_t slots = layout_.padded_slots[branch], dp = layout_.query_channels, stride = row_size();
    const T* const dz = logit_gradients_ + layout_.offset[branch];
    T* const rows = grad_keys_ + layout_.offset[branch] * dp;
    for (int64_t c = 0; c < dp; c += lanes) {
      int64_t slot = 0;
      for (; slot + 8 <= slots; slot += 8)
        add_product<T, 8>(n, dz + slot, 1, stride, query_ + c, dp, rows + slot * dp + c, dp);
      for (; slot < slots; ++slot) add_product<T, 1>(n, dz + slot, 1, stride, query_ + c, dp, rows + slot * dp + c, dp);
    }
  }

  /// Sums over the strip to their place among the partial ones.
  void write_sums(int64_t partial) const {
    if (p_.grad_keys) {
      const int64_t d = p_.query_channels;
      T* to = static_cast<T*>(p_.grad_keys) + partial * p_.slots() * d;
      for (int branch = 0; branch < 2; ++branch) {
        for (int64_t slot = 0; slot < layout_.slots[branch]; ++slot) {
          const T* const row = grad_keys_ + (layout_.offset[branch] + slot) * layout_.query_channels;
          for (int64_t i = 0; i < d; ++i) *to++ = row[i];
        }
      }
    }
    if (p_.grad_bias) {
      T* const to = static_cast<T*>(p_.grad_bias) + partial * p_.slots();
      for (int64_t i = 0; i < p_.slots(); ++i) to[i] = grad_bias_[i];
    }
    for (int branch = 0; branch < 2; ++branch) {
      if (!p_.grad_rpb[branch]) continue;
      const int64_t size = rpb_size(branch);
      T* const to = static_cast<T*>(p_.grad_rpb[branch]) + partial * size;
      for (int64_t i = 0; i < size; ++i) to[i] = grad_rpb_[branch][i];
    }
  }

  Scratch<T> scratch_;
  const BiasTables<T> tables_;
  const BiasTables<T> table_gradients_;
  T* const weights_;          ///< (kChunk, all slots): P
  T* const logit_gradients_;  ///< (kChunk, row_size): d(Z)
  T* const grad_output_;      ///< (kChunk, channels): d(O)
  T* const query_;            ///< (kChunk, query channels)
  T* const grad_query_;       ///< likewise
  T* const grad_keys_;        ///< (all slots, query channels)
  T* const grad_bias_;
  T* const grad_rpb_[2];
  T* const values_[2];
  T* grad_values_ = nullptr;  ///< of the strip, in the workspace
};

template <typename T>
void backward(const ContMixParams& p, const ContMixWorkspace<T>& workspace, int64_t begin, int64_t end) {
  BackwardWorker<T> worker(p, workspace);
  for (int64_t item = begin; item < end; ++item) worker.run(item);
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
