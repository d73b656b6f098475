// The big product in fp32 registers: a tile of kTileRows x kTileColumns sums, and the blocks of the weight that it reads.
//
//   tile     sums[m, p] (+)= sum_q X[m, q] B[q, p]     X row-major fp32, B a block [depth, kTileColumns] in the L1 cache
//   block    B[q, p] from the weight where it lies, widened: W[p, q] (transposed in registers) for y, W[q, p] for dx
//
// A block is made once and used for every row of the caller's share, so one micro-kernel serves every storage type, and the
// weight is never copied as a whole. Sums over more than kDepth terms are added up in short ones, which keeps errors small.
#pragma once
#include <utility>

#include "../include/vec.h"

namespace peftkern {
namespace PEFTKERN_ISA {

constexpr int kTileRows = W == 16 ? 12 : 6;  // twice as many sums, and the operands, fill 32 or 16 registers
constexpr int kTileColumns = 2 * W;
constexpr int64_t kDepth = 256;  // a block of the weight takes half of the L1 cache

// sums is [ROWS, kTileColumns], written or added to; rows of x lie ldx apart.
template <int ROWS> static inline void tile(const float *x, int64_t ldx, const float *block, int64_t depth, bool add, float *sums) {
  vf low[ROWS], high[ROWS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) low[i] = high[i] = vf{};
  for (int64_t q = 0; q < depth; ++q) {
    const vf b0 = load(block + q * kTileColumns), b1 = load(block + q * kTileColumns + W);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const float value = x[i * ldx + q];
      low[i] += value * b0;
      high[i] += value * b1;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    float *sum = sums + i * kTileColumns;
    store(add ? load(sum) + low[i] : low[i], sum);
    store(add ? load(sum + W) + high[i] : high[i], sum + W);
  }
}

template <int ROWS = kTileRows>
static inline void tile_of(int64_t rows, const float *x, int64_t ldx, const float *block, int64_t depth, bool add, float *sums) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return tile_of<ROWS - 1>(rows, x, ldx, block, depth, add, sums);
  }
  tile<ROWS>(x, ldx, block, depth, add, sums);
}

// Lanes of a and b merged: where bit D of the lane's number is clear those of a, else those of b, and the other way round.
template <int D, int... I> static inline void exchange(vf &a, vf &b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  const vf first = __builtin_shufflevector(a, b, (I & D ? W + I - D : I)...);
  b = __builtin_shufflevector(a, b, (I & D ? W + I : I + D)...);
#else
  const vf first = __builtin_shuffle(a, b, vi{(I & D ? W + I - D : I)...});
  b = __builtin_shuffle(a, b, vi{(I & D ? W + I : I + D)...});
#endif
  a = first;
}

template <int D = 1> static inline void transpose(vf v[W]) {
  if constexpr (D < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (!(i & D)) exchange<D>(v[i], v[i + D], std::make_integer_sequence<int, W>());
    }
    transpose<2 * D>(v);
  }
}

// block[q, p] = w[p, q] for q < depth, p < columns; zero for columns <= p < kTileColumns.
template <class T> static void block_of_rows(const T *w, int64_t ldw, int64_t depth, int64_t columns, float *block) {
  for (int64_t half = 0; half < kTileColumns; half += W) {
    for (int64_t q = 0; q < depth; q += W) {
      const int64_t width = smaller(W, depth - q);
      vf v[W];
      for (int i = 0; i < W; ++i) {
        const T *source = w + (half + i) * ldw + q;
        v[i] = half + i >= columns ? vf{} : width == W ? load(source) : load_tail(source, width);
      }
      transpose(v);
      for (int64_t i = 0; i < width; ++i) store(v[i], block + (q + i) * kTileColumns + half);
    }
  }
}

// block[q, p] = w[q, p], likewise.
template <class T> static void block_of_columns(const T *w, int64_t ldw, int64_t depth, int64_t columns, float *block) {
  for (int64_t q = 0; q < depth; ++q) {
    for (int64_t half = 0; half < kTileColumns; half += W) {
      const T *source = w + q * ldw + half;
      const int64_t width = columns - half;
      store(width >= W ? load(source) : width > 0 ? load_tail(source, width) : vf{}, block + q * kTileColumns + half);
    }
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
