// The thin products in fp32, for any storage type and any instruction set.
//
//   shrink   T[m, r] += sum_q X[m, q] F[q, r]          F packed [Q, Rp], Rp = R rounded up to a vector
//   expand   Z[m, p] += c D(sum_r T[m, r] G[r, p])     G packed [R, Pp], Pp = P rounded up to a vector
//   outer    S[r, q] += sum_m T[m, r] X[m, q]          S is an fp32 accumulator [R, >= Qp]
//
// X comes as a block of `rows` rows that load_block has widened and masked. Lanes of T beyond R are zero.
#pragma once
#include "../include/words.h"

namespace peftkern {
namespace PEFTKERN_ISA {

template <class X> struct ThinF32 {
  typedef X Storage;
  typedef float Word;     // of the product with the frozen weight (words.h)
  typedef float Element;  // of blocks
  typedef float Packed;   // of factors
  static constexpr int64_t kRows = 16, kColumns = 256, kPad = W;

  static int64_t pairs(int64_t count) { return count; }  // packed rows that `count` contracted elements take

  static float rounded(float value, bool round) {
    if (!round) return value;
    X narrow_value;
    narrow(value, &narrow_value);
    return widen(narrow_value);
  }

  // out[row, col] = F[row, col]
  template <class F> static void pack_interleaved(const F *f, int64_t rows, int64_t cols, Packed *out, int64_t ld, bool round) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t col = 0; col < cols; ++col) out[row * ld + col] = rounded(widen(f[row * cols + col]), round);
      for (int64_t col = cols; col < ld; ++col) out[row * ld + col] = 0;
    }
  }

  // out[col, row] = F[row, col]
  template <class F> static void pack_transposed(const F *f, int64_t rows, int64_t cols, Packed *out, int64_t ld, bool round) {
    for (int64_t col = 0; col < cols; ++col) {
      for (int64_t row = 0; row < rows; ++row) out[col * ld + row] = rounded(widen(f[row * cols + col]), round);
      for (int64_t row = rows; row < ld; ++row) out[col * ld + row] = 0;
    }
  }

  // Widens a block into `buffer`; where there are bits, elements without one become zero.
  static const Element *load_block(const X *x, int64_t stride, int64_t rows, int64_t count, const uint64_t *bits,
                                   int64_t bits_stride, Element *buffer, int64_t *ld) {
    *ld = kColumns;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t col = 0; col < count; col += W) {
        const X *source = x + row * stride + col;
        vf value = col + W <= count ? load(source) : load_tail(source, count - col);
        if (bits) value = select(uint32_t(bits[row * bits_stride + col / 64] >> (col % 64)), value);
        store(value, buffer + row * kColumns + col);
      }
    }
    return buffer;
  }

  template <int ROWS> static void shrink_rows(const Element *x, int64_t ld, int64_t count, const Packed *f, int64_t Rp, float *t) {
    for (int64_t r = 0; r < Rp; r += W) {
      vf sum[ROWS] = {};  // of this block: a short sum is added to the long one, so that rounding errors stay small
      for (int64_t q = 0; q < count; ++q) {
        const vf factor = load(f + q * Rp + r);
        for (int i = 0; i < ROWS; ++i) sum[i] += x[i * ld + q] * factor;
      }
      for (int i = 0; i < ROWS; ++i) store(load(t + i * Rp + r) + sum[i], t + i * Rp + r);
    }
  }

  static void shrink(const Element *x, int64_t ld, int64_t rows, int64_t count, const Packed *f, int64_t Rp, float *t) {
    int64_t row = 0;
    for (; row + 8 <= rows; row += 8) shrink_rows<8>(x + row * ld, ld, count, f, Rp, t + row * Rp);
    for (; row < rows; ++row) shrink_rows<1>(x + row * ld, ld, count, f, Rp, t + row * Rp);
  }

  // What expand and outer read T through; T stays in fp32.
  struct Thin { float *t; int64_t Rp; };
  static int64_t thin_size(int64_t Rp) { return kRows * Rp; }
  static Thin make_thin(const float *t, int64_t rows, int64_t R, int64_t Rp, float *memory) {
    for (int64_t row = 0; row < rows; ++row) memcpy(memory + row * Rp, t + row * Rp, R * sizeof(float));
    return {memory, Rp};
  }

  template <int ROWS> static void expand_tile(const Thin &thin, int64_t row, int64_t R, const Packed *g, int64_t ldg, float c,
                                              const float *column, const uint64_t *bits, int64_t bits_stride, X *z,
                                              int64_t stride, int64_t col, int64_t width) {
    vf sum[ROWS] = {};
    for (int64_t r = 0; r < R; ++r) {
      const vf factor = load(g + r * ldg + col);
      for (int i = 0; i < ROWS; ++i) sum[i] += thin.t[(row + i) * thin.Rp + r] * factor;
    }
    for (int i = 0; i < ROWS; ++i) {
      vf value = c * sum[i];
      if (bits) value = select(uint32_t(bits[i * bits_stride + col / 64] >> (col % 64)), value);
      if (column) value += load(column + col);
      X *target = z + i * stride + col;
      if (width == W) store(load(target) + value, target);
      else store_tail(load_tail(target, width) + value, target, width);
    }
  }

  // `bits` and `column` start at Z's first column; both may be null.
  static void expand(const Thin &thin, int64_t rows, int64_t R, const Packed *g, int64_t ldg, float c, const float *column,
                     const uint64_t *bits, int64_t bits_stride, X *z, int64_t stride, int64_t count) {
    for (int64_t row = 0; row < rows;) {
      const bool four = row + 4 <= rows;
      const uint64_t *row_bits = bits ? bits + row * bits_stride : nullptr;
      for (int64_t col = 0; col < count; col += W) {
        const int64_t width = smaller(W, count - col);
        if (four) expand_tile<4>(thin, row, R, g, ldg, c, column, row_bits, bits_stride, z + row * stride, stride, col, width);
        else expand_tile<1>(thin, row, R, g, ldg, c, column, row_bits, bits_stride, z + row * stride, stride, col, width);
      }
      row += four ? 4 : 1;
    }
  }

  template <int RANKS, int VECTORS> static void outer_tile(const Thin &thin, int64_t r, const Element *x, int64_t ld, int64_t rows,
                                                           float *sums, int64_t lds) {
    vf sum[VECTORS][RANKS] = {};
    for (int64_t row = 0; row < rows; ++row) {
      for (int v = 0; v < VECTORS; ++v) {
        const vf value = load(x + row * ld + v * W);
        for (int i = 0; i < RANKS; ++i) sum[v][i] += thin.t[row * thin.Rp + r + i] * value;
      }
    }
    for (int v = 0; v < VECTORS; ++v) {
      for (int i = 0; i < RANKS; ++i) store(load(sums + (r + i) * lds + v * W) + sum[v][i], sums + (r + i) * lds + v * W);
    }
  }

  // The lanes behind a row's end are summed up too and never read.
  template <int RANKS> static void outer_ranks(const Thin &thin, int64_t r, const Element *x, int64_t ld, int64_t rows,
                                               int64_t count, float *sums, int64_t lds) {
    int64_t col = 0;
    for (; col + 2 * W <= count; col += 2 * W) outer_tile<RANKS, 2>(thin, r, x + col, ld, rows, sums + col, lds);
    for (; col < count; col += W) outer_tile<RANKS, 1>(thin, r, x + col, ld, rows, sums + col, lds);
  }

  static void outer(const Thin &thin, int64_t R, const Element *x, int64_t ld, int64_t rows, int64_t count, float *sums,
                    int64_t lds) {
    int64_t r = 0;
    for (; r + 4 <= R; r += 4) outer_ranks<4>(thin, r, x, ld, rows, count, sums, lds);
    for (; r < R; ++r) outer_ranks<1>(thin, r, x, ld, rows, count, sums, lds);
  }
};

// The same beside a frozen product in pairs of bf16: what packs, blocks and multiplies these, as any processor can run it.
struct ThinPaired : ThinF32<bf16> {
  typedef pair Word;
};

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
