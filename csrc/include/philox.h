// The dropout mask of peftkern/dropout.py, bit for bit.
//
//   words = Philox4x32-10(counter = (col / 8, row, offset_lo, offset_hi), key = (seed_lo, seed_hi))
//   element (row, col) is kept iff 16-bit half number col % 8 of the four words is at least the threshold.
//
// A 32-bit word lives in the low half of a 64-bit lane. What the multiplications leave in the high half is ignored by the
// next multiplication, so a round is two products, two shifts and four exclusive-ors for L counters at a time.
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once
#include "vec.h"

namespace peftkern {
namespace PEFTKERN_ISA {

constexpr int L = W / 2;  // counters per vector; each gives 8 elements
typedef uint64_t vq __attribute__((vector_size(8 * L)));

static inline vq multiply_low_words(vq a, uint32_t b) {
#if defined(__AVX512F__)
  return (vq)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (vq)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (vq)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * b;
#endif
}

static inline vq xor3(vq a, vq b, vq c) {
#if defined(__AVX512F__)
  return (vq)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

struct Words { vq low, high; };  // per counter: words 0 and 1, words 2 and 3

// GROUPS vectors of counters at a time: they share the round keys and fill each other's latency.
template <int GROUPS>
static inline void philox(const vq *column, vq row, vq offset_low, vq offset_high, uint64_t seed, Words *words) {
  const vq word = vq{} + 0xffffffffu;
  vq c0[GROUPS], c1[GROUPS], c2[GROUPS], c3[GROUPS], k0 = vq{} + uint32_t(seed), k1 = vq{} + (seed >> 32);
  for (int i = 0; i < GROUPS; ++i) c0[i] = column[i], c1[i] = row, c2[i] = offset_low, c3[i] = offset_high;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < GROUPS; ++i) {
      const vq p0 = multiply_low_words(c0[i], 0xD2511F53u), p1 = multiply_low_words(c2[i], 0xCD9E8D57u);
      c0[i] = xor3(p1 >> 32, c1[i], k0);
      c2[i] = xor3(p0 >> 32, c3[i], k1);
      c1[i] = p1;
      c3[i] = p0;
    }
    k0 += vq{} + 0x9E3779B9u;  // the high half of a key lane is ignored as well
    k1 += vq{} + 0xBB67AE85u;
  }
  for (int i = 0; i < GROUPS; ++i) words[i] = {(c0[i] & word) | c1[i] << 32, (c2[i] & word) | c3[i] << 32};
}

// 8 L bits: which of 8 L consecutive elements are kept.
static inline uint64_t kept(Words words, uint32_t threshold) {
#if defined(__AVX512BW__)
  const __m512i t = _mm512_set1_epi16((short)threshold);
  const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  __m512i a = _mm512_permutex2var_epi64((__m512i)words.low, first, (__m512i)words.high);
  __m512i b = _mm512_permutex2var_epi64((__m512i)words.low, second, (__m512i)words.high);
  return uint64_t(_mm512_cmpge_epu16_mask(a, t)) | uint64_t(_mm512_cmpge_epu16_mask(b, t)) << 32;
#elif defined(__AVX2__)
  const __m256i t = _mm256_set1_epi16((short)threshold), zero = _mm256_setzero_si256();
  const __m256i even = _mm256_unpacklo_epi64((__m256i)words.low, (__m256i)words.high);
  const __m256i odd = _mm256_unpackhi_epi64((__m256i)words.low, (__m256i)words.high);
  const __m256i a = _mm256_cmpeq_epi16(_mm256_subs_epu16(t, even), zero), b = _mm256_cmpeq_epi16(_mm256_subs_epu16(t, odd), zero);
  return uint32_t(_mm256_movemask_epi8(_mm256_packs_epi16(a, b)));
#elif defined(__SSE2__)
  const __m128i t = _mm_set1_epi16((short)threshold), zero = _mm_setzero_si128();
  const __m128i first = _mm_unpacklo_epi64((__m128i)words.low, (__m128i)words.high);
  const __m128i second = _mm_unpackhi_epi64((__m128i)words.low, (__m128i)words.high);
  const __m128i a = _mm_cmpeq_epi16(_mm_subs_epu16(t, first), zero), b = _mm_cmpeq_epi16(_mm_subs_epu16(t, second), zero);
  return uint32_t(_mm_movemask_epi8(_mm_packs_epi16(a, b)));
#else
  uint64_t bits = 0;
  for (int counter = 0; counter < L; ++counter) {
    for (int lane = 0; lane < 4; ++lane) {
      bits |= uint64_t((words.low[counter] >> 16 * lane & 0xffff) >= threshold) << (8 * counter + lane);
      bits |= uint64_t((words.high[counter] >> 16 * lane & 0xffff) >= threshold) << (8 * counter + lane + 4);
    }
  }
  return bits;
#endif
}

// What the counters of one row share.
struct RowKey { vq row, offset_low, offset_high; uint64_t seed; uint32_t threshold; };

constexpr int kParts = 8 / L;  // vectors of counters to a word of 64 bits

template <int WORDS> static inline void keep_words(const RowKey &key, int64_t counter, uint64_t *bits) {
  vq lane, column[WORDS * kParts];
  Words words[WORDS * kParts];
  for (int i = 0; i < L; ++i) lane[i] = i;
  for (int i = 0; i < WORDS * kParts; ++i) column[i] = lane + uint64_t(counter + i * L);
  philox<WORDS * kParts>(column, key.row, key.offset_low, key.offset_high, key.seed, words);
  for (int word = 0; word < WORDS; ++word) {
    bits[word] = 0;
    for (int i = 0; i < kParts; ++i) bits[word] |= kept(words[word * kParts + i], key.threshold) << (i * 8 * L);
  }
}

// The keep bits of row `row`, columns [first, first + count), 64 to a word; first is a multiple of 64.
static inline void keep_bits_row(const Dropout &dropout, int64_t row, int64_t first, int64_t count, uint64_t *bits) {
  const int64_t words = (count + 63) / 64;
  if (dropout.threshold >= 65536) {
    memset(bits, 0, words * sizeof(uint64_t));
    return;
  }
  const vq zero = {};
  const RowKey key = {zero + uint32_t(row), zero + uint32_t(dropout.offset), zero + (dropout.offset >> 32), dropout.seed,
                      dropout.threshold};
  constexpr int kWords = kParts < 4 ? 4 / kParts : 1;  // four vectors fill the pipes
  int64_t word = 0;
  for (; word + kWords <= words; word += kWords) keep_words<kWords>(key, (first + word * 64) / 8, bits + word);
  for (; word < words; ++word) keep_words<1>(key, (first + word * 64) / 8, bits + word);
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
