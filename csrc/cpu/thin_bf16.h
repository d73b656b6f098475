// The thin products in bf16 pairs with an fp32 accumulator (AVX512-BF16): the interface and the formulas of thin_f32.h.
//
// vdpbf16ps adds two products of neighbouring bf16 to each fp32 lane, so the contracted index is packed in pairs:
//   shrink   F packed [Q / 2, Rp] pairs over q        expand   G packed [R / 2, Pp] pairs over r
//   outer    T packed [rows / 2, Rp] pairs over m, X interleaved two rows at a time in registers
// Odd counts are padded with zeros on both sides of every product.
#pragma once
#include "../include/words.h"

#if defined(__AVX512BF16__)
namespace peftkern {
namespace PEFTKERN_ISA {

struct ThinBF16 {
  typedef bf16 Storage;
  typedef pair Word;
  typedef bf16 Element;
  typedef uint32_t Packed;
  static constexpr int64_t kRows = 64, kColumns = 256, kPad = 32;
  static constexpr int64_t kLine = 32;  // elements of a cache line; the rows after these are fetched while these are worked on

  static int64_t pairs(int64_t count) { return (count + 1) / 2; }

  static __m512bh dp_operand(__m512i bits) { return (__m512bh)bits; }
  static __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, dp_operand(a), dp_operand(b)); }
  static __m512i broadcast_pair(const void *pair) {
    uint32_t bits;
    memcpy(&bits, pair, 4);
    return _mm512_set1_epi32(int(bits));
  }
  static __m512i round_pair(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
  static __m512 low_half(__m512i bits) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits)), 16); }
  static __m512 high_half(__m512i bits) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits, 1)), 16); }
  static __mmask16 first16(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : __mmask16((1u << count) - 1); }
  static __mmask32 first32(int64_t count) { return count >= 32 ? 0xffffffffu : count <= 0 ? 0 : (1u << count) - 1; }

  static __m512 load16(const float *source, int64_t count) { return _mm512_maskz_loadu_ps(first16(count), source); }
  static __m512 load16(const bf16 *source, int64_t count) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first16(count), source)), 16);
  }

  // out[row / 2, col] = (F[row, col], F[row + 1, col])
  template <class F> static void pack_interleaved(const F *f, int64_t rows, int64_t cols, Packed *out, int64_t ld, bool) {
    alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i interleave = _mm512_load_si512(order);
    for (int64_t row = 0; row < rows; row += 2) {
      for (int64_t col = 0; col < ld; col += 16) {
        const F *source = f + row * cols + col;
        const __m512 even = load16(source, cols - col);
        const __m512 odd = row + 1 < rows ? load16(source + cols, cols - col) : _mm512_setzero_ps();
        _mm512_storeu_si512(out + row / 2 * ld + col, _mm512_permutexvar_epi16(interleave, round_pair(even, odd)));
      }
    }
  }

  static void transpose16(__m512i v[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
      v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
      v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
  }

  // out[col / 2, row] = (F[row, col], F[row, col + 1])
  template <class F> static void pack_transposed(const F *f, int64_t rows, int64_t cols, Packed *out, int64_t ld, bool) {
    for (int64_t row = 0; row < ld; row += 16) {
      for (int64_t col = 0; col < cols; col += 32) {
        __m512i v[16];
        for (int i = 0; i < 16; ++i) {
          const F *source = f + (row + i) * cols + col;
          v[i] = row + i < rows ? round_pair(load16(source, cols - col), load16(source + 16, cols - col - 16)) : _mm512_setzero_si512();
        }
        transpose16(v);
        const int64_t last = smaller(16, pairs(cols - col));
        for (int64_t i = 0; i < last; ++i) _mm512_storeu_si512(out + (col / 2 + i) * ld + row, v[i]);
      }
    }
  }

  // The block itself where it can be read in place (even count, no mask), else a masked and padded copy.
  static const Element *load_block(const bf16 *x, int64_t stride, int64_t rows, int64_t count, const uint64_t *bits,
                                   int64_t bits_stride, Element *buffer, int64_t *ld) {
    if (!bits && count % 2 == 0) {
      *ld = stride;
      return x;
    }
    *ld = kColumns;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t col = 0; col < count; col += 32) {
        __mmask32 keep = first32(count - col);
        if (bits) keep &= __mmask32(bits[row * bits_stride + col / 64] >> (col % 64));
        _mm512_storeu_si512(buffer + row * kColumns + col, _mm512_maskz_loadu_epi16(keep, x + row * stride + col));
      }
    }
    return buffer;
  }

  template <int ROWS> static void shrink_rows(const Element *x, int64_t ld, int64_t count, const Packed *f, int64_t Rp, float *t) {
    for (int64_t r = 0; r < Rp; r += 16) {
      __m512 sum[ROWS];
      for (int i = 0; i < ROWS; ++i) sum[i] = _mm512_setzero_ps();
      for (int64_t line = 0; line < count; line += kLine) {
        if (r == 0) for (int i = 0; i < ROWS; ++i) __builtin_prefetch(x + (i + ROWS) * ld + line);
        for (int64_t q = line; q < smaller(line + kLine, count); q += 2) {
          const __m512i factor = _mm512_loadu_si512(f + q / 2 * Rp + r);
          for (int i = 0; i < ROWS; ++i) sum[i] = dot(sum[i], factor, broadcast_pair(x + i * ld + q));
        }
      }
      for (int i = 0; i < ROWS; ++i) _mm512_storeu_ps(t + i * Rp + r, sum[i] + _mm512_loadu_ps(t + i * Rp + r));
    }
  }

  static void shrink(const Element *x, int64_t ld, int64_t rows, int64_t count, const Packed *f, int64_t Rp, float *t) {
    int64_t row = 0;
    for (; row + 16 <= rows; row += 16) shrink_rows<16>(x + row * ld, ld, count, f, Rp, t + row * Rp);
    for (; row + 4 <= rows; row += 4) shrink_rows<4>(x + row * ld, ld, count, f, Rp, t + row * Rp);
    for (; row < rows; ++row) shrink_rows<1>(x + row * ld, ld, count, f, Rp, t + row * Rp);
  }

  // T rounded to bf16: row-major, so that pairs over r are neighbours, and interleaved in pairs over m.
  struct Thin { bf16 *by_row; uint32_t *by_pair; int64_t Rp; };
  static int64_t thin_size(int64_t Rp) { return kRows * Rp; }  // in floats: half of it for each of the two
  static Thin make_thin(const float *t, int64_t rows, int64_t R, int64_t Rp, float *memory) {
    Thin thin{(bf16 *)memory, (uint32_t *)memory + kRows * Rp / 2, Rp};
    const int64_t even = (rows + 1) / 2 * 2;
    for (int64_t row = 0; row < even; ++row) {
      for (int64_t r = 0; r < Rp; r += 16) {
        const __m512 value = row < rows ? load16(t + row * Rp + r, R - r) : _mm512_setzero_ps();
        _mm256_storeu_si256((__m256i *)(thin.by_row + row * Rp + r), (__m256i)_mm512_cvtneps_pbh(value));
      }
    }
    for (int64_t row = 0; row < even; row += 2) {
      for (int64_t r = 0; r < Rp; r += 16) {
        const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(thin.by_row + row * Rp + r)));
        const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(thin.by_row + (row + 1) * Rp + r)));
        _mm512_storeu_si512(thin.by_pair + row / 2 * Rp + r, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
      }
    }
    return thin;
  }

  template <int ROWS> static void expand_rows(const Thin &thin, int64_t row, int64_t R, const Packed *g, int64_t ldg, float c,
                                              const float *column, const uint64_t *bits, int64_t bits_stride, bf16 *z,
                                              int64_t stride, int64_t count) {
    const __m512 scale = _mm512_set1_ps(c);
    for (int64_t col = 0; col < count; col += 32) {
      __m512 low[ROWS], high[ROWS];
      for (int i = 0; i < ROWS; ++i) {
        low[i] = high[i] = _mm512_setzero_ps();
        __builtin_prefetch(z + (i + ROWS) * stride + col, 1);
      }
      for (int64_t r = 0; r < R; r += 2) {
        const __m512i g0 = _mm512_loadu_si512(g + r / 2 * ldg + col), g1 = _mm512_loadu_si512(g + r / 2 * ldg + col + 16);
        for (int i = 0; i < ROWS; ++i) {
          const __m512i t = broadcast_pair(thin.by_row + (row + i) * thin.Rp + r);
          low[i] = dot(low[i], t, g0);
          high[i] = dot(high[i], t, g1);
        }
      }
      const __mmask32 inside = first32(count - col);
      for (int i = 0; i < ROWS; ++i) {
        const __mmask32 keep = bits ? __mmask32(bits[i * bits_stride + col / 64] >> (col % 64)) : 0xffffffffu;
        bf16 *target = z + i * stride + col;
        const __m512i before = _mm512_maskz_loadu_epi16(inside, target);
        __m512 a = low_half(before), b = high_half(before);
        a = _mm512_mask3_fmadd_ps(low[i], scale, a, __mmask16(keep));
        b = _mm512_mask3_fmadd_ps(high[i], scale, b, __mmask16(keep >> 16));
        if (column) {
          a += load16(column + col, count - col);
          b += load16(column + col + 16, count - col - 16);
        }
        _mm512_mask_storeu_epi16(target, inside, round_pair(a, b));
      }
    }
  }

  static void expand(const Thin &thin, int64_t rows, int64_t R, const Packed *g, int64_t ldg, float c, const float *column,
                     const uint64_t *bits, int64_t bits_stride, bf16 *z, int64_t stride, int64_t count) {
    for (int64_t row = 0; row < rows;) {
      const bool eight = row + 8 <= rows;
      const uint64_t *row_bits = bits ? bits + row * bits_stride : nullptr;
      if (eight) expand_rows<8>(thin, row, R, g, ldg, c, column, row_bits, bits_stride, z + row * stride, stride, count);
      else expand_rows<1>(thin, row, R, g, ldg, c, column, row_bits, bits_stride, z + row * stride, stride, count);
      row += eight ? 8 : 1;
    }
  }

  template <int RANKS> static void outer_ranks(const Thin &thin, int64_t r, const Element *x, int64_t ld, int64_t rows,
                                               int64_t count, float *sums, int64_t lds) {
    alignas(64) static const uint16_t order[2][32] = {
        {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
    const __m512i first = _mm512_load_si512(order[0]), second = _mm512_load_si512(order[1]);
    for (int64_t col = 0; col < count; col += 32) {
      const __mmask32 inside = first32(count - col);
      __m512 low[RANKS], high[RANKS];
      for (int i = 0; i < RANKS; ++i) low[i] = high[i] = _mm512_setzero_ps();
      for (int64_t row = 0; row < rows; row += 2) {
        const Element *source = x + row * ld + col;
        const __m512i a = _mm512_maskz_loadu_epi16(inside, source);
        const __m512i b = row + 1 < rows ? _mm512_maskz_loadu_epi16(inside, source + ld) : _mm512_setzero_si512();
        const __m512i x0 = _mm512_permutex2var_epi16(a, first, b), x1 = _mm512_permutex2var_epi16(a, second, b);
        for (int i = 0; i < RANKS; ++i) {
          const __m512i t = broadcast_pair(thin.by_pair + row / 2 * thin.Rp + r + i);
          low[i] = dot(low[i], t, x0);
          high[i] = dot(high[i], t, x1);
        }
      }
      for (int i = 0; i < RANKS; ++i) {
        float *sum = sums + (r + i) * lds + col;
        _mm512_storeu_ps(sum, low[i] + _mm512_loadu_ps(sum));
        _mm512_storeu_ps(sum + 16, high[i] + _mm512_loadu_ps(sum + 16));
      }
    }
  }

  static void outer(const Thin &thin, int64_t R, const Element *x, int64_t ld, int64_t rows, int64_t count, float *sums,
                    int64_t lds) {
    int64_t r = 0;
    for (; r + 8 <= R; r += 8) outer_ranks<8>(thin, r, x, ld, rows, count, sums, lds);
    for (; r < R; ++r) outer_ranks<1>(thin, r, x, ld, rows, count, sums, lds);
  }
};

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
#endif
