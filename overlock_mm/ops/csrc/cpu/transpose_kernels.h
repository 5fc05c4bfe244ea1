// Transposition on the CPU. Included once for each instruction set, under the rules of simd.h.

#include "simd.h"

namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE {
namespace {

template <typename T>
void transpose(const TransposeParams& p, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Simd<T>::lanes, square = TransposeParams::kSquare;
  const int64_t squares_down = (p.rows + square - 1) / square, squares_across = (p.columns + square - 1) / square;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / (squares_down * squares_across),
                  square_of_image = item % (squares_down * squares_across);
    const int64_t first_row = square_of_image / squares_across * square,
                  first_column = square_of_image % squares_across * square;
    const int64_t last_row = min(first_row + square, p.rows), last_column = min(first_column + square, p.columns);
    const T* const from = const_data<T>(p.from) + image * p.rows * p.columns;
    T* const to = static_cast<T*>(p.to) + image * p.rows * p.columns;
    for (int64_t row = first_row; row < last_row; row += lanes) {
      for (int64_t column = first_column; column < last_column; column += lanes) {
        if (row + lanes <= last_row && column + lanes <= last_column) {
          Vector<T> tile[lanes];
#pragma GCC unroll 16
          for (int i = 0; i < lanes; ++i) tile[i] = load(from + (row + i) * p.columns + column);
          transpose_square<T>(tile);
#pragma GCC unroll 16
          for (int i = 0; i < lanes; ++i) store(to + (column + i) * p.rows + row, tile[i]);
          continue;
        }
        for (int64_t y = row; y < min(row + lanes, last_row); ++y) {
          for (int64_t x = column; x < min(column + lanes, last_column); ++x)
            to[x * p.rows + y] = from[y * p.columns + x];
        }
      }
    }
  }
}

template <typename T>
constexpr TransposeKernels<T> kTransposeKernels = {&transpose<T>};

}  // namespace

template <>
const TransposeKernels<float>& table() {
  return kTransposeKernels<float>;
}
template <>
const TransposeKernels<double>& table() {
  return kTransposeKernels<double>;
}

}  // namespace overlock_mm::cpu::OVERLOCK_MM_NAMESPACE
