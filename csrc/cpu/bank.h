// A batch whose rows belong to several adapters: the base for all rows, then each segment's low-rank update.
//
//   forward    y = x W^T + bias;   s_e = D_e(x_e) A_e^T,   y_e += c_e s_e B_e^T        for the rows e of each segment
//   backward   dx = dy W;          t_e = dy_e B_e,         dx_e += c_e D_e(t_e A_e),   dA_e, dB_e as for one adapter
//
// A segment is a call of its own for the bodies: its rows are used where they lie if they follow one another, else they are
// gathered, worked on and scattered. Segments of a few rows, which is what decoding has, share one parallel region and read
// each factor once, where it lies.
#pragma once
#include <memory>

#include "bodies.h"

namespace peftkern {
namespace PEFTKERN_ISA {

static void forward(const Forwards &calls);
static void backward(const Backward &call);

// y and s of at most kStreamedRows rows without dropout; every factor streams through the registers once.
constexpr int kStreamedRows = 4;
constexpr int64_t kFactorAhead = 2048;  // bytes of a row of A that are fetched ahead
template <class X, class A> struct StreamedRows {
  // Rounded to X and widened again; for bf16 in the integers that an fp32 is made of.
  static inline vf rounded(vf value) {
    if constexpr (std::is_same<X, bf16>::value) {
      const vu bits = (vu)value, is_nan = (vu)(value != value);
      return (vf)((is_nan & bits) | (~is_nan & ((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u)));
    } else {
      X lanes[W];
      store(value, lanes);
      return load(lanes);
    }
  }
  template <bool ROUND> static inline vf factor(const A *source) { return ROUND ? rounded(load(source)) : load(source); }
  template <bool ROUND> static inline vf factor_tail(const A *source, int64_t count) {
    return count >= W ? factor<ROUND>(source) : ROUND ? rounded(load_tail(source, count)) : load_tail(source, count);
  }

  // sums[i][j] = b[j] . t[i], lane by lane, over R ranks.
  template <int ROWS, bool ROUND> static inline void expand(const A *b, int64_t R, int64_t width, const float *t, int64_t ldt, vf sums[ROWS][W]) {
    for (int i = 0; i < ROWS; ++i) for (int j = 0; j < W; ++j) sums[i][j] = vf{};
    if (width < W || R % W) {
      for (int64_t r = 0; r < R; r += W) {
        for (int64_t j = 0; j < width; ++j) {
          const vf value = factor_tail<ROUND>(b + j * R + r, R - r);
          for (int i = 0; i < ROWS; ++i) sums[i][j] += value * load(t + i * ldt + r);
        }
      }
      return;
    }
    for (int64_t r = 0; r < R; r += W) {
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) {
        const vf value = factor<ROUND>(b + j * R + r);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) sums[i][j] += value * load(t + i * ldt + r);
      }
    }
  }

  template <int ROWS, bool ROUND> static void run(const Forward &p, const int64_t *rows) {
    const int64_t ldx = round_up(p.K, W), ldt = round_up(p.R, W);
    Scratch &memory = worker_scratch();
    memory.reserve(Scratch::bytes<float>(ROWS * ldx) + Scratch::bytes<float>(ROWS * ldt));
    float *x = memory.take<float>(ROWS * ldx), *t = memory.take<float>(ROWS * ldt);
    memset(t, 0, ROWS * ldt * sizeof(float));
    for (int i = 0; i < ROWS; ++i) {
      const X *source = (const X *)p.x + rows[i] * p.x_stride;
      for (int64_t k = 0; k < p.K; k += W) store(k + W <= p.K ? load(source + k) : load_tail(source + k, p.K - k), x + i * ldx + k);
    }
    for (int64_t r = 0; r < p.R; ++r) {
      const A *a = (const A *)p.A + r * p.K;
      vf even[ROWS] = {}, odd[ROWS] = {};
      int64_t k = 0;
      for (; k + 2 * W <= p.K; k += 2 * W) {
        __builtin_prefetch((const char *)(a + k) + kFactorAhead);
        const vf first = factor<ROUND>(a + k), second = factor<ROUND>(a + k + W);
        for (int i = 0; i < ROWS; ++i) even[i] += first * load(x + i * ldx + k), odd[i] += second * load(x + i * ldx + k + W);
      }
      for (; k < p.K; k += W) {
        const vf last = factor_tail<ROUND>(a + k, p.K - k);
        for (int i = 0; i < ROWS; ++i) even[i] += last * load(x + i * ldx + k);
      }
      for (int i = 0; i < ROWS; ++i) t[i * ldt + r] = p.s[i * p.R + r] = sum_of(even[i] + odd[i]);
    }
    for (int64_t n = 0; n < p.N; n += W) {
      const int64_t width = smaller(W, p.N - n);
      vf sums[ROWS][W];
      expand<ROWS, ROUND>((const A *)p.B + n * p.R, p.R, width, t, ldt, sums);
      for (int i = 0; i < ROWS; ++i) {
        transpose(sums[i]);
        vf update = {};
        for (int j = 0; j < W; ++j) update += sums[i][j];
        X *target = (X *)p.y + rows[i] * p.N + n;
        if (width == W) store(load(target) + p.scaling * update, target);
        else store_tail(load_tail(target, width) + p.scaling * update, target, width);
      }
    }
  }

