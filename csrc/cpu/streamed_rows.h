// The products of a handful of rows with a low-rank pair: each factor streams through the registers once, where it lies.
//
//   forward    s = D(x) A^T                dots of x and each row of A
//              y += c (s B^T + lora_bias)  dots of s and each row of B
//   backward   t = dy B                    the rows of B, combined as dy says
//              dx += c D(t A)              the rows of A, combined as t says; in one pass those of the weight too, as dy says
//              dA = c t^T D(x)             and dB = c dy^T s: a row at a time, written once
//
// More rows are worth a packed copy of the factors (bodies.h). A row of x, y, dy and dx lies where `rows` says, for the rows of
// a bank (bank.h). In one pass threads share the columns of dx; no sum's order depends on how.
#pragma once
#include "../include/weight_load.h"
#include "few_rows.h"

namespace peftkern {
namespace PEFTKERN_ISA {

constexpr int kStreamedRows = 4;
constexpr int64_t kFactorAhead = 2048;   // bytes of a row of A that are fetched ahead
constexpr int64_t kStreamedChunk = 512;  // columns of dx that are summed up at a time, in the L1 cache
constexpr int kCombined = 4;             // rows that are combined at a time
constexpr int64_t kShortSum = 1024;      // rows that are, before they are added to others: short sums keep errors small

template <class X, class A> struct StreamedRows {
  // Rows of a matrix of X or A in fp32, [ROWS, ld], with zeros behind the last column.
  struct Wide {
    float *data;
    int64_t ld;
    float *row(int i) const { return data + i * ld; }
  };
  static int64_t wide_size(int rows, int64_t columns) { return Scratch::bytes<float>(rows * round_up(columns, W)); }
  static Wide take(Scratch &memory, int rows, int64_t columns) {
    return {memory.take<float>(rows * round_up(columns, W)), round_up(columns, W)};
  }

  // The next W numbers of a row that has `left` of them, zeros behind its end; what lies there is read up to `end`, and dropped.
  template <bool ROUND, class T> static inline vf part(const T *source, int64_t left, const T *end) {
    const vf value = left >= W ? load(source) : end - source >= W ? select((1u << left) - 1, load(source)) : last_part(source, left);
    return ROUND ? rounded<X>(value) : value;
  }
  template <class T> __attribute__((noinline)) static vf last_part(const T *source, int64_t left) { return load_tail(source, left); }

  // s[:, r ... r + RANKS]
  template <int ROWS, int RANKS, bool ROUND> static inline void dots(const Forward &p, Wide x, int64_t r, Wide t) {
    const A *a = (const A *)p.A + r * p.K, *end = (const A *)p.A + p.R * p.K;
    vf sums[ROWS][RANKS] = {};
    const auto add = [&](int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int j = 0; j < RANKS; ++j) {
        const vf value = part<ROUND>(a + j * p.K + k, p.K - k, end);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) sums[i][j] += value * load(x.row(i) + k);
      }
    };
    for (int64_t k = 0; k < p.K; k += W) {
      for (int j = 0; j < RANKS; ++j) __builtin_prefetch((const char *)(a + j * p.K + k) + kFactorAhead);
      add(k);
    }
    for (int i = 0; i < ROWS; ++i) {
      for (int j = 0; j < RANKS; ++j) t.row(i)[r + j] = p.s[i * p.R + r + j] = p.dropout.scale * sum_of(sums[i][j]);
    }
  }

  template <int ROWS, bool ROUND> static void forward(const Forward &p, const int64_t *rows) {
    Scratch &memory = worker_scratch();
    memory.reserve(wide_size(ROWS, p.K) + wide_size(ROWS, p.R) + Scratch::bytes<uint64_t>((p.K + 63) / 64));
    const Wide x = take(memory, ROWS, p.K), t = take(memory, ROWS, p.R);
    uint64_t *bits = p.dropout.threshold ? memory.take<uint64_t>((p.K + 63) / 64) : nullptr;
    for (int i = 0; i < ROWS; ++i) {
      if (bits) keep_bits_row(p.dropout, i, 0, p.K, bits);
      widen_row((const X *)p.x + rows[i] * p.x_stride, p.K, bits, x.row(i));
    }
    memset(t.data, 0, ROWS * t.ld * sizeof(float));
    constexpr int kRanks = ROWS == 1 ? 4 : 2;  // four sums and more hide what a product waits for the one before
    int64_t r = 0;
    for (; r + kRanks <= p.R; r += kRanks) dots<ROWS, kRanks, ROUND>(p, x, r, t);
    for (; r < p.R; ++r) dots<ROWS, 1, ROUND>(p, x, r, t);
    const A *B = (const A *)p.B, *end = B + p.N * p.R;
    for (int64_t n = 0; n < p.N; n += W) {
      const int64_t width = smaller(W, p.N - n);
      for (int i = 0; i < ROWS; ++i) {
        vf sums[W] = {};
        for (int64_t q = 0; q < p.R; q += W) {
          const vf value = load(t.row(i) + q);
#pragma GCC unroll 16
          for (int j = 0; j < W; ++j) sums[j] += value * part<ROUND>(B + (n + smaller(j, width - 1)) * p.R + q, p.R - q, end);
        }
        vf update = lane_sums(sums);
        if (p.lora_bias) update += part<false>((const A *)p.lora_bias + n, width, (const A *)p.lora_bias + p.N);
        X *target = (X *)p.y + rows[i] * p.N + n;
        if (width == W) store(load(target) + p.scaling * update, target);
        else store_tail(load_tail(target, width) + p.scaling * update, target, width);
      }
    }
  }

