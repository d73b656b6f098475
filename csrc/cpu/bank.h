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

template <class X, class Call> static void streamed(const Call &p, const int64_t *rows) {
  if (p.adapter_dtype == DType::float32) StreamedRows<X, float>::some_rows(p, rows);
  else StreamedRows<X, X>::some_rows(p, rows);
}
template <class Call> static void streamed(const Call &p, const int64_t *rows) {
  if (p.dtype == DType::float32) streamed<float>(p, rows);
  else if (p.dtype == DType::float16) streamed<fp16>(p, rows);
  else streamed<bf16>(p, rows);
}

// A segment's pair in the fields of a problem; the product with the frozen weight is done.
template <class Call> static void take_pair(const Segment &segment, Call *call) {
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
static inline bool is_few(const Segment &segment) { return segment.count <= kStreamedRows; }

// One segment's operands in the fields of a call; whether there is anything to do.
static bool take_segment(const Segment &segment, Forward *call) {
  take_pair(segment, call);
  call->s += segment.s_begin;
  return segment.count && segment.R;
}
static bool take_segment(const Segment &segment, Backward *call) {
  take_pair(segment, call);
  call->dA = segment.dA, call->dB = segment.dB;
  call->s = segment.dA ? call->s + segment.s_begin : nullptr;
  return segment.count && segment.R && (call->dx || segment.dA);
}

// The segments of a few rows, each of them one thread's.
template <class Call> static void few_rows_of(const Call &base, const Bank &bank) {
  struct Few { const Call &base; const Bank &bank; } few{base, bank};
  int64_t total = 0;
  for (int64_t i = 0; i < bank.size; ++i) total += is_few(bank.segments[i]);
  if (total) parallel_run(int(smaller(base.threads, total)), [](void *data, int index, int team) {
    const Few &f = *static_cast<Few *>(data);
    int64_t number = 0;
    for (int64_t i = 0; i < f.bank.size; ++i) {
      const Segment &segment = f.bank.segments[i];
      if (!is_few(segment) || number++ % team != index) continue;
      Call call = f.base;
      if (take_segment(segment, &call)) streamed(call, f.bank.rows + segment.start);
    }
  }, &few);
}

static void bank_forward(const Forward &base, const Bank &bank) {
  if (base.one_pass) forward({&base, 1});  // R is 0: the base alone
  few_rows_of(base, bank);
  const int64_t element = size_of(base.dtype);
  for (int64_t i = 0; i < bank.size; ++i) {
    const Segment &segment = bank.segments[i];
    Forward call = base;
    if (is_few(segment) || !take_segment(segment, &call)) continue;
    const int64_t *rows = bank.rows + segment.start;
    Gathered x(base.x, base.x_stride, base.K, element, rows, segment.count, base.threads);
    Gathered y(base.y, base.N, base.N, element, rows, segment.count, base.threads);
    call.x = x.data(), call.x_stride = x.stride(element), call.y = y.data();
    forward({&call, 1});
    y.scatter();
  }
}

static void bank_backward(const Backward &base, const Bank &bank) {
  if (base.one_pass && base.dx) backward(base);
  few_rows_of(base, bank);
  const int64_t element = size_of(base.dtype);
  for (int64_t i = 0; i < bank.size; ++i) {
    const Segment &segment = bank.segments[i];
    Backward call = base;
    if (is_few(segment) || !take_segment(segment, &call)) continue;
    const int64_t *rows = bank.rows + segment.start;
    Gathered dy(base.dy, base.dy_stride, base.N, element, rows, segment.count, base.threads);
    Gathered x(segment.dA ? base.x : nullptr, base.x_stride, base.K, element, rows, segment.count, base.threads);
    Gathered dx(base.dx, base.K, base.K, element, rows, segment.count, base.threads);
    call.dy = dy.data(), call.dy_stride = dy.stride(element), call.x = x.data(), call.x_stride = x.stride(element);
    call.dx = dx.data();
    backward(call);
    dx.scatter();
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
