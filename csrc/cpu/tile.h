// The one micro-kernel, with sums in fp32 registers, and the layout of rows that it reads, in words of fp32 or pairs of bf16 (words.h).
//
//   packed    rows in tiles of kTileRows: word q of the tile's row i at [q * kTileRows + i], so that a tile is one stream
//   tile      sums[i, p] (+)= sum_q X[i, q] B[q, p]     X a packed tile, B a block [depth, kTileColumns] in the cache
//   outer     sums[i, p]  += sum_m X[m, i] B[m, p]      over the rows m of all packed tiles
//
// Packing x costs a transposition in registers, once, and took the product from 91 to 99 of the 103 GFLOP/s that a core of
// Zen 3 can do: rows where they lie are as many streams, in as many pages, as a tile has rows (benchmarks/NOTES.md).
#pragma once
#include "../include/weight_load.h"

namespace peftkern {
namespace PEFTKERN_ISA {

constexpr int kTileRows = W == 16 ? 12 : 6;  // twice as many sums, and the operands, fill 32 or 16 registers
constexpr int64_t kDepth = 288;              // terms of one sum in registers, at most: short sums keep errors small

// How many terms a sum of Q has in registers: as many in each, so that none is too short to be worth its stores.
static inline int64_t depth_of(int64_t Q) {
  const int64_t parts = (Q + kDepth - 1) / kDepth;
  return parts ? round_up((Q + parts - 1) / parts, W) : W;
}

// The sums of ROWS rows over `depth` words, in registers; HALF: of the first W columns alone.
template <int ROWS, bool HALF = false> struct Tile {
  vf low[ROWS], high[ROWS];

  template <class Word> __attribute__((always_inline)) Tile(const Word *x, const Word *block, int64_t depth) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) low[i] = high[i] = vf{};
#pragma GCC unroll 4
    for (int64_t q = 0; q < depth; ++q) {
      const vf b0 = load(block + q * kTileColumns), b1 = HALF ? vf{} : load(block + q * kTileColumns + W);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        const Word word = x[q * kTileRows + i];
        low[i] = multiply_add(low[i], word, b0);
        if constexpr (!HALF) high[i] = multiply_add(high[i], word, b1);
      }
    }
  }
};

// sums is [ROWS, kTileColumns], written or added to.
template <int ROWS, bool HALF = false, class Word> static inline void tile(const Word *x, const Word *block, int64_t depth, bool add, float *sums) {
  const Tile<ROWS, HALF> t(x, block, depth);
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    float *sum = sums + i * kTileColumns;
    store(add ? load(sum) + t.low[i] : t.low[i], sum);
    if constexpr (!HALF) store(add ? load(sum + W) + t.high[i] : t.high[i], sum + W);
  }
}

// sums is [COLUMNS, lds], added to; x begins at the first of those columns in the first of `tiles` tiles, `stride` apart.
template <int COLUMNS, bool HALF> static inline void outer(const float *x, int64_t stride, int64_t tiles, const float *block, float *sums, int64_t lds) {
  vf low[COLUMNS], high[COLUMNS];
#pragma GCC unroll 16
  for (int i = 0; i < COLUMNS; ++i) low[i] = high[i] = vf{};
  for (int64_t t = 0; t < tiles; ++t, x += stride) {
#pragma GCC unroll 16
    for (int m = 0; m < kTileRows; ++m, block += kTileColumns) {
      const vf b0 = load(block), b1 = HALF ? vf{} : load(block + W);
#pragma GCC unroll 16
      for (int i = 0; i < COLUMNS; ++i) {
        const float value = x[i * kTileRows + m];
        low[i] += value * b0;
        if constexpr (!HALF) high[i] += value * b1;
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < COLUMNS; ++i) {
    float *sum = sums + i * lds;
    store(load(sum) + low[i], sum);
    if constexpr (!HALF) store(load(sum + W) + high[i], sum + W);
  }
}

// Calls f with std::integral_constant<int, count>, for 1 <= count <= kTileRows.
template <int COUNT = kTileRows, class F> static inline void with_count(int64_t count, F f) {
  if constexpr (COUNT > 1) {
    if (count < COUNT) return with_count<COUNT - 1>(count, f);
  }
  f(std::integral_constant<int, COUNT>());
}

constexpr int64_t kPackSlack = kTileRows + W;  // words behind the last packed tile that pack writes over

// out[q * kTileRows + i] = word q of x[i], for `count` elements of a row; zero for rows <= i < kTileRows, and where a bit is clear.
template <class Word, class T> static void pack(const T *x, int64_t stride, int64_t rows, int64_t count, const uint64_t *bits, int64_t bits_stride, Word *out) {
  constexpr int kParts = (kTileRows + W - 1) / W;
  constexpr int64_t kOf = Packing<Word>::kOf;
  for (int64_t q = 0; q < count; q += W * kOf) {
    vf v[kParts][W];
#pragma GCC unroll 16
    for (int i = 0; i < kParts * W; ++i) {
      vf words = {};
      if (i < rows) {
        words = Packing<Word>::of_row(x + i * stride + q, count - q);
        if (bits) words = Packing<Word>::kept(words, bits[i * bits_stride + q / 64] >> (q % 64));
      }
      v[i / W][i % W] = words;
    }
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) transpose(v[part]);
    // A store reaches into the next column, which is stored after it.
    const int64_t width = smaller(W, Packing<Word>::count(count - q));
    for (int64_t i = 0; i < width; ++i) {
      for (int part = 0; part < kParts; ++part) store(v[part][i], out + (q / kOf + i) * kTileRows + part * W);
    }
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