  // sums[i, :] += sum_q factor[i, q] F[q, :] for `columns` of F [Q, ldf]
  template <int ROWS, bool ROUND, class T> static void combine(const T *f, int64_t ldf, int64_t Q, int64_t columns, const T *end, Wide factor, Wide sums) {
    const auto some = [&](int64_t q, auto count) {
      constexpr int kCount = count;
      for (int64_t k = 0; k < columns; k += W) {
        vf sum[ROWS] = {};
#pragma GCC unroll 4
        for (int j = 0; j < kCount; ++j) {
          const vf value = part<ROUND>(f + (q + j) * ldf + k, columns - k, end);
#pragma GCC unroll 4
          for (int i = 0; i < ROWS; ++i) sum[i] += factor.row(i)[q + j] * value;
        }
        for (int i = 0; i < ROWS; ++i) store(load(sums.row(i) + k) + sum[i], sums.row(i) + k);
      }
    };
    int64_t q = 0;
    for (; q + kCombined <= Q; q += kCombined) some(q, std::integral_constant<int, kCombined>());
    for (; q < Q; ++q) some(q, std::integral_constant<int, 1>());
  }

  // The same of many rows, by way of `part_sums`.
  template <int ROWS, bool ROUND, class T> static void combine_many(const T *f, int64_t ldf, int64_t Q, int64_t columns, const T *end, Wide factor, Wide part_sums, Wide sums) {
    for (int64_t q = 0; q < Q; q += kShortSum) {
      memset(part_sums.data, 0, ROWS * part_sums.ld * sizeof(float));
      combine<ROWS, ROUND>(f + q * ldf, ldf, smaller(kShortSum, Q - q), columns, end, {factor.data + q, factor.ld}, part_sums);
      for (int i = 0; i < ROWS; ++i) {
        for (int64_t k = 0; k < columns; k += W) store(load(sums.row(i) + k) + load(part_sums.row(i) + k), sums.row(i) + k);
      }
    }
  }

