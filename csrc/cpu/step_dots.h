// Rows of a quantised weight that comes in steps (quantised_steps.h), against a few rows of x in the steps' order.
#pragma once
#include "../include/quantised_steps.h"

namespace peftkern {
namespace PEFTKERN_ISA {

#if defined(__AVX2__) && !defined(__AVX512F__)
// target[i] = source[element(i)], widened; whole steps.
template <class X, class T> static void arrange_steps(const Weight &w, const T *source, int64_t count, float *target) {
  uint8_t from[kStep] = {};
  order_of_steps<X>(w, from);
  for (int64_t k = 0; k < count; k += kStep) {
    for (int i = 0; i < kStep; ++i) target[k + i] = widen(source[k + from[i]]);
  }
}

// sums[m] += row n of w from k on, times row m of x, lane by lane. No decoded number is stored.
template <int ROWS, bool SCALED, class Steps>
static inline void dots_of_steps(Steps &steps, int64_t n, int64_t k, int64_t count, const float *x, int64_t ldx, vf *sums) {
  constexpr int kChains = ROWS <= 2 ? 4 / ROWS : 2;
  vf sum[ROWS], part[ROWS][kChains] = {};
#pragma GCC unroll 4
  for (int m = 0; m < ROWS; ++m) sum[m] = sums[m];
  const auto add_parts = [&](vf factor) {
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
      vf total = part[m][0];
#pragma GCC unroll 4
      for (int chain = 1; chain < kChains; ++chain) total += part[m][chain];
      sum[m] += factor * total;
    }
  };
  steps.prepare(n, k, count);
  for (int64_t end = k + count; k < end; k += kStep, x += kStep) {
    const vf factor = steps.step(n, k, [&](int j, vf value) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; ++m) {
        vf &to = part[m][j % kChains];
        to = (SCALED && j < kChains ? vf{} : to) + load(x + m * ldx + j * W) * value;
      }
    });
    if (SCALED) add_parts(factor);
  }
  if (!SCALED) add_parts(splat(1));
#pragma GCC unroll 4
  for (int m = 0; m < ROWS; ++m) sums[m] = sum[m];
}

// sums[i * ld + m] += the dot of row n + i and row m of x; in chunks of K for which M rows of x stay in the L1 cache.
template <class X> static void dots_of_rows(const Weight &w, int64_t n, int64_t rows, int64_t M, const float *x, int64_t ldx, vf *sums, int64_t ld) {
  with_steps<X>(w, [&](auto steps) {
    const int64_t K = w.columns, chunk = M == 1 ? 4096 : round_up(4096 / M, kStep);
    for (int64_t k = 0; k < K; k += chunk) {
      const int64_t count = smaller(chunk, K - k);
      for (int64_t i = 0; i < rows; ++i) {
        constexpr bool kScaled = decltype(steps)::kScaled;
        switch (M) {
          case 1: dots_of_steps<1, kScaled>(steps, n + i, k, count, x + k, ldx, sums + i * ld); break;
          case 2: dots_of_steps<2, kScaled>(steps, n + i, k, count, x + k, ldx, sums + i * ld); break;
          case 3: dots_of_steps<3, kScaled>(steps, n + i, k, count, x + k, ldx, sums + i * ld); break;
          default: dots_of_steps<4, kScaled>(steps, n + i, k, count, x + k, ldx, sums + i * ld);
        }
      }
    }
  });
}
#else
template <class X, class T> static void arrange_steps(const Weight &, const T *, int64_t, float *) {}
template <class X> static void dots_of_rows(const Weight &, int64_t, int64_t, int64_t, const float *, int64_t, vf *, int64_t) {}
#endif

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
