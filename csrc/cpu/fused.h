// y and dx with everything that LoRA adds to them, in one pass over the weight: what runs where the caller gives the weight
// instead of a finished product.
//
//   forward    T = D(x) A^T         y  = x W^T + c T B^T + column terms
//   backward   T = dy B             dx = dy W + c D(T A);     dA and dB are added up beside (thin_f32.h, outer)
//
// A thread takes a share of the rows (of y's columns where rows are few) in blocks of rows. Such a block is widened to fp32
// once; T is made from it; then each panel of kTileColumns columns is finished in registers and written once, in y's dtype.
// No sum's order depends on how the work is shared, so y, s and dx have the same bits for any number of threads.
#pragma once
#include "../include/philox.h"
#include "decode.h"
#include "scratch.h"
#include "thin_f32.h"
#include "tile.h"

namespace peftkern {
namespace PEFTKERN_ISA {

template <class X, class A> struct Fused {
  typedef ThinF32<X> Thin;
  static_assert(Thin::kColumns == kDepth, "a chunk of rows is as deep as a block of the weight");

  struct Rows { const float *data; int64_t ld; };  // fp32 rows

  // A block of rows in fp32: where it lies if it is fp32, else widened into `memory`.
  static Rows widened(const X *x, int64_t stride, int64_t rows, int64_t count, float *memory) {
    if constexpr (sizeof(X) == sizeof(float)) {
      return {x, stride};
    } else {
      const int64_t ld = round_up(count, W);
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t col = 0; col < count; col += W) {
          const X *source = x + row * stride + col;
          store(col + W <= count ? load(source) : load_tail(source, count - col), memory + row * ld + col);
        }
      }
      return {memory, ld};
    }
  }

  // What a thread works with: Q contracted columns, blocks of at most `rows` rows.
  struct Memory {
    int64_t rows, panels, words;
    float *x, *chunk, *t, *block, *sums, *extra;
    uint64_t *bits;
    Memory(const Problem &p, int64_t Q, int64_t share) {
      rows = smaller(share, round_up(smaller(192, 24 + (1 << 19) / (Q + 1)), kTileRows));
      panels = (p.R + kTileColumns - 1) / kTileColumns;
      words = (p.K + 63) / 64;
      Scratch &memory = worker_scratch();
      const int64_t x_size = sizeof(X) == sizeof(float) ? 0 : rows * round_up(Q, W), bits_size = p.dropout.threshold ? rows * words : 0;
      const int64_t tile_size = rows * kTileColumns;
      memory.reserve(Scratch::bytes<float>(x_size) + Scratch::bytes<float>(rows * kDepth) + Scratch::bytes<float>(panels * tile_size) +
                     Scratch::bytes<float>(kDepth * kTileColumns) + 2 * Scratch::bytes<float>(tile_size) +
                     Scratch::bytes<uint64_t>(bits_size));
      x = memory.take<float>(x_size), chunk = memory.take<float>(rows * kDepth), t = memory.take<float>(panels * tile_size);
      block = memory.take<float>(kDepth * kTileColumns), sums = memory.take<float>(tile_size);
      extra = memory.take<float>(tile_size);
      bits = p.dropout.threshold ? memory.take<uint64_t>(bits_size) : nullptr;
    }
    float *t_panel(int64_t panel) const { return t + panel * rows * kTileColumns; }
  };

  template <class T> static void make_block(const T *w, int64_t ldw, bool by_rows, int64_t q, int64_t p, int64_t depth, int64_t columns, float *block) {
    if (by_rows) block_of_rows(w + p * ldw + q, ldw, depth, columns, block);
    else block_of_columns(w + q * ldw + p, ldw, depth, columns, block);
  }

  static void make_factor(const Problem &p, const A *f, int64_t ldf, bool by_rows, int64_t q, int64_t r, int64_t depth, int64_t columns, float *block) {
    make_block(f, ldf, by_rows, q, r, depth, columns, block);
    if (!p.round_factors || sizeof(X) == sizeof(A)) return;
    for (float *value = block; value < block + depth * kTileColumns; value += W) {
      X narrow_values[W];
      store(load(value), narrow_values);
      store(load(narrow_values), value);
    }
  }