  // out[q, :] = c sum_i factor[i, q] row[i, :]; up to `end`, what is written behind a row's end is overwritten by the next.
  template <int ROWS> static void outer(Wide factor, int64_t Q, Wide row, int64_t columns, float c, A *out, int64_t ldout, const A *end) {
    for (int64_t q = 0; q < Q; ++q) {
      for (int64_t k = 0; k < columns; k += W) {
        vf sum = {};
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) sum += factor.row(i)[q] * load(row.row(i) + k);
        A *target = out + q * ldout + k;
        if (k + W <= columns || end - target >= W) store(c * sum, target);
        else store_tail(c * sum, target, columns - k);
      }
    }
  }

  // dB of the columns `N` of dy, dx and dA of the columns `K`.
  template <int ROWS, bool ROUND> static void backward(const Backward &p, const int64_t *rows, Range N, Range K) {
    constexpr int64_t kWords = kStreamedChunk / 64;
    Scratch &memory = worker_scratch();
    memory.reserve(wide_size(ROWS, p.N) + 3 * wide_size(ROWS, p.R) + 3 * wide_size(ROWS, kStreamedChunk));
    const Wide dy = take(memory, ROWS, p.N), s = take(memory, ROWS, p.R), t = take(memory, ROWS, p.R), part_t = take(memory, ROWS, p.R);
    const Wide x = take(memory, ROWS, kStreamedChunk), dx = take(memory, ROWS, kStreamedChunk), part_dx = take(memory, ROWS, kStreamedChunk);
    for (int i = 0; i < ROWS; ++i) {
      widen_row((const X *)p.dy + rows[i] * p.dy_stride, p.N, nullptr, dy.row(i));
      if (p.dB) widen_row(p.s + i * p.R, p.R, nullptr, s.row(i));
    }
    if (p.dB) outer<ROWS>({dy.data + N.begin, dy.ld}, N.end - N.begin, s, p.R, p.scaling, (A *)p.dB + N.begin * p.R, p.R, (A *)p.dB + N.end * p.R);
    if ((!p.dx && !p.dA) || K.begin >= K.end) return;
    const A *B = (const A *)p.B, *a_end = (const A *)p.A + p.R * p.K;
    memset(t.data, 0, ROWS * t.ld * sizeof(float));
    combine_many<ROWS, ROUND>(B, p.R, p.N, p.R, B + p.N * p.R, dy, part_t, t);
    const float c = p.scaling * p.dropout.scale;
    for (int64_t k = K.begin; k < K.end; k += kStreamedChunk) {
      const int64_t width = smaller(kStreamedChunk, K.end - k);
      uint64_t bits[ROWS][kWords];
      for (int i = 0; i < ROWS; ++i) {
        if (p.dropout.threshold) keep_bits_row(p.dropout, i, k, width, bits[i]);
        if (p.dA) widen_row((const X *)p.x + rows[i] * p.x_stride + k, width, p.dropout.threshold ? bits[i] : nullptr, x.row(i));
      }
      if (p.dA) outer<ROWS>(t, p.R, x, width, c, (A *)p.dA + k, p.K, (A *)p.dA + k);
      if (!p.dx) continue;
      memset(dx.data, 0, ROWS * dx.ld * sizeof(float));
      combine<ROWS, ROUND>((const A *)p.A + k, p.K, p.R, width, a_end, t, dx);
      for (int i = 0; i < ROWS; ++i) {
        const X *before = p.one_pass && !p.onto ? nullptr : (const X *)p.dx + rows[i] * p.K + k;
        for (int64_t q = 0; q < width; q += W) {
          vf value = c * load(dx.row(i) + q);
          if (p.dropout.threshold) value = select(uint32_t(bits[i][q / 64] >> q % 64), value);
          if (before) value += q + W <= width ? load(before + q) : load_tail(before + q, width - q);
          store(value, dx.row(i) + q);
        }
      }
      if (p.one_pass) {
        const X *w = (const X *)p.weight.data + k, *end = (const X *)p.weight.data + (p.N - 1) * p.weight.stride + p.K;
        combine_many<ROWS, false>(w, p.weight.stride, p.N, width, end, dy, part_dx, dx);
      }
      for (int i = 0; i < ROWS; ++i) {
        X *target = (X *)p.dx + rows[i] * p.K + k;
        for (int64_t q = 0; q < width; q += W) {
          if (q + W <= width) store(load(dx.row(i) + q), target + q);
          else store_tail(load(dx.row(i) + q), target + q, width - q);
        }
      }
    }
  }

  // f with the number of rows and whether the factors are rounded, as constants.
  template <int ROWS = kStreamedRows, class F> static void with(const Problem &p, F f) {
    if constexpr (ROWS > 1) {
      if (p.M < ROWS) return with<ROWS - 1>(p, f);
    }
    if constexpr (std::is_same<X, bf16>::value && sizeof(A) != sizeof(X)) {  // fp16 is multiplied in fp32
      if (p.round_factors) return f(std::integral_constant<int, ROWS>(), std::true_type());
    }
    f(std::integral_constant<int, ROWS>(), std::false_type());
  }

  static void some_rows(const Forward &p, const int64_t *rows) {
    with(p, [&](auto count, auto rounds) { forward<count, rounds>(p, rows); });
  }
  static void some_rows(const Backward &p, const int64_t *rows, int index = 0, int threads = 1) {
    const Range N = share(p.N, 1, index, threads), K = share(p.K, 64, index, threads);
    with(p, [&](auto count, auto rounds) { backward<count, rounds>(p, rows, N, K); });
  }

  static bool takes(const Forward &p) { return p.M <= kStreamedRows && !p.one_pass; }
  static bool takes(const Backward &p) {
    return p.M <= kStreamedRows && (!p.one_pass || (p.weight.format == WeightFormat::dense && !p.weight.transposed));
  }
  static void forward(const Forward &p) { some_rows(p, kInOrder); }
  static void backward(const Backward &problem) {
    parallel_run(problem.one_pass && problem.dx ? problem.threads : 1, [](void *data, int index, int count) {
      some_rows(*static_cast<const Backward *>(data), kInOrder, index, count);
    }, const_cast<Backward *>(&problem));
  }
  static constexpr int64_t kInOrder[kStreamedRows] = {0, 1, 2, 3};
};

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
