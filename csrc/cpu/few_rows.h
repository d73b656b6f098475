// y for a handful of rows: the weight streams through the registers once, row by row, where it lies.
//
//   y[m, n] = sum_k x[m, k] W[n, k] + sum_r c T[m, r] B[n, r] + column terms,     T = D(x) A^T
//
// All three are dots of contiguous rows, so no block is transposed; a quantised weight's rows are decoded a chunk at a
// time, or in registers (step_dots.h). Each
// thread takes a share of the columns of y and computes the few sums of T for itself. Rows of x come in sets of four, and K in
// chunks short enough for all sets and some of the weight's rows to lie in the L1 cache together.
#pragma once
#include <type_traits>

#include "../include/philox.h"
#include "../include/quantised.h"
#include "parallel.h"
#include "scratch.h"
#include "step_dots.h"
#include "thin_f32.h"

namespace peftkern {
namespace PEFTKERN_ISA {

constexpr int64_t kFewRows = 16;    // of x, at most
constexpr int kRowSet = 4;          // of them in registers, with
constexpr int kFewColumns = 3;      // columns of y: 12 sums
constexpr int64_t kFewChunk = 256;  // of K
constexpr int64_t kAhead = 512;        // bytes of each row of the weight that are fetched ahead

// Half of two vectors of neighbouring elements, in the cheapest order to widen: pairs of bf16 are split into even and odd ones.
template <int HALF, class T> static inline vf load_half(const T *source) { return load(source + HALF * W); }
template <int HALF> static inline vf load_half(const bf16 *source) {
  vu pairs;
  memcpy(&pairs, source, sizeof pairs);
  return (vf)(HALF ? pairs & 0xffff0000u : pairs << 16);
}

// `count` elements as fp32, in the order in which load_half gives those of a row of T, padded with zeros.
template <class T, class Source> static void arrange(const Source *source, int64_t count, float *target) {
  constexpr bool pairs = std::is_same<T, bf16>::value;
  int64_t i = 0;
  for (; i + 2 * W <= count; i += 2 * W) {
    for (int lane = 0; lane < W; ++lane) {
      target[i + lane] = widen(source[i + (pairs ? 2 * lane : lane)]);
      target[i + W + lane] = widen(source[i + (pairs ? 2 * lane + 1 : W + lane)]);
    }
  }
  if (i == count) return;
  memset(target + i, 0, 2 * W * sizeof(float));
  for (int64_t lane = 0; i + lane < count; ++lane) target[i + (pairs ? lane % 2 * W + lane / 2 : lane)] = widen(source[i + lane]);
}

// `count` elements as fp32, with zeros up to a vector and where a bit is clear.
template <class T> static void widen_row(const T *source, int64_t count, const uint64_t *bits, float *target) {
  for (int64_t k = 0; k < count; k += W) {
    const vf value = k + W <= count ? load(source + k) : load_tail(source + k, count - k);
    store(bits ? select(uint32_t(bits[k / 64] >> k % 64), value) : value, target + k);
  }
}

static inline float sum_of(vf value) {
  float lanes[W];
  store(value, lanes);
  for (int half = W / 2; half; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

template <class X, class A> struct FewRows {
  // sums[i * kFewRows + m] += row i of w times row m of x, lane by lane; `ROUND` rounds w to X first, `STREAM` fetches ahead.
  template <class T, int COLUMNS, int ROWS, bool ROUND, bool STREAM>
  static inline void dots(const T *w, int64_t ldw, int64_t count, const float *x, int64_t ldx, vf *sums) {
    vf sum[COLUMNS][ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < COLUMNS; ++i) {
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m) sum[i][m] = sums[i * kFewRows + m];
    }
    int64_t k = 0;
    for (; k + 2 * W <= count; k += 2 * W) {
#pragma GCC unroll 16
      for (int i = 0; STREAM && i < COLUMNS; ++i) __builtin_prefetch((const char *)(w + i * ldw + k) + kAhead, 0, 0);
      multiply<COLUMNS, ROWS, ROUND, 0>(w + k, ldw, x + k, ldx, sum);
      multiply<COLUMNS, ROWS, ROUND, 1>(w + k, ldw, x + k, ldx, sum);
    }
    if (k < count) {
      T lanes[COLUMNS][2 * W];
      memset(lanes, 0, sizeof lanes);
      for (int i = 0; i < COLUMNS; ++i) memcpy(lanes[i], w + i * ldw + k, (count - k) * sizeof(T));
      multiply<COLUMNS, ROWS, ROUND, 0>(lanes[0], 2 * W, x + k, ldx, sum);
      multiply<COLUMNS, ROWS, ROUND, 1>(lanes[0], 2 * W, x + k, ldx, sum);
    }
#pragma GCC unroll 16
    for (int i = 0; i < COLUMNS; ++i) {
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m) sums[i * kFewRows + m] = sum[i][m];
    }
  }

  // The weight's vectors stay in registers, x's come from the cache: three and one beside twelve sums.
  template <int COLUMNS, int ROWS, bool ROUND, int HALF, class T>
  __attribute__((always_inline)) static inline void multiply(const T *w, int64_t ldw, const float *x, int64_t ldx, vf sum[COLUMNS][ROWS]) {
    vf value[COLUMNS];
#pragma GCC unroll 16
    for (int i = 0; i < COLUMNS; ++i) {
      value[i] = load_half<HALF>(w + i * ldw);
      if constexpr (ROUND) value[i] = rounded<X>(value[i]);
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
      const vf row = load(x + m * ldx + HALF * W);
#pragma GCC unroll 16
      for (int i = 0; i < COLUMNS; ++i) sum[i][m] += row * value[i];
    }
  }

  // One set of rows of x, or what is left of one.
  template <class T, int COLUMNS, bool ROUND, bool STREAM>
  static inline void dots_of_set(int64_t rows, const T *w, int64_t ldw, int64_t count, const float *x, int64_t ldx, vf *sums) {
    switch (rows) {
      case 1: return dots<T, COLUMNS, 1, ROUND, STREAM>(w, ldw, count, x, ldx, sums);
      case 2: return dots<T, COLUMNS, 2, ROUND, STREAM>(w, ldw, count, x, ldx, sums);
      case 3: return dots<T, COLUMNS, 3, ROUND, STREAM>(w, ldw, count, x, ldx, sums);
      default: return dots<T, COLUMNS, kRowSet, ROUND, STREAM>(w, ldw, count, x, ldx, sums);
    }
  }

  // COLUMNS rows of w, at most kFewChunk long, as fp32 [COLUMNS, kBlock] in arrange's order; padded, since rows that are a
  // power of two apart share their cache sets.
  static constexpr int64_t kBlock = kFewChunk + 6 * W;
  template <class T, int COLUMNS, bool ROUND> static inline void widen_rows(const T *w, int64_t ldw, int64_t count, float *block) {
    int64_t k = 0;
    for (; k + 2 * W <= count; k += 2 * W) {
#pragma GCC unroll 16
      for (int i = 0; i < COLUMNS; ++i) {
        __builtin_prefetch((const char *)(w + i * ldw + k) + kAhead, 0, 0);
        const vf low = load_half<0>(w + i * ldw + k), high = load_half<1>(w + i * ldw + k);
        store(ROUND ? rounded<X>(low) : low, block + i * kBlock + k), store(ROUND ? rounded<X>(high) : high, block + i * kBlock + k + W);
      }
    }
    for (int i = 0; k < count && i < COLUMNS; ++i) {
      T lanes[2 * W];
      memset(lanes, 0, sizeof lanes);
      memcpy(lanes, w + i * ldw + k, (count - k) * sizeof(T));
      const vf low = load_half<0>(lanes), high = load_half<1>(lanes);
      store(ROUND ? rounded<X>(low) : low, block + i * kBlock + k), store(ROUND ? rounded<X>(high) : high, block + i * kBlock + k + W);
    }
  }

  // GROUPS times COLUMNS rows of w against all rows of x. One or two of x take them whole; several sets of x take rows that are
  // stored in 16 bits from a block, where they are widened once.
  template <class T, int COLUMNS, int GROUPS, bool ROUND, bool STREAM>
  static inline void all_dots(int64_t M, const T *w, int64_t ldw, int64_t K, const float *x, int64_t ldx, vf *sums) {
    if (M == 1) return dots<T, COLUMNS * GROUPS, 1, ROUND, STREAM>(w, ldw, K, x, ldx, sums);
    if (M == 2) return dots<T, COLUMNS * GROUPS, 2, ROUND, STREAM>(w, ldw, K, x, ldx, sums);
    for (int64_t k = 0; k < K; k += kFewChunk) {
      const int64_t count = smaller(kFewChunk, K - k);
      for (int group = 0; group < GROUPS; ++group) {
        const T *rows = w + group * COLUMNS * ldw + k;
        vf *out = sums + group * COLUMNS * kFewRows;
        if (M <= kRowSet) {
          dots_of_set<T, COLUMNS, ROUND, STREAM>(M, rows, ldw, count, x + k, ldx, out);
        } else if (sizeof(T) < sizeof(float)) {
          float block[COLUMNS * kBlock];
          widen_rows<T, COLUMNS, ROUND>(rows, ldw, count, block);
          for (int64_t m = 0; m < M; m += kRowSet) {
            dots_of_set<float, COLUMNS, false, false>(M - m, block, kBlock, round_up(count, 2 * W), x + m * ldx + k, ldx, out + m);
          }
        } else {
          for (int64_t m = 0; m < M; m += kRowSet) {
            dots_of_set<T, COLUMNS, ROUND, false>(M - m, rows, ldw, count, x + m * ldx + k, ldx, out + m);
          }
        }
      }
    }
  }

  struct Memory { float *x, *x_thin, *t; int64_t ldx, ldt; bool steps; };

  template <int COLUMNS, int GROUPS, bool ROUND>
  static void columns_of(const Forward &p, const Memory &m, int64_t n, int64_t apart) {
    vf sums[COLUMNS * GROUPS * kFewRows] = {};
    if (p.weight.format == WeightFormat::dense) {
      all_dots<X, COLUMNS, GROUPS, false, true>(p.M, (const X *)p.weight.data + n * p.weight.stride, apart * p.weight.stride, p.K, m.x, m.ldx, sums);
    } else if (m.steps && p.M <= kRowSet) {
      dots_of_rows<X>(p.weight, n, COLUMNS * GROUPS, p.M, m.x, m.ldx, sums, kFewRows);
    } else {  // neighbours: apart is 1
      alignas(64) float rows[COLUMNS * GROUPS * kBlock];
      for (int64_t k = 0; k < p.K; k += kFewChunk) {
        const int64_t count = smaller(kFewChunk, p.K - k);
        if (m.steps) decode_steps<X>(p.weight, n, k, COLUMNS * GROUPS, count, rows, kBlock);
        else decode<X>(p.weight, n, k, COLUMNS * GROUPS, count, rows, kBlock);
        all_dots<float, COLUMNS, GROUPS, false, false>(p.M, rows, kBlock, count, m.x + k, m.ldx, sums);
      }
    }
    all_dots<A, COLUMNS, GROUPS, ROUND, false>(p.M, (const A *)p.B + n * p.R, apart * p.R, p.R, m.t, m.ldt, sums);
    for (int i = 0; i < COLUMNS * GROUPS; ++i, n += apart) {
      float column = p.bias ? widen(((const X *)p.bias)[n]) : 0.f;
      if (p.lora_bias) column += p.scaling * widen(((const A *)p.lora_bias)[n]);
      for (int row = 0; row < p.M; ++row) narrow(sum_of(sums[i * kFewRows + row]) + column, (X *)p.y + row * p.N + n);
    }
  }

  template <int COLUMNS, bool ROUND> static void ranks_of(const Forward &p, const Memory &m, const float *x, int64_t r, bool write, float *scaled) {
    vf sums[COLUMNS * kFewRows] = {};
    all_dots<A, COLUMNS, 1, ROUND, true>(p.M, (const A *)p.A + r * p.K, p.K, p.K, x, m.ldx, sums);
    for (int i = 0; i < COLUMNS; ++i) {
      for (int row = 0; row < p.M; ++row) {
        const float t = p.dropout.scale * sum_of(sums[i * kFewRows + row]);
        if (write) p.s[row * p.R + r + i] = t;
        scaled[row * m.ldt + r + i] = p.scaling * t;
      }
    }
  }

  template <bool ROUND> static void share_of_columns(const Forward &p, Range columns) {
    // What the weight is multiplied with has the order of its rows, a quantised one's once they are decoded; so has what A is.
    // Into a block, int8 was measured faster in its own order.
    const bool quantised = p.weight.format != WeightFormat::dense, to_block = p.M > kRowSet;
    const bool steps = quantised && steps_take<X>(p.weight) && !(to_block && p.weight.format == WeightFormat::int8);
    const bool drops = p.dropout.threshold, own_thin = drops || sizeof(A) != sizeof(X) || (quantised && sizeof(X) == 2) || steps;
    Memory m;
    m.steps = steps;
    m.ldx = round_up(p.K, kFewChunk) + kFewChunk / 2 * 3, m.ldt = round_up(p.R, 2 * W);
    Scratch &memory = worker_scratch();
    memory.reserve(2 * Scratch::bytes<float>(p.M * m.ldx) + 2 * Scratch::bytes<float>(p.M * m.ldt) + Scratch::bytes<float>(m.ldx) +
                   Scratch::bytes<uint64_t>((p.K + 63) / 64));
    m.x = memory.take<float>(p.M * m.ldx), m.x_thin = memory.take<float>(p.M * m.ldx), m.t = memory.take<float>(p.M * m.ldt);
    float *scaled = memory.take<float>(p.M * m.ldt), *kept = memory.take<float>(m.ldx);
    uint64_t *bits = memory.take<uint64_t>((p.K + 63) / 64);
    for (int row = 0; row < p.M; ++row) {
      const X *source = (const X *)p.x + row * p.x_stride;
      if (steps) arrange_steps<X>(p.weight, source, p.K, m.x + row * m.ldx);
      else if (quantised) arrange<float>(source, p.K, m.x + row * m.ldx);
      else arrange<X>(source, p.K, m.x + row * m.ldx);
      if (drops) {
        keep_bits_row(p.dropout, row, 0, p.K, bits);
        widen_row(source, p.K, bits, kept);
        arrange<A>(kept, p.K, m.x_thin + row * m.ldx);
      } else if (own_thin) {
        arrange<A>(source, p.K, m.x_thin + row * m.ldx);
      }
    }
    const float *x_thin = own_thin ? m.x_thin : m.x;
    int64_t r = 0;
    for (; r + kFewColumns <= p.R; r += kFewColumns) ranks_of<kFewColumns, ROUND>(p, m, x_thin, r, columns.begin == 0, scaled);
    for (; r < p.R; ++r) ranks_of<1, ROUND>(p, m, x_thin, r, columns.begin == 0, scaled);
    for (int row = 0; row < p.M; ++row) arrange<A>(scaled + row * m.ldt, p.R, m.t + row * m.ldt);
    // Where memory is what bounds a call, a thread reads kStreams far apart, each of them on and on.
    constexpr int kStreams = 2 * kFewColumns;
    const bool far = !quantised && (p.M <= kRowSet || sizeof(X) < sizeof(float));
    const int64_t rounds = (columns.end - columns.begin) / kStreams, apart = far ? rounds : 1, next = far ? 1 : kStreams;
    for (int64_t i = 0; i < rounds; ++i) columns_of<kFewColumns, 2, ROUND>(p, m, columns.begin + i * next, apart);
    for (int64_t n = columns.begin + kStreams * rounds; n < columns.end; ++n) columns_of<1, 1, ROUND>(p, m, n, 1);
  }

  // More rows are worth the weight's panels where a tile of them is half as dear: with AVX-512, and in pairs of bf16 again.
  static bool takes(const Forward &p, bool paired) {
    return p.M <= (W < 16 ? kFewRows : paired ? kRowSet / 2 : kRowSet) && !p.weight.transposed;
  }

  static void forward(const Forward &problem) {
    parallel_run(int(smaller(problem.threads, problem.N)), [](void *data, int index, int count) {
      const Forward &p = *static_cast<const Forward *>(data);
      const Range columns = share(p.N, 2 * kFewColumns, index, count);
      if (columns.begin >= columns.end) return;
      if (p.round_factors && sizeof(A) != sizeof(X)) share_of_columns<true>(p, columns);
      else share_of_columns<false>(p, columns);
    }, const_cast<Forward *>(&problem));
  }
};

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