  static void product(const float *x, int64_t ldx, int64_t rows, const float *block, int64_t depth, bool add, float *sums) {
    for (int64_t row = 0; row < rows; row += kTileRows) {
      tile_of(smaller(kTileRows, rows - row), x + row * ldx, ldx, block, depth, add, sums + row * kTileColumns);
    }
  }

  // T (+)= chunk F, from its first chunk on, with F[q, r] from A [R, K] (by rows) or B [N, R].
  static void add_thin(const Problem &p, const Memory &m, const float *x, int64_t ldx, int64_t rows, const void *f, int64_t ldf,
                       bool by_rows, int64_t q, int64_t depth) {
    for (int64_t panel = 0; panel < m.panels; ++panel) {
      const int64_t r = panel * kTileColumns;
      make_factor(p, (const A *)f, ldf, by_rows, q, r, depth, smaller(kTileColumns, p.R - r), m.block);
      product(x, ldx, rows, m.block, depth, q > 0, m.t_panel(panel));
    }
  }

  // Z[:, p ... p + width] = X W + c D(T G) + column, in Z's dtype.
  struct Panel {
    Rows x; int64_t rows, Q;
    const Weight *weight; bool w_by_rows;
    const A *g; int64_t ldg; bool g_by_rows;
    float c; X *z; int64_t ldz; bool onto;
  };
  static void finish_panel(const Problem &p, const Memory &m, const Panel &o, int64_t first, int64_t width, const float *column, const uint64_t *bits) {
    for (int64_t q = 0; q == 0 || q < o.Q; q += kDepth) {  // once for nothing: an empty sum is zero
      const int64_t depth = smaller(kDepth, o.Q - q);
      make_block((const X *)o.weight->data, o.weight->stride, o.w_by_rows, q, first, depth, width, m.block);
      product(o.x.data + q, o.x.ld, o.rows, m.block, depth, q > 0, m.sums);
    }
    for (int64_t panel = 0; panel < m.panels; ++panel) {
      const int64_t r = panel * kTileColumns, depth = smaller(kTileColumns, p.R - r);
      make_factor(p, o.g, o.ldg, o.g_by_rows, r, first, depth, width, m.block);
      product(m.t_panel(panel), kTileColumns, o.rows, m.block, depth, panel > 0, m.extra);
    }
    for (int64_t row = 0; row < o.rows; ++row) {
      for (int64_t half = 0; half < width; half += W) {
        const int64_t at = first + half;
        vf value = o.c * load(m.extra + row * kTileColumns + half);
        if (bits) value = select(uint32_t(bits[row * m.words + at / 64] >> (at % 64)), value);
        value += load(m.sums + row * kTileColumns + half);
        if (column) value += load(column + half);
        X *target = o.z + row * o.ldz + at;
        if (o.onto) value += half + W <= width ? load(target) : load_tail(target, width - half);
        if (half + W <= width) store(value, target);
        else store_tail(value, target, width - half);
      }
    }
  }

