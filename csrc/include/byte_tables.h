// Tables of 16 numbers that a shuffle of AVX2 looks up by byte, for quantised_steps.h.
#pragma once
#include "quantised.h"

namespace peftkern {
namespace PEFTKERN_ISA {

#if defined(__AVX2__) && !defined(__AVX512F__)
// 16 numbers whose fp32 bits are zero but for the upper BYTES bytes: a table for each of those, lowest first, in both halves.
template <int BYTES> struct ByteTables {
  __m256i part[BYTES];

  void make(const vu low, const vu high) {  // the bits of numbers 0 ... 7 and 8 ... 15
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5);
#pragma GCC unroll 4
    for (int b = 0; b < BYTES; b += 2) {
      const int shift = 32 - 8 * BYTES + 8 * b;
      const __m256i words = _mm256_packus_epi32((__m256i)(low >> shift & 0xffff), (__m256i)(high >> shift & 0xffff));
      const __m256i bytes = _mm256_packus_epi16(_mm256_and_si256(words, _mm256_set1_epi16(255)), _mm256_srli_epi16(words, 8));
      part[b] = _mm256_permutevar8x32_epi32(bytes, order);
      part[b + 1] = _mm256_permutevar8x32_epi32(bytes, _mm256_add_epi32(order, _mm256_set1_epi32(2)));
    }
  }

  // Of 32 codes, of which bits 0 to 3 count (0 where bit 7 is set): their numbers as vectors `first` to first + 3.
  template <class F> __attribute__((always_inline)) void find(__m256i codes, int first, F f) const {
    __m256i bytes[BYTES];
#pragma GCC unroll 4
    for (int b = 0; b < BYTES; ++b) bytes[b] = _mm256_shuffle_epi8(part[b], codes);
    numbers(bytes, first, f);
  }

  template <class F> __attribute__((always_inline)) static void numbers(const __m256i bytes[BYTES], int first, F f) {
    if constexpr (BYTES == 2) {
      const vu low = (vu)_mm256_unpacklo_epi8(bytes[0], bytes[1]), high = (vu)_mm256_unpackhi_epi8(bytes[0], bytes[1]);
      f(first, (vf)(low << 16)), f(first + 1, (vf)(low & 0xffff0000u));
      f(first + 2, (vf)(high << 16)), f(first + 3, (vf)(high & 0xffff0000u));
    } else {
      const __m256i low0 = _mm256_unpacklo_epi8(bytes[0], bytes[1]), low1 = _mm256_unpacklo_epi8(bytes[2], bytes[3]);
      const __m256i high0 = _mm256_unpackhi_epi8(bytes[0], bytes[1]), high1 = _mm256_unpackhi_epi8(bytes[2], bytes[3]);
      f(first, (vf)_mm256_unpacklo_epi16(low0, low1)), f(first + 1, (vf)_mm256_unpackhi_epi16(low0, low1));
      f(first + 2, (vf)_mm256_unpacklo_epi16(high0, high1)), f(first + 3, (vf)_mm256_unpackhi_epi16(high0, high1));
    }
  }

  // Which of 32 codes the number in a lane of vector j of 4 is.
  static int place(int j, int lane) {
    return lane / 4 * 16 + (BYTES == 2 ? j / 2 * 8 + lane % 4 * 2 + j % 2 : j * 4 + lane % 4);
  }
};

// The 64 nibbles from data[0]: the even ones, then the odd ones.
template <First FIRST, class Tables, class F> __attribute__((always_inline)) static inline void find_nibbles(const Tables &tables, const uint8_t *data, F f) {
  const __m256i codes = _mm256_loadu_si256((const __m256i *)data), mask = _mm256_set1_epi8(15);
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(codes, 4), mask), low = _mm256_and_si256(codes, mask);
  tables.find(FIRST == First::high ? high : low, 0, f);
  tables.find(FIRST == First::high ? low : high, 4, f);
}
template <class Tables> static int element_of_nibbles(int i) {
  return Tables::place(i / W % 4, i % W) * 2 + i / W / 4;
}

// The tables of a few blocks, two made at a time: a half of the registers for each.
template <int64_t BLOCKS> struct BlockTables {
  static constexpr int64_t kBlocks = BLOCKS;
  alignas(32) uint8_t low[kBlocks][16], high[kBlocks][16];
  vf even[2], odd[2];  // numbers 0 2 4 6 and 8 10 12 14, twice; 1 3 5 7 and 9 11 13 15

  explicit BlockTables(const float *numbers) {
    for (int i = 0; i < 2 * W; ++i) {
      even[i / W][i % W] = numbers[i / W * 8 + i % 4 * 2];
      odd[i / W][i % W] = numbers[i / W * 8 + i % 4 * 2 + 1];
    }
  }

  // Of two vectors, rounded to bf16, the upper halves of their lanes, alternating.
  static __m256i rounded_words(vf even, vf odd) {
    const __m256i a = (__m256i)even, b = (__m256i)odd;
    const __m256i upper = _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xaa), lower = _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa);
    // (lower + 0x7fff + the upper half's lowest bit) >> 16, as an average that keeps its 17th bit
    const __m256i half = _mm256_or_si256(_mm256_and_si256(upper, _mm256_set1_epi16(1)), _mm256_set1_epi16(0x7ffe));
    return _mm256_add_epi16(upper, _mm256_srli_epi16(_mm256_avg_epu16(lower, half), 15));
  }

  // scaled(numbers, part) for blocks 2 i and 2 i + 1, whose scales fill a half each; part 1 are numbers 8 ... 15
  template <class F> __attribute__((always_inline)) void make(int64_t i, F scaled) {
    const __m256i apart = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    const __m256i first = _mm256_shuffle_epi8(rounded_words(scaled(even[0], 0), scaled(odd[0], 0)), apart);
    const __m256i second = _mm256_shuffle_epi8(rounded_words(scaled(even[1], 1), scaled(odd[1], 1)), apart);
    _mm256_store_si256((__m256i *)low[2 * i], _mm256_unpacklo_epi64(first, second));
    _mm256_store_si256((__m256i *)high[2 * i], _mm256_unpackhi_epi64(first, second));
  }

  ByteTables<2> of(int64_t block) const {
    const auto both = [](const uint8_t *table) { return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)table)); };
    return {both(low[block]), both(high[block])};
  }
  // Two blocks': each for the codes of a half of the registers.
  ByteTables<2> of_pair(int64_t block) const {
    return {_mm256_load_si256((const __m256i *)low[block]), _mm256_load_si256((const __m256i *)high[block])};
  }
};

static inline vf halves(float first, float second) {
  return (vf)_mm256_blend_ps(_mm256_set1_ps(first), _mm256_set1_ps(second), 0xf0);
}

#endif

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