  template <int ROWS = kStreamedRows> static void of(const Forward &p, const int64_t *rows) {
    if constexpr (ROWS > 1) {
      if (p.M < ROWS) return of<ROWS - 1>(p, rows);
    }
    if (p.round_factors && sizeof(A) != sizeof(X)) run<ROWS, true>(p, rows);
    else run<ROWS, false>(p, rows);
  }
};

template <class X> static void few_rows(const Forward &p, const int64_t *rows) {
  if (p.adapter_dtype == DType::float32) StreamedRows<X, float>::of(p, rows);
  else StreamedRows<X, X>::of(p, rows);
}
static void few_rows(const Forward &p, const int64_t *rows) {
  if (p.dtype == DType::float32) few_rows<float>(p, rows);
  else if (p.dtype == DType::float16) few_rows<fp16>(p, rows);
  else few_rows<bf16>(p, rows);
}

// A segment's operands in the fields of a problem; the product with the frozen weight is done.
template <class Call> static void take_segment(const Segment &segment, Call *call) {
  call->M = segment.count, call->R = segment.R;
  call->adapter_dtype = segment.adapter_dtype, call->scaling = segment.scaling, call->dropout = segment.dropout;
  call->A = segment.A, call->B = segment.B;
  call->one_pass = false;
}

// Rows of a matrix that an index names, next to each other: where they lie, or in a copy.
class Gathered {
 public:
  Gathered(const void *data, int64_t stride, int64_t columns, int64_t element, const int64_t *rows, int64_t count, int threads)
      : origin(static_cast<char *>(const_cast<void *>(data))), pitch(stride * element), bytes(columns * element), rows(rows), count(count), threads(threads) {
    if (!data) return;
    for (int64_t i = 1; i < count && adjacent; ++i) adjacent = rows[i] == rows[0] + i;
    if (adjacent) return;
    copy.reset(new char[count * bytes]);
    move([](Gathered &g, int64_t i) { memcpy(g.copy.get() + i * g.bytes, g.origin + g.rows[i] * g.pitch, g.bytes); });
  }
  void *data() { return !origin ? nullptr : adjacent ? origin + rows[0] * pitch : copy.get(); }
  int64_t stride(int64_t element) const { return (adjacent ? pitch : bytes) / element; }
  void scatter() {
    if (copy) move([](Gathered &g, int64_t i) { memcpy(g.origin + g.rows[i] * g.pitch, g.copy.get() + i * g.bytes, g.bytes); });
  }

 private:
  typedef void (*Step)(Gathered &, int64_t);
  void move(Step one) {
    step = one;
    parallel_run(int(smaller(threads, (count + 15) / 16)), [](void *data, int index, int team) {
      Gathered &g = *static_cast<Gathered *>(data);
      const Range own = share(g.count, 1, index, team);
      for (int64_t i = own.begin; i < own.end; ++i) g.step(g, i);
    }, this);
  }
  char *origin;
  int64_t pitch, bytes;
  const int64_t *rows;
  int64_t count;
  int threads;
  bool adjacent = true;
  std::unique_ptr<char[]> copy;
  Step step = nullptr;
};

static inline int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }
static inline bool is_few(const Segment &segment) { return segment.count <= kStreamedRows && !segment.dropout.threshold; }

static void bank_forward(const Forward &base, const Bank &bank) {
  if (base.one_pass) forward({&base, 1});  // R is 0: the base alone
  struct Few { const Forward &base; const Bank &bank; } few{base, bank};
  int64_t total = 0;
  for (int64_t i = 0; i < bank.size; ++i) total += is_few(bank.segments[i]);
  if (total) parallel_run(int(smaller(base.threads, total)), [](void *data, int index, int team) {
    const Few &f = *static_cast<Few *>(data);
    int64_t number = 0;
    for (int64_t i = 0; i < f.bank.size; ++i) {
      const Segment &segment = f.bank.segments[i];
      if (!is_few(segment) || number++ % team != index || !segment.count || !segment.R) continue;
      Forward call = f.base;
      take_segment(segment, &call);
      call.s += segment.s_begin;
      few_rows(call, f.bank.rows + segment.start);
    }
  }, &few);
  const int64_t element = size_of(base.dtype);
  for (int64_t i = 0; i < bank.size; ++i) {
    const Segment &segment = bank.segments[i];
    if (is_few(segment) || !segment.R) continue;
    const int64_t *rows = bank.rows + segment.start;
    Gathered x(base.x, base.x_stride, base.K, element, rows, segment.count, base.threads);
    Gathered y(base.y, base.N, base.N, element, rows, segment.count, base.threads);
    Forward call = base;
    take_segment(segment, &call);
    call.x = x.data(), call.x_stride = x.stride(element), call.y = y.data(), call.s += segment.s_begin;
    forward({&call, 1});
    y.scatter();
  }
}

static void bank_backward(const Backward &base, const Bank &bank) {
  if (base.one_pass && base.dx) backward(base);
  const int64_t element = size_of(base.dtype);
  for (int64_t i = 0; i < bank.size; ++i) {
    const Segment &segment = bank.segments[i];
    if (!segment.count || !segment.R || !(base.dx || segment.dA)) continue;
    const int64_t *rows = bank.rows + segment.start;
    Gathered dy(base.dy, base.dy_stride, base.N, element, rows, segment.count, base.threads);
    Gathered x(segment.dA ? base.x : nullptr, base.x_stride, base.K, element, rows, segment.count, base.threads);
    Gathered dx(base.dx, base.K, base.K, element, rows, segment.count, base.threads);
    Backward call = base;
    take_segment(segment, &call);
    call.dy = dy.data(), call.dy_stride = dy.stride(element), call.x = x.data(), call.x_stride = x.stride(element);
    call.dx = dx.data(), call.dA = segment.dA, call.dB = segment.dB;
    call.s = segment.dA ? base.s + segment.s_begin : nullptr;
    backward(call);
    dx.scatter();
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