  static void forward_part(const Forward &p, Range rows, Range columns) {
    const Memory m(p, p.K, rows.end - rows.begin);
    for (int64_t row = rows.begin; row < rows.end; row += m.rows) {
      const int64_t count = smaller(m.rows, rows.end - row);
      const X *source = (const X *)p.x + row * p.x_stride;
      const Rows x = widened(source, p.x_stride, count, p.K, m.x);
      for (int64_t k = 0; k == 0 || k < p.K; k += kDepth) {
        const int64_t depth = smaller(kDepth, p.K - k);
        Rows dropped = {x.data + k, x.ld};
        if (m.bits) {
          for (int64_t i = 0; i < count; ++i) keep_bits_row(p.dropout, row + i, k, depth, m.bits + i * m.words + k / 64);
          dropped.data = Thin::load_block(source + k, p.x_stride, count, depth, m.bits + k / 64, m.words, m.chunk, &dropped.ld);
        }
        add_thin(p, m, dropped.data, dropped.ld, count, p.A, p.K, true, k, depth);
      }
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t r = 0; r < p.R; ++r) {
          float *t = m.t_panel(r / kTileColumns) + i * kTileColumns + r % kTileColumns;
          *t *= p.dropout.scale;
          if (columns.begin == 0) p.s[(row + i) * p.R + r] = *t;
        }
      }
      const Panel panel = {x, count, p.K, &p.weight, !p.weight.transposed, (const A *)p.B, p.R, true, p.scaling,
                           (X *)p.y + row * p.N, p.N, false};
      for (int64_t n = columns.begin; n < columns.end; n += kTileColumns) {
        const int64_t width = smaller(kTileColumns, columns.end - n);
        float column[kTileColumns] = {};
        for (int64_t i = 0; i < width; ++i) {
          if (p.bias) column[i] = widen(((const X *)p.bias)[n + i]);
          if (p.lora_bias) column[i] += p.scaling * widen(((const A *)p.lora_bias)[n + i]);
        }
        finish_panel(p, m, panel, n, width, p.bias || p.lora_bias ? column : nullptr, nullptr);
      }
    }
  }

  static void forward(const Forward &problem) {
    if (Decode<X, A>::takes(problem)) return Decode<X, A>::forward(problem);
    const int64_t tiles = problem.M / kTileRows + (problem.N + kTileColumns - 1) / kTileColumns;
    parallel_run(int(smaller(problem.threads, tiles)), [](void *data, int index, int count) {
      const Forward &p = *static_cast<const Forward *>(data);
      Range rows = {0, p.M}, columns = {0, p.N};
      if (p.M >= count * 4 * kTileRows) rows = share(p.M, kTileRows, index, count);
      else columns = share(p.N, kTileColumns, index, count);
      if (rows.begin < rows.end && columns.begin < columns.end) forward_part(p, rows, columns);
    }, const_cast<Forward *>(&problem));
  }

  // dx, and the thread's share of dA [R, ldA] and dB^T [R, ldB]; a null pointer leaves one out.
  static void backward_rows(const Backward &p, float *dA, int64_t ldA, float *dB, int64_t ldB, Range rows) {
    const Memory m(p, p.N, rows.end - rows.begin);
    for (int64_t row = rows.begin; row < rows.end; row += m.rows) {
      const int64_t count = smaller(m.rows, rows.end - row);
      const Rows dy = widened((const X *)p.dy + row * p.dy_stride, p.dy_stride, count, p.N, m.x);
      for (int64_t n = 0; n == 0 || n < p.N; n += kDepth) {
        const int64_t depth = smaller(kDepth, p.N - n);
        if (p.dx || p.dA) add_thin(p, m, dy.data + n, dy.ld, count, p.B, p.R, false, n, depth);
        if (!dB) continue;
        Rows chunk = {dy.data + n, dy.ld};
        if (depth % W) chunk.data = Thin::load_block((const X *)p.dy + row * p.dy_stride + n, p.dy_stride, count, depth, nullptr, 0, m.chunk, &chunk.ld);
        Thin::outer({const_cast<float *>(p.s) + row * p.R, p.R}, p.R, chunk.data, chunk.ld, count, depth, dB + n, ldB);
      }
      if (m.bits) for (int64_t i = 0; i < count; ++i) keep_bits_row(p.dropout, row + i, 0, p.K, m.bits + i * m.words);
      for (int64_t k = 0; dA && k < p.K; k += kDepth) {
        const int64_t depth = smaller(kDepth, p.K - k);
        Rows x;
        x.data = Thin::load_block((const X *)p.x + row * p.x_stride + k, p.x_stride, count, depth, m.bits ? m.bits + k / 64 : nullptr, m.words, m.chunk, &x.ld);
        for (int64_t r = 0; r < p.R; r += kTileColumns) {
          Thin::outer({m.t_panel(r / kTileColumns), kTileColumns}, smaller(kTileColumns, p.R - r), x.data, x.ld, count, depth, dA + r * ldA + k, ldA);
        }
      }
      if (!p.dx) continue;
      const Panel panel = {dy, count, p.N, &p.weight, p.weight.transposed, (const A *)p.A, p.K, false,
                           p.scaling * p.dropout.scale, (X *)p.dx + row * p.K, p.K, p.onto};
      for (int64_t k = 0; k < p.K; k += kTileColumns) {
        finish_panel(p, m, panel, k, smaller(kTileColumns, p.K - k), nullptr, m.bits);
      }
    }
  }
};

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
