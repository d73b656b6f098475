// The dropout mask of peftkern/dropout.py, bit for bit.
//
//   words = Philox4x32-10(counter = (col / 8, row, offset_lo, offset_hi), key = (seed_lo, seed_hi))
//   element (row, col) is kept iff 16-bit half number col % 8 of the four words is at least the threshold.
//
// A 32-bit word lives in the low half of a 64-bit lane. What the multiplications leave in the high half is ignored by the
// next multiplication, so a round is two products, two shifts and four exclusive-ors for L counters at a time.
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once
#include "../cpu/vec.h"

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

struct Words { vq low, high; };  // per counter: words 0 and 1, words 2 and 3

static inline Words philox(vq c0, vq c1, vq c2, vq c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    vq p0 = multiply_low_words(c0, 0xD2511F53u), p1 = multiply_low_words(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ k0;
    c2 = (p0 >> 32) ^ c3 ^ k1;
    c1 = p1;
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const vq word = vq{} + 0xffffffffu;
  return {(c0 & word) | c1 << 32, (c2 & word) | c3 << 32};
}

// 8 L bits: which of 8 L consecutive elements are kept.
static inline uint64_t kept(Words words, uint32_t threshold) {
#if defined(__AVX512BW__)
  const __m512i t = _mm512_set1_epi16((short)threshold);
  const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  __m512i a = _mm512_permutex2var_epi64((__m512i)words.low, first, (__m512i)words.high);
  __m512i b = _mm512_permutex2var_epi64((__m512i)words.low, second, (__m512i)words.high);
  return uint64_t(_mm512_cmpge_epu16_mask(a, t)) | uint64_t(_mm512_cmpge_epu16_mask(b, t)) << 32;
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

// The keep bits of row `row`, columns [first, first + count), 64 to a word; first is a multiple of 64.
static inline void keep_bits_row(const Dropout &dropout, int64_t row, int64_t first, int64_t count, uint64_t *bits) {
  const int64_t words = (count + 63) / 64;
  if (dropout.threshold >= 65536) {
    memset(bits, 0, words * sizeof(uint64_t));
    return;
  }
  vq lane;
  for (int i = 0; i < L; ++i) lane[i] = i;
  const vq zero = {};
  const vq c1 = zero + uint32_t(row), c2 = zero + uint32_t(dropout.offset), c3 = zero + uint32_t(dropout.offset >> 32);
  const uint32_t k0 = uint32_t(dropout.seed), k1 = uint32_t(dropout.seed >> 32);
  for (int64_t word = 0; word < words; ++word) {
    uint64_t gathered = 0;
    for (int part = 0; part < 8 / L; ++part) {
      const vq c0 = lane + uint64_t(first / 8 + word * 8 + part * L);
      gathered |= kept(philox(c0, c1, c2, c3, k0, k1), dropout.threshold) << (part * 8 * L);
    }
    bits[word] = gathered;
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
