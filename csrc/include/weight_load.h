// Where a block of the frozen weight is made: the one place of the CPU kernels that knows a storage format.
//
//   panel    B[q, p] = op(W)[q, first + p], fp32 [depth, kTileColumns], zero behind `width` columns
//
// `by_rows` says that the produced column is a row of what is stored (W[p, q], for y): then a block is transposed in registers.
// A dense weight is read where it lies; a quantised one is decoded first (quantised.h), a few of its rows at a time.
#pragma once
#include <utility>

#include "quantised_steps.h"

namespace peftkern {
namespace PEFTKERN_ISA {

constexpr int kTileColumns = 2 * W;  // of a panel

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

// Lane i is the sum of v[i]'s lanes.
template <int D = 1> static inline vf lane_sums(vf v[W]) {
  if constexpr (D < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i += 2 * D) {
      exchange<D>(v[i], v[i + D], std::make_integer_sequence<int, W>());
      v[i] += v[i + D];
    }
    return lane_sums<2 * D>(v);
  } else {
    return v[0];
  }
}

// block[place(q), p] = w[p, q] for q < depth, p < columns; zero for columns <= p < kTileColumns.
template <class T, class Place> static inline void block_of_rows(const T *w, int64_t ldw, int64_t depth, int64_t columns, float *block, Place place) {
  for (int64_t half = 0; half < kTileColumns; half += W) {
    for (int64_t q = 0; q < depth; q += W) {
      const int64_t width = smaller(W, depth - q);
      vf v[W];
      for (int i = 0; i < W; ++i) {
        const T *source = w + (half + i) * ldw + q;
        v[i] = half + i >= columns ? vf{} : width == W ? load(source) : load_tail(source, width);
      }
      transpose(v);
      for (int64_t i = 0; i < width; ++i) store(v[i], block + place(q + i) * kTileColumns + half);
    }
  }
}

// block[q, p] = w[q, p], likewise.
template <class T> static void block_of_columns(const T *w, int64_t ldw, int64_t depth, int64_t columns, float *block) {
  for (int64_t q = 0; q < depth; ++q) {
    for (int64_t half = 0; half < kTileColumns; half += W) {
      const T *source = w + q * ldw + half;
      const int64_t width = columns - half;
      store(width >= W ? load(source) : width > 0 ? load_tail(source, smaller(W, width)) : vf{}, block + q * kTileColumns + half);
    }
  }
}

template <class T> static void block_of(const T *w, int64_t ldw, bool by_rows, int64_t q, int64_t first, int64_t depth, int64_t width, float *block) {
  if (by_rows) block_of_rows(w + first * ldw + q, ldw, depth, width, block, [](int64_t i) { return i; });
  else block_of_columns(w + q * ldw + first, ldw, depth, width, block);
}

constexpr int64_t kDecodedDepth = 256;  // of a quantised weight's rows that are transposed: 16 KB

// X is the dtype of x, and of a dense weight.
template <class X> static void panel_of(const Weight &w, bool by_rows, int64_t q, int64_t first, int64_t depth, int64_t width, float *block) {
  if (w.format == WeightFormat::dense) return block_of((const X *)w.data, w.stride, by_rows != w.transposed, q, first, depth, width, block);
  if (!by_rows) {
    if (width < kTileColumns) memset(block, 0, depth * kTileColumns * sizeof(float));
    return decode<X>(w, q, first, depth, width, block, kTileColumns);
  }
  alignas(64) float rows[kTileColumns * kDecodedDepth];
  for (int64_t begin = 0; begin < depth; begin += kDecodedDepth) {
    const int64_t count = smaller(kDecodedDepth, depth - begin);
    decode<X>(w, first, q + begin, width, count, rows, kDecodedDepth);
    block_of_rows(rows, kDecodedDepth, count, width, block + begin * kTileColumns, [](int64_t i) { return i; });
  }
}

// Whether neighbouring panels are made at once, from a weight that comes in steps, and how many.
constexpr int64_t kStepPanels = kStep / kTileColumns;
static_assert(kDecodedDepth % kStep == 0, "whole steps are transposed");

// `width` <= kStep columns of op(W) as panels, `apart` from one to the next; q, first (not by_rows) and depth (by_rows) are whole
// steps. Not by_rows, the columns of the panels are in the order of the steps.
template <class X> static void panels_of_steps(const Weight &w, bool by_rows, int64_t q, int64_t first, int64_t depth, int64_t width, float *panels, int64_t apart) {
  alignas(64) float rows[kTileColumns * kDecodedDepth];
  if (!by_rows) {
    constexpr int64_t kRows = kTileColumns * kDecodedDepth / kStep;
    for (int64_t begin = 0; begin < depth; begin += kRows) {
      const int64_t count = smaller(kRows, depth - begin);
      decode_steps<X>(w, q + begin, first, count, kStep, rows, kStep);
      for (int64_t i = 0; i < count; ++i) {
        float *target = panels + (begin + i) * kTileColumns;
        for (int64_t at = 0; at < kStep; at += W) store(load(rows + i * kStep + at), target + at / kTileColumns * apart + at % kTileColumns);
      }
    }
    return;
  }
  uint8_t from[kStep] = {};
  order_of_steps<X>(w, from);
  for (int64_t p = 0; p < width; p += kTileColumns) {
    const int64_t columns = smaller(kTileColumns, width - p);
    for (int64_t begin = 0; begin < depth; begin += kDecodedDepth) {
      const int64_t count = smaller(kDecodedDepth, depth - begin);
      decode_steps<X>(w, first + p, q + begin, columns, count, rows, kDecodedDepth);
      block_of_rows(rows, kDecodedDepth, count, columns, panels + p / kTileColumns * apart + begin * kTileColumns,
                    [&](int64_t i) { return i / kStep * kStep + from[i % kStep]; });
    }
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
