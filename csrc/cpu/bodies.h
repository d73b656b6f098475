// forward and backward over blocks of rows, for one way of computing the thin products.
//
// Each thread takes a contiguous range of rows and packs the factors for itself. Within a block of rows a chunk of x or dy
// is read once and used for everything that needs it while it lies in the cache; the dropout bits of a block are generated
// once and serve D(x) and D(t A). dA and dB are summed per thread in fp32 and then over threads in their order:
// bitwise deterministic for a fixed number of threads.
#pragma once
#include "../include/philox.h"
#include "fused.h"
#include "parallel.h"
#include "scratch.h"
#include "streamed_rows.h"
#include "thin_bf16.h"
#include "thin_f32.h"

namespace peftkern {
namespace PEFTKERN_ISA {

template <class Thin, class A> struct Bodies {
  typedef typename Thin::Storage X;
  typedef typename Thin::Element Element;
  typedef typename Thin::Packed Packed;
  static constexpr int64_t kWords = Thin::kColumns / 64;

  struct Sizes {
    int64_t Rp, Kp, Np;
    explicit Sizes(const Problem &p) : Rp(round_up(p.R, W)), Kp(round_up(p.K, Thin::kPad)), Np(round_up(p.N, Thin::kPad)) {}
  };

  // What a thread holds of one of the calls.
  struct Member { Packed *f, *g; float *t, *column; };

  static Member pack(const Forward &p, Scratch &memory) {
    const Sizes size(p);
    const Member m = {memory.take<Packed>(Thin::pairs(p.K) * size.Rp), memory.take<Packed>(Thin::pairs(p.R) * size.Np),
                      memory.take<float>(Thin::kRows * size.Rp), p.lora_bias ? memory.take<float>(size.Np) : nullptr};
    Thin::pack_transposed((const A *)p.A, p.R, p.K, m.f, size.Rp, p.round_factors);
    Thin::pack_transposed((const A *)p.B, p.N, p.R, m.g, size.Np, p.round_factors);
    for (int64_t n = 0; m.column && n < size.Np; ++n) m.column[n] = n < p.N ? p.scaling * widen(((const A *)p.lora_bias)[n]) : 0;
    return m;
  }

  // The thin products of all calls in one pass over x: a block is read for each mask while it lies in the cache.
  static void forward_rows(const Forwards &all, Range rows) {
    int64_t Rp = 0, bytes = Scratch::bytes<Member>(all.count);
    for (int64_t i = 0; i < all.count; ++i) {
      const Forward &p = all.calls[i];
      const Sizes size(p);
      Rp = size.Rp > Rp ? size.Rp : Rp;
      bytes += Scratch::bytes<Packed>(Thin::pairs(p.K) * size.Rp) + Scratch::bytes<Packed>(Thin::pairs(p.R) * size.Np) +
               Scratch::bytes<float>(Thin::kRows * size.Rp) + Scratch::bytes<float>(size.Np);
    }
    Scratch &memory = worker_scratch();
    memory.reserve(bytes + Scratch::bytes<Element>(Thin::kRows * Thin::kColumns) + Scratch::bytes<float>(Thin::thin_size(Rp)) +
                   Scratch::bytes<uint64_t>(Thin::kRows * kWords));
    Member *members = memory.take<Member>(all.count);
    Element *buffer = memory.take<Element>(Thin::kRows * Thin::kColumns);
    float *thin_memory = memory.take<float>(Thin::thin_size(Rp));
    uint64_t *bits = memory.take<uint64_t>(Thin::kRows * kWords);
    for (int64_t i = 0; i < all.count; ++i) members[i] = pack(all.calls[i], memory);
    for (int64_t row = rows.begin; row < rows.end; row += Thin::kRows) {
      const int64_t count = smaller(Thin::kRows, rows.end - row);
      for (int64_t i = 0; i < all.count; ++i) memset(members[i].t, 0, count * Sizes(all.calls[i]).Rp * sizeof(float));
      const int64_t K = all.calls[0].K;
      for (int64_t k = 0; k < K; k += Thin::kColumns) {
        const int64_t width = smaller(Thin::kColumns, K - k);
        int64_t ld = 0;
        const Element *x = nullptr;
        for (int64_t i = 0; i < all.count; ++i) {
          const Forward &p = all.calls[i];
          const bool drops = p.dropout.threshold;
          if (drops) for (int64_t j = 0; j < count; ++j) keep_bits_row(p.dropout, row + j, k, width, bits + j * kWords);
          if (drops || !x) x = Thin::load_block((const X *)p.x + row * p.x_stride + k, p.x_stride, count, width, drops ? bits : nullptr, kWords, buffer, &ld);
          const int64_t Rp_of = Sizes(p).Rp;
          Thin::shrink(x, ld, count, width, members[i].f + Thin::pairs(k) * Rp_of, Rp_of, members[i].t);
          if (drops) x = nullptr;
        }
      }
      for (int64_t i = 0; i < all.count; ++i) {
        const Forward &p = all.calls[i];
        const Sizes size(p);
        float *t = members[i].t;
        for (int64_t j = 0; j < count; ++j) {
          for (int64_t r = 0; r < p.R; ++r) p.s[(row + j) * p.R + r] = t[j * size.Rp + r] *= p.dropout.scale;
        }
        const auto thin = Thin::make_thin(t, count, p.R, size.Rp, thin_memory);
        Thin::expand(thin, count, p.R, members[i].g, size.Np, p.scaling, members[i].column, nullptr, 0, (X *)p.y + row * p.N, p.N, p.N);
      }
    }
  }

  static void forward(const Forwards &calls) {
    const Forward &first = calls.calls[0];
    if (StreamedRows<X, A>::takes(first)) {
      for (int64_t i = 0; i < calls.count; ++i) StreamedRows<X, A>::forward(calls.calls[i]);
      return;
    }
    if (first.one_pass) {
      for (int64_t i = 0; i < calls.count; ++i) Fused<Thin, A>::forward(calls.calls[i]);
      return;
    }
    const int blocks = static_cast<int>(smaller(first.threads, (first.M + Thin::kRows - 1) / Thin::kRows));
    parallel_run(blocks, [](void *data, int index, int count) {
      const Forwards &all = *static_cast<const Forwards *>(data);
      const Range rows = share(all.calls[0].M, Thin::kRows, index, count);
      if (rows.begin < rows.end) forward_rows(all, rows);
    }, const_cast<Forwards *>(&calls));
  }

  // Per-thread sums of dA [R, Kp] and dB^T [R, Np]; in one pass of dA^T [K, ld] and dB [N, ld]. They belong to the call, not to
  // a thread: threads may end before they are reduced.
  struct Sums { float *dA, *dB; };
  struct Call {
    const Backward &p;
    float *memory;
    int count;
    bool by_column() const { return p.one_pass && Fused<Thin, A>::kByColumn; }
    int64_t dA_size() const { return by_column() ? p.K * Fused<Thin, A>::ld(p) : p.R * Sizes(p).Kp; }
    int64_t dB_size() const { return by_column() ? p.N * Fused<Thin, A>::ld(p) : p.R * Sizes(p).Np; }
    Sums sums(int index) const {
      float *dA = memory + index * (dA_size() + dB_size());
      return {p.dA ? dA : nullptr, p.dB ? dA + dA_size() : nullptr};
    }
  };

  static void backward_rows(const Backward &p, Sums sums, Range rows) {
    const Sizes size(p);
    const bool need_t = p.dx || p.dA;
    Scratch &memory = worker_scratch();
    memory.reserve(Scratch::bytes<Packed>(Thin::pairs(p.N) * size.Rp) + Scratch::bytes<Packed>(Thin::pairs(p.R) * size.Kp) +
                   Scratch::bytes<Element>(Thin::kRows * Thin::kColumns) + Scratch::bytes<float>(Thin::kRows * size.Rp) +
                   Scratch::bytes<float>(Thin::thin_size(size.Rp)) + Scratch::bytes<uint64_t>(Thin::kRows * kWords));
    Packed *f = memory.take<Packed>(Thin::pairs(p.N) * size.Rp), *g = memory.take<Packed>(Thin::pairs(p.R) * size.Kp);
    Element *buffer = memory.take<Element>(Thin::kRows * Thin::kColumns);
    float *t = memory.take<float>(Thin::kRows * size.Rp), *thin_memory = memory.take<float>(Thin::thin_size(size.Rp));
    uint64_t *bits = p.dropout.threshold ? memory.take<uint64_t>(Thin::kRows * kWords) : nullptr;
    if (need_t) Thin::pack_interleaved((const A *)p.B, p.N, p.R, f, size.Rp, p.round_factors);
    if (p.dx) Thin::pack_interleaved((const A *)p.A, p.R, p.K, g, size.Kp, p.round_factors);

    for (int64_t row = rows.begin; row < rows.end; row += Thin::kRows) {
      const int64_t count = smaller(Thin::kRows, rows.end - row);
      // One pass over dy: t += dy B, dB^T += s^T dy.
      typename Thin::Thin s_thin{};
      if (p.dB) {
        for (int64_t i = 0; i < count; ++i) memcpy(t + i * size.Rp, p.s + (row + i) * p.R, p.R * sizeof(float));
        s_thin = Thin::make_thin(t, count, p.R, size.Rp, thin_memory);
      }
      memset(t, 0, count * size.Rp * sizeof(float));
      for (int64_t n = 0; n < p.N; n += Thin::kColumns) {
        const int64_t width = smaller(Thin::kColumns, p.N - n);
        int64_t ld;
        const Element *dy = Thin::load_block((const X *)p.dy + row * p.dy_stride + n, p.dy_stride, count, width, nullptr, 0, buffer, &ld);
        if (need_t) Thin::shrink(dy, ld, count, width, f + Thin::pairs(n) * size.Rp, size.Rp, t);
        if (p.dB) Thin::outer(s_thin, p.R, dy, ld, count, width, sums.dB + n, size.Np);
      }
      if (!need_t) continue;
      // One pass over x and dx: dA += t^T D(x), dx += c D(t A).
      const auto thin = Thin::make_thin(t, count, p.R, size.Rp, thin_memory);
      for (int64_t k = 0; k < p.K; k += Thin::kColumns) {
        const int64_t width = smaller(Thin::kColumns, p.K - k);
        if (bits) for (int64_t i = 0; i < count; ++i) keep_bits_row(p.dropout, row + i, k, width, bits + i * kWords);
        if (p.dA) {
          int64_t ld;
          const Element *x = Thin::load_block((const X *)p.x + row * p.x_stride + k, p.x_stride, count, width, bits, kWords, buffer, &ld);
          Thin::outer(thin, p.R, x, ld, count, width, sums.dA + k, size.Kp);
        }
        if (p.dx) {
          Thin::expand(thin, count, p.R, g + k, size.Kp, p.scaling * p.dropout.scale, nullptr, bits, kWords,
                       (X *)p.dx + row * p.K + k, p.K, width);
        }
      }
    }
  }

  // out[j * out_stride] = factor times the sum over threads, in their order, of `width` columns, `by` apart in each one's memory.
  static void reduce_columns(const Call &call, const float *first, int64_t by, int64_t width, float factor, A *out, int64_t out_stride) {
    float sum[kReduced] = {};
    for (int i = 0; i < call.count; ++i, first += call.dA_size() + call.dB_size()) {
      if (by == 1) for (int64_t j = 0; j < width; ++j) sum[j] += first[j];
      else for (int64_t j = 0; j < width; ++j) sum[j] += first[j * by];
    }
    if (out_stride == 1) for (int64_t j = 0; j < width; ++j) narrow(factor * sum[j], out + j);
    else for (int64_t j = 0; j < width; ++j) narrow(factor * sum[j], out + j * out_stride);
  }

  // dA and dB in the parameters' dtype: c times the sum over threads.
  static constexpr int64_t kReduced = 64;  // columns at a time
  static void reduce(const Call &call, int index, int count) {
    const Backward &p = call.p;
    const Sizes size(p);
    const Sums sums = call.sums(0);
    const int64_t ld = Fused<Thin, A>::ld(p);
    const auto all = [&](int64_t columns, const float *first, int64_t by_r, int64_t by, float factor, void *out, int64_t out_r, int64_t out_by) {
      const Range own = share(columns, kReduced, index, count);
      for (int64_t begin = own.begin; begin < own.end; begin += kReduced) {
        const int64_t width = smaller(kReduced, own.end - begin);
        for (int64_t r = 0; r < p.R; ++r) reduce_columns(call, first + r * by_r + begin * by, by, width, factor, (A *)out + r * out_r + begin * out_by, out_by);
      }
    };
    const bool by_column = call.by_column();
    if (p.dA) all(p.K, sums.dA, by_column ? 1 : size.Kp, by_column ? ld : 1, p.scaling * p.dropout.scale, p.dA, p.K, 1);
    if (p.dB) all(p.N, sums.dB, by_column ? 1 : size.Np, by_column ? ld : 1, p.scaling, p.dB, 1, p.R);
  }

  static void backward(const Backward &problem) {
    if (StreamedRows<X, A>::takes(problem)) return StreamedRows<X, A>::backward(problem);
    const int64_t grain = problem.one_pass ? kTileRows : Thin::kRows;
    const int count = static_cast<int>(smaller(problem.threads, (problem.M + grain - 1) / grain));
    const bool sums = problem.dA || problem.dB;
    Scratch &memory = caller_scratch();
    Call call{problem, nullptr, count};
    if (sums) memory.reserve(count * (call.dA_size() + call.dB_size()) * int64_t(sizeof(float)));
    call.memory = reinterpret_cast<float *>(memory.memory);
    parallel_run(count, [](void *data, int index, int team) {
      const Call &c = *static_cast<Call *>(data);
      // A runtime may give fewer threads than asked for: each then takes several shares.
      for (int share_index = index; share_index < c.count; share_index += team) {
        const Sums own = c.sums(share_index);
        if (own.dA) memset(own.dA, 0, c.dA_size() * sizeof(float));
        if (own.dB) memset(own.dB, 0, c.dB_size() * sizeof(float));
        const Range rows = share(c.p.M, c.p.one_pass ? kTileRows : Thin::kRows, share_index, c.count);
        if (rows.begin >= rows.end) continue;
        if (c.p.one_pass) Fused<Thin, A>::backward_rows(c.p, own.dA, own.dB, rows);
        else backward_rows(c.p, own, rows);
      }
    }, &call);
    if (!sums) return;
    parallel_run(count, [](void *data, int index, int team) { reduce(*static_cast<Call *>(data), index, team); }, &call);
  }
};

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
