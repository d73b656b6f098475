// y for a handful of rows: the weight streams through the registers once, row by row, where it lies.
//
//   y[m, n] = sum_k x[m, k] W[n, k] + sum_r c T[m, r] B[n, r] + column terms,     T = x A^T
//
// All three are dots of contiguous rows, so no block is packed or transposed. Each thread takes a share of the columns of y and
// computes the few sums of T for itself. There is no dropout here; a caller that wants it takes fused.h.
#pragma once
#include <type_traits>

#include "parallel.h"
#include "scratch.h"
#include "thin_f32.h"

namespace peftkern {
namespace PEFTKERN_ISA {

constexpr int64_t kDecodeRows = 4;     // of x
constexpr int64_t kDecodeColumns = 4;  // of y, at a time
constexpr int64_t kAhead = 2048;       // bytes of each row that are fetched ahead

// Two vectors of neighbouring elements, in the cheapest order to widen: pairs of bf16 are split into even and odd ones.
template <class T> static inline void load_two(const T *source, vf *first, vf *second) { *first = load(source), *second = load(source + W); }
static inline void load_two(const bf16 *source, vf *first, vf *second) {
  vu pairs;
  memcpy(&pairs, source, sizeof pairs);
  *first = (vf)(pairs << 16), *second = (vf)(pairs & 0xffff0000u);
}
template <class T> static inline void load_two_tail(const T *source, int64_t count, vf *first, vf *second) {
  T lanes[2 * W];
  memset(lanes, 0, sizeof lanes);
  memcpy(lanes, source, count * sizeof(T));
  load_two(lanes, first, second);
}

// `count` elements as fp32, in the order in which load_two gives those of a row of T, padded with zeros.
template <class T, class Source> static void arrange(const Source *source, int64_t count, float *target) {
  constexpr bool pairs = std::is_same<T, bf16>::value;
  memset(target, 0, round_up(count, 2 * W) * sizeof(float));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t lane = i % (2 * W);
    target[i - lane + (pairs ? lane % 2 * W + lane / 2 : lane)] = widen(source[i]);
  }
}

static inline float sum_of(vf value) {
  float total = 0;
  for (int lane = 0; lane < W; ++lane) total += value[lane];
  return total;
}

template <class X, class A> struct Decode {
  // sums[i][m] += row i of w times row m of x, lane by lane; `round` rounds w to X first.
  template <class T, int COLUMNS, int ROWS, bool ROUND>
  static inline void dots(const T *w, int64_t ldw, int64_t count, const float *x, int64_t ldx, vf sums[COLUMNS][ROWS]) {
    const auto step = [&](int64_t k, auto load_pair) {
#pragma GCC unroll 4
      for (int i = 0; i < COLUMNS; ++i) {
        vf first, second;
        load_pair(w + i * ldw + k, &first, &second);
        if constexpr (ROUND) first = rounded(first), second = rounded(second);
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; ++m) {
          sums[i][m] += first * load(x + m * ldx + k);
          sums[i][m] += second * load(x + m * ldx + k + W);
        }
      }
    };
    int64_t k = 0;
    for (; k + 2 * W <= count; k += 2 * W) {
      for (int i = 0; i < COLUMNS; ++i) __builtin_prefetch((const char *)(w + i * ldw + k) + kAhead);
      step(k, [](const T *source, vf *first, vf *second) { load_two(source, first, second); });
    }
    const int64_t rest = count - k;
    if (rest > 0) step(k, [rest](const T *source, vf *first, vf *second) { load_two_tail(source, rest, first, second); });
  }

  static vf rounded(vf value) {
    X lanes[W];
    store(value, lanes);
    return load(lanes);
  }

  struct Memory { float *x, *x_thin, *t; int64_t ldx, ldt; };

  template <int COLUMNS, int ROWS, bool ROUND>
  static void columns_of(const Forward &p, const Memory &m, int64_t n) {
    vf sums[COLUMNS][ROWS] = {};
    dots<X, COLUMNS, ROWS, false>((const X *)p.weight.data + n * p.weight.stride, p.weight.stride, p.K, m.x, m.ldx, sums);
    dots<A, COLUMNS, ROWS, ROUND>((const A *)p.B + n * p.R, p.R, p.R, m.t, m.ldt, sums);
    for (int i = 0; i < COLUMNS; ++i) {
      float column = p.bias ? widen(((const X *)p.bias)[n + i]) : 0.f;
      if (p.lora_bias) column += p.scaling * widen(((const A *)p.lora_bias)[n + i]);
      for (int row = 0; row < ROWS; ++row) narrow(sum_of(sums[i][row]) + column, (X *)p.y + row * p.N + n + i);
    }
  }

  template <int ROWS, bool ROUND> static void share_of_columns(const Forward &p, Range columns) {
    Memory m;
    m.ldx = round_up(p.K, 2 * W), m.ldt = round_up(p.R, 2 * W);
    Scratch &memory = worker_scratch();
    memory.reserve(2 * Scratch::bytes<float>(ROWS * m.ldx) + 2 * Scratch::bytes<float>(ROWS * m.ldt));
    m.x = memory.take<float>(ROWS * m.ldx), m.x_thin = memory.take<float>(ROWS * m.ldx), m.t = memory.take<float>(ROWS * m.ldt);
    float *scaled = memory.take<float>(ROWS * m.ldt);
    for (int row = 0; row < ROWS; ++row) {
      const X *source = (const X *)p.x + row * p.x_stride;
      arrange<X>(source, p.K, m.x + row * m.ldx);
      if (sizeof(A) != sizeof(X)) arrange<A>(source, p.K, m.x_thin + row * m.ldx);
    }
    const float *x_thin = sizeof(A) != sizeof(X) ? m.x_thin : m.x;
    for (int64_t r = 0; r < p.R; ++r) {
      vf sums[1][ROWS] = {};
      dots<A, 1, ROWS, ROUND>((const A *)p.A + r * p.K, p.K, p.K, x_thin, m.ldx, sums);
      for (int row = 0; row < ROWS; ++row) {
        const float t = sum_of(sums[0][row]);
        if (columns.begin == 0) p.s[row * p.R + r] = t;
        scaled[row * m.ldt + r] = p.scaling * t;
      }
    }
    for (int row = 0; row < ROWS; ++row) arrange<A>(scaled + row * m.ldt, p.R, m.t + row * m.ldt);
    int64_t n = columns.begin;
    for (; n + kDecodeColumns <= columns.end; n += kDecodeColumns) columns_of<kDecodeColumns, ROWS, ROUND>(p, m, n);
    for (; n < columns.end; ++n) columns_of<1, ROWS, ROUND>(p, m, n);
  }

  template <int ROWS> static void rows_of(const Forward &p, Range columns) {
    if (ROWS > 1 && p.M < ROWS) return rows_of<ROWS == 1 ? 1 : ROWS - 1>(p, columns);
    if (p.round_factors && sizeof(A) != sizeof(X)) share_of_columns<ROWS, true>(p, columns);
    else share_of_columns<ROWS, false>(p, columns);
  }

  static bool takes(const Forward &p) { return p.M <= kDecodeRows && !p.dropout.threshold && !p.weight.transposed; }

  static void forward(const Forward &problem) {
    parallel_run(int(smaller(problem.threads, problem.N)), [](void *data, int index, int count) {
      const Forward &p = *static_cast<const Forward *>(data);
      const Range columns = share(p.N, kDecodeColumns, index, count);
      if (columns.begin < columns.end) rows_of<kDecodeRows>(p, columns);
    }, const_cast<Forward *>(&problem));
  }
};

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
