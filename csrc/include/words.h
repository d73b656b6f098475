// What a packed operand is made of, and the one instruction that multiplies it.
//
//   float   fp32 numbers
//   pair    two bf16 neighbours along the contracted index, the first one low: a product adds both to each fp32 sum
//
// A vector of words is carried as what lies in memory, in a vector of fp32, so that both are transposed by the same shuffles.
// Without the instruction, two multiplications and two additions, the second of the pair first, give its bits (but for subnormal
// numbers, which it takes for zero): a product of two bf16 is exact in fp32. So what is packed as pairs is tested on any processor.
#pragma once
#include "vec.h"

namespace peftkern {
namespace PEFTKERN_ISA {

struct pair { uint32_t bits; };

static inline vf load(const pair *source) { return load(reinterpret_cast<const float *>(source)); }
static inline void store(vf value, pair *target) { memcpy(target, &value, sizeof value); }

static inline vf multiply_add(vf sum, float x, vf words) { return sum + x * words; }
static inline vf multiply_add(vf sum, pair x, vf words) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(x.bits)), (__m512bh)words);
#else
  const vu bits = (vu)words, low = vu{} + (x.bits << 16), high = vu{} + (x.bits & 0xffff0000u);
  sum += (vf)high * (vf)(bits & 0xffff0000u);
  return sum + (vf)low * (vf)(bits << 16);
#endif
}

template <class Word> struct Packing;

template <> struct Packing<float> {
  static constexpr int64_t kOf = 1;  // elements of a word
  static int64_t count(int64_t elements) { return elements; }

  // The next W words of a row that has `left` elements, zeros behind them.
  template <class T> static inline vf of_row(const T *row, int64_t left) { return left >= W ? load(row) : load_tail(row, left); }
  // The same, and zeros where a bit is clear.
  static inline vf kept(vf words, uint64_t bits) { return select(uint32_t(bits), words); }
  // Words of W neighbouring columns, at one row; `left` of them lie inside.
  template <class T> static inline vf of_columns(const T *w, int64_t, int64_t, int64_t left) { return of_row(w, left); }
};

template <> struct Packing<pair> {
  static constexpr int64_t kOf = 2;
  static int64_t count(int64_t elements) { return (elements + 1) / 2; }

  static inline vf of_row(const bf16 *row, int64_t left) {
    vf words = {};
    if (left >= 2 * W) {
      memcpy(&words, row, sizeof words);
      return words;
    }
#if defined(__AVX512BW__)
    return (vf)_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << left) - 1), row);
#else
    bf16 lanes[2 * W] = {};
    for (int lane = 0; lane < 2 * W; ++lane) if (lane < left) lanes[lane] = row[lane];
    memcpy(&words, lanes, sizeof words);
    return words;
#endif
  }
  static inline vf of_row(const float *row, int64_t left) {  // rounded
    bf16 lanes[2 * W];
    store(Packing<float>::of_row(row, left), lanes);
    store(left > W ? Packing<float>::of_row(row + W, left - W) : vf{}, lanes + W);
    vf words;
    memcpy(&words, lanes, sizeof words);
    return words;
  }
  static inline vf kept(vf words, uint64_t bits) {
#if defined(__AVX512BW__)
    return (vf)_mm512_maskz_mov_epi16(__mmask32(bits), (__m512i)words);
#else
    vu low, high;
    for (int i = 0; i < W; ++i) low[i] = bits >> 2 * i & 1 ? 0xffff : 0, high[i] = bits >> (2 * i + 1) & 1 ? 0xffff0000u : 0;
    return (vf)((vu)words & (low | high));
#endif
  }
  // Of a row and the next of `rows`, rounded where they are fp32.
  template <class T> static inline vf of_columns(const T *w, int64_t ldw, int64_t rows, int64_t left) {
    const vu first = (vu)narrowed(w, left), second = rows > 1 ? (vu)narrowed(w + ldw, left) : vu{};
    return (vf)(first >> 16 | second);
  }

 private:
  static inline vf narrowed(const bf16 *row, int64_t left) { return Packing<float>::of_row(row, left); }
  static inline vf narrowed(const float *row, int64_t left) { return rounded<bf16>(Packing<float>::of_row(row, left)); }
};

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
