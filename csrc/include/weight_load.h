// Where a block of the frozen weight is made: the one place of the CPU kernels that knows a storage format.
//
//   panel    B[q, p] = op(W)[q, first + p], words (words.h) [depth, kTileColumns], zero behind `width` columns
//
// `by_rows` says that the produced column is a row of what is stored (W[p, q], for y): then a block is transposed in registers.
// A dense weight is read where it lies; a quantised one is decoded first (quantised.h), a few of its rows at a time.
#pragma once
#include <utility>

#include "quantised_steps.h"
#include "words.h"

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

// block[place(q), p] = w[p, q] for q < depth, p < columns, q counted in words; zero for columns <= p < kTileColumns.
template <class Word, class T, class Place> static inline void block_of_rows(const T *w, int64_t ldw, int64_t depth, int64_t columns, Word *block, Place place) {
  constexpr int64_t kOf = Packing<Word>::kOf;
  for (int64_t half = 0; half < kTileColumns; half += W) {
    for (int64_t q = 0; q < depth; q += W * kOf) {
      vf v[W];
      for (int i = 0; i < W; ++i) v[i] = half + i >= columns ? vf{} : Packing<Word>::of_row(w + (half + i) * ldw + q, depth - q);
      transpose(v);
      const int64_t width = smaller(W, Packing<Word>::count(depth - q));
      for (int64_t i = 0; i < width; ++i) store(v[i], block + place(q / kOf + i) * kTileColumns + half);
    }
  }
}

// block[q, p] = w[q, p], likewise.
template <class Word, class T> static void block_of_columns(const T *w, int64_t ldw, int64_t depth, int64_t columns, Word *block) {
  constexpr int64_t kAheadRows = 16;  // of one line each, in as many pages
  for (int64_t q = 0; q < depth; q += Packing<Word>::kOf, block += kTileColumns) {
    for (int64_t i = 0; i < Packing<Word>::kOf; ++i) __builtin_prefetch(w + (q + kAheadRows + i) * ldw);
    for (int64_t half = 0; half < kTileColumns; half += W) {
      store(half < columns ? Packing<Word>::of_columns(w + q * ldw + half, ldw, depth - q, columns - half) : vf{}, block + half);
    }
  }
}

template <class Word, class T> static void block_of(const T *w, int64_t ldw, bool by_rows, int64_t q, int64_t first, int64_t depth, int64_t width, Word *block) {
  if (by_rows) block_of_rows(w + first * ldw + q, ldw, depth, width, block, [](int64_t i) { return i; });
  else block_of_columns(w + q * ldw + first, ldw, depth, width, block);
}

constexpr int64_t kDecodedDepth = 256;  // of a quantised weight's rows that are decoded at a time: 16 or 32 KB

// X is the dtype of x, and of a dense weight.
template <class X, class Word> static void panel_of(const Weight &w, bool by_rows, int64_t q, int64_t first, int64_t depth, int64_t width, Word *block) {
  if (w.format == WeightFormat::dense) return block_of((const X *)w.data, w.stride, by_rows != w.transposed, q, first, depth, width, block);
  alignas(64) float rows[kTileColumns * kDecodedDepth];
  for (int64_t begin = 0; begin < depth; begin += kDecodedDepth) {
    const int64_t count = smaller(kDecodedDepth, depth - begin);
    Word *target = block + begin / Packing<Word>::kOf * kTileColumns;
    if (by_rows) {
      decode<X>(w, first, q + begin, width, count, rows, kDecodedDepth);
      block_of_rows(rows, kDecodedDepth, count, width, target, [](int64_t i) { return i; });
    } else {
      decode<X>(w, q + begin, first, count, width, rows, kTileColumns);
      block_of_columns(rows, kTileColumns, count, width, target);
    }
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
