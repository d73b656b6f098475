// y and dx with everything that LoRA adds to them, in one pass over the weight: what runs where the caller gives the weight
// instead of a finished product.
//
//   forward    T = D(x) A^T         y  = x W^T + c T B^T + column terms
//   backward   T = dy B             dx = dy W + c D(T A)
//              dA^T += D(x)^T T     dB += dy^T s
//
// A thread takes a share of the rows (of y's columns where rows are few) in blocks of rows. Such a block is packed into tiles
// (tile.h) once, as words of fp32 or pairs of bf16; T and dB are made from it; then panel after panel of kTileColumns columns of the weight
// is made (several at once from a weight that is decoded in steps) and stays in the L2 cache while tile after tile of the
// rows is finished in registers and written once, in y's dtype. No sum's order depends on how the work is shared, so y, s and dx
// have the same bits for any number of threads.
#pragma once
#include "../include/philox.h"
#include "few_rows.h"
#include "scratch.h"
#include "tile.h"

namespace peftkern {
namespace PEFTKERN_ISA {

template <class Thin, class A> struct Fused {
  typedef typename Thin::Storage X;
  typedef typename Thin::Word Word;
  static constexpr int64_t kOf = Packing<Word>::kOf;
  static int64_t words(int64_t elements) { return Packing<Word>::count(elements); }
  static constexpr int64_t kChunk = 256;        // columns of x that are packed for T at a time
  static constexpr int64_t kMasked = 128;       // columns of D(x) that lie packed for dA at a time
  static constexpr int64_t kPanelDepth = 2048;  // of the panels that are made at once, together: 128 KB

  // Of one thread: dA^T [K, ld] and dB [N, ld], made from packed fp32 rows; or dA [R, K] and dB^T [R, N], padded, as Thin makes them
  // from rows where they lie: pairs of a packed row are not those that a sum over rows takes.
  static constexpr bool kByColumn = kOf == 1;
  static int64_t ld(const Problem &p) { return round_up(p.R, kTileColumns); }

  // Rows of a block, at most: what a panel of the weight is made for, as long as they are 16 MB, or few.
  static int64_t rows_of_block(int64_t Q) {
    const int64_t rows = (int64_t(1) << 22) / (words(Q) + 1);
    return smaller(1056, rows < 48 ? 48 : rows);
  }

  // What a thread works with: Q contracted columns, blocks of at most `rows` rows.
  struct Memory {
    int64_t Q, R, Rp, rows, panels, row_bits, step, depth, group;
    bool in_steps;  // a group is made of whole steps of a quantised weight
    Word *x, *chunk, *f, *packed_t, *panel, *g;
    float *t, *s, *sums, *b, *thin_memory;
    typename Thin::Element *buffer;
    uint64_t *bits;
    Memory(const Problem &p, int64_t Q, int64_t share) : Q(Q), R(p.R), Rp(round_up(p.R, W)) {
      in_steps = kOf == 1 && steps_take<X>(p.weight);
      group = in_steps ? kStepPanels : 1;
      rows = round_up(smaller(share, rows_of_block(Q)), kTileRows);
      panels = (R + kTileColumns - 1) / kTileColumns;
      row_bits = (p.K + 63) / 64;
      step = in_steps ? kDecodedDepth : depth_of(Q);
      depth = kPanelDepth / group / step * step;
      const int64_t thin = panels * rows * kTileColumns, chunk_size = kTileRows * kChunk > rows * kMasked ? kTileRows * kChunk : rows * kMasked;
      Scratch &memory = worker_scratch();
      memory.reserve(Scratch::bytes<Word>(rows * words(Q) + kPackSlack) + Scratch::bytes<Word>(chunk_size + kPackSlack) +
                     Scratch::bytes<Word>(panels * words(Q) * kTileColumns) + 2 * Scratch::bytes<float>(thin) +
                     Scratch::bytes<Word>(rows * words(R) + kPackSlack) + Scratch::bytes<Word>(group * panel_size()) +
                     Scratch::bytes<Word>(group * words(R) * kTileColumns) + Scratch::bytes<float>(group * rows * kTileColumns) +
                     (kByColumn ? 0 : outer_bytes()) + Scratch::bytes<uint64_t>(rows * row_bits));
      x = memory.take<Word>(rows * words(Q) + kPackSlack), chunk = memory.take<Word>(chunk_size + kPackSlack);
      f = memory.take<Word>(panels * words(Q) * kTileColumns), t = memory.take<float>(thin), s = memory.take<float>(thin);
      packed_t = memory.take<Word>(rows * words(R) + kPackSlack), panel = memory.take<Word>(group * panel_size());
      g = memory.take<Word>(group * words(R) * kTileColumns), sums = memory.take<float>(group * rows * kTileColumns);
      if (!kByColumn) b = memory.take<float>(Thin::kRows * Rp), thin_memory = memory.take<float>(Thin::thin_size(Rp)), buffer = memory.take<typename Thin::Element>(Thin::kRows * Thin::kColumns);
      bits = p.dropout.threshold ? memory.take<uint64_t>(rows * row_bits) : nullptr;
    }
    bool half(int64_t i) const { return R - i * kTileColumns <= W; }  // whether a panel's ranks fill no more than half of it
    int64_t outer_bytes() const {
      return Scratch::bytes<float>(Thin::kRows * Rp) + Scratch::bytes<float>(Thin::thin_size(Rp)) + Scratch::bytes<typename Thin::Element>(Thin::kRows * Thin::kColumns);
    }
    int64_t panel_size() const { return words(smaller(depth, Q)) * kTileColumns; }
    Word *x_tile(int64_t row) const { return x + row * words(Q); }
    float *t_panel(int64_t i) const { return t + i * rows * kTileColumns; }
    float *s_panel(int64_t i) const { return s + i * rows * kTileColumns; }
    Word *f_panel(int64_t i) const { return f + i * words(Q) * kTileColumns; }
  };

  static void make_factor(const Problem &p, const A *f, int64_t ldf, bool by_rows, int64_t q, int64_t first, int64_t depth, int64_t width, Word *block) {
    block_of(f, ldf, by_rows, q, first, depth, width, block);
    if constexpr (kOf > 1 || sizeof(X) == sizeof(A)) return;  // rounded they are already
    if (!p.round_factors) return;
    for (Word *value = block; value < block + depth * kTileColumns; value += W) {
      X narrow_values[W];
      store(load(value), narrow_values);
      store(load(narrow_values), value);
    }
  }

  static void make_first_factor(const Problem &p, const Memory &m, const void *f, int64_t ldf, bool by_rows) {
    for (int64_t i = 0; i < m.panels; ++i) {
      const int64_t r = i * kTileColumns;
      make_factor(p, (const A *)f, ldf, by_rows, 0, r, m.Q, smaller(kTileColumns, m.R - r), m.f_panel(i));
    }
  }

  // A tile of rows is packed, and its rows of T are made; with bits, from what they leave of it.
  static void pack_tile(const Memory &m, const X *x, int64_t stride, int64_t row, int64_t rows, const uint64_t *bits, bool need_t) {
    for (int64_t q = 0; q == 0 || q < m.Q; q += kChunk) {
      const int64_t depth = smaller(kChunk, m.Q - q);
      const Word *source = m.x_tile(row) + q / kOf * kTileRows;
      pack(x + q, stride, rows, depth, nullptr, 0, m.x_tile(row) + q / kOf * kTileRows);
      if (!need_t) continue;
      if (bits) {
        pack(x + q, stride, rows, depth, bits + q / 64, m.row_bits, m.chunk);
        source = m.chunk;
      }
      for (int64_t i = 0; i < m.panels; ++i) {
        const Word *factor = m.f_panel(i) + q / kOf * kTileColumns;
        float *sums = m.t_panel(i) + row * kTileColumns;
        with_count(rows, [&](auto count) {
          if (m.half(i)) tile<count, true>(source, factor, words(depth), q > 0, sums);
          else tile<count>(source, factor, words(depth), q > 0, sums);
        });
      }
    }
  }

  // T as the left operand of T G.
  static void pack_t(const Memory &m, int64_t rows) {
    for (int64_t row = 0; row < rows; row += kTileRows) {
      for (int64_t i = 0; i < m.panels; ++i) {
        const int64_t r = i * kTileColumns;
        pack(m.t_panel(i) + row * kTileColumns, kTileColumns, smaller(kTileRows, rows - row), smaller(kTileColumns, m.R - r), nullptr, 0,
             m.packed_t + row * words(m.R) + r / kOf * kTileRows);
      }
    }
  }

  // Z[:, first ... first + width] = X W + c D(T G) + column, in Z's dtype.
  struct Product {
    int64_t rows, P;
    const Weight *weight; bool w_by_rows;
    const A *g; int64_t ldg; bool g_by_rows;
    float c; X *z; const uint64_t *bits; bool onto;
  };

  template <int ROWS> static void finish_tile(const Memory &m, const Product &o, const Word *g, int64_t row, int64_t first, int64_t width, const float *column, const float *sums) {
    const Tile<ROWS> extra(m.packed_t + row * words(m.R), g, words(m.R));
    const vf column_low = column ? load(column) : vf{}, column_high = column ? load(column + W) : vf{};
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      vf low = o.c * extra.low[i], high = o.c * extra.high[i];
      if (o.bits) {
        const uint64_t kept = o.bits[(row + i) * m.row_bits + first / 64] >> (first % 64);
        low = select(uint32_t(kept), low), high = select(uint32_t(kept >> W), high);
      }
      low += load(sums + i * kTileColumns) + column_low, high += load(sums + i * kTileColumns + W) + column_high;
      X *target = o.z + (row + i) * o.P + first;
      if (o.onto) {
        low += width >= W ? load(target) : load_tail(target, width);
        if (width > W) high += width == kTileColumns ? load(target + W) : load_tail(target + W, width - W);
      }
      if (width == kTileColumns) {
        store(low, target), store(high, target + W);
      } else {
        if (width >= W) store(low, target);
        else store_tail(low, target, width);
        if (width > W) store_tail(high, target + W, width - W);
      }
    }
  }

  static void make_panels(const Memory &m, const Product &o, int64_t begin, int64_t first, int64_t depth, int64_t width) {
    if constexpr (kOf == 1) if (m.in_steps) return panels_of_steps<X>(*o.weight, o.w_by_rows, begin, first, depth, width, m.panel, m.panel_size());
    panel_of<X>(*o.weight, o.w_by_rows, begin, first, depth, width, m.panel);
  }

  // A group of panels, `width` columns in all.
  static void finish_panels(const Problem &p, const Memory &m, const Product &o, int64_t first, int64_t width, const float *column) {
    const int64_t Q = m.Q, panels = (width + kTileColumns - 1) / kTileColumns;
    const auto width_of = [&](int64_t i) { return smaller(kTileColumns, width - i * kTileColumns); };
    for (int64_t i = 0; i < panels; ++i) make_factor(p, o.g, o.ldg, o.g_by_rows, 0, first + i * kTileColumns, m.R, width_of(i), m.g + i * words(m.R) * kTileColumns);
    const auto finish = [&](int64_t i, int64_t row, const float *sums) {
      with_count(smaller(kTileRows, o.rows - row), [&](auto count) {
        finish_tile<count>(m, o, m.g + i * words(m.R) * kTileColumns, row, first + i * kTileColumns, width_of(i), column ? column + i * kTileColumns : nullptr, sums);
      });
    };
    const bool unordered = m.in_steps && !o.w_by_rows;
    const auto sums_of = [&](int64_t i, int64_t row) { return m.sums + i * m.rows * kTileColumns + (m.depth < Q || unordered ? row * kTileColumns : 0); };
    for (int64_t begin = 0; begin == 0 || begin < Q; begin += m.depth) {  // once for nothing: an empty sum is zero
      const int64_t depth = smaller(m.depth, Q - begin);
      make_panels(m, o, begin, first, depth, width);
      for (int64_t row = 0; row < o.rows; row += kTileRows) {
        for (int64_t i = 0; i < panels; ++i) {
          const Word *panel = m.panel + i * m.panel_size();
          float *sums = sums_of(i, row);
          with_count(smaller(kTileRows, o.rows - row), [&](auto count) {
            for (int64_t q = 0; q == 0 || q < depth; q += m.step) {
              tile<count>(m.x_tile(row) + (begin + q) / kOf * kTileRows, panel + q / kOf * kTileColumns, words(smaller(m.step, depth - q)), begin + q > 0, sums);
            }
          });
          if (begin + depth >= Q && !unordered) finish(i, row, sums);
        }
      }
    }
    if (!unordered) return;
    uint8_t from[kStep] = {};
    order_of_steps<X>(*o.weight, from);
    float ordered[kStepPanels][kTileRows * kTileColumns];
    for (int64_t row = 0; row < o.rows; row += kTileRows) {
      for (int64_t i = 0; i < kStep; ++i) {
        const float *sums = sums_of(i / kTileColumns, row) + i % kTileColumns;
        float *target = ordered[from[i] / kTileColumns] + from[i] % kTileColumns;
        for (int64_t j = 0; j < kTileRows; ++j) target[j * kTileColumns] = sums[j * kTileColumns];
      }
      for (int64_t i = 0; i < panels; ++i) finish(i, row, ordered[i]);
    }
  }

  static void forward_part(const Forward &p, Range rows, Range columns) {
    const Memory m(p, p.K, rows.end - rows.begin);
    make_first_factor(p, m, p.A, p.K, true);
    for (int64_t row = rows.begin; row < rows.end; row += m.rows) {
      const int64_t count = smaller(m.rows, rows.end - row);
      for (int64_t i = 0; i < count; i += kTileRows) {
        const int64_t tile_rows = smaller(kTileRows, count - i);
        uint64_t *bits = m.bits ? m.bits + i * m.row_bits : nullptr;
        if (bits) for (int64_t j = 0; j < tile_rows; ++j) keep_bits_row(p.dropout, row + i + j, 0, p.K, bits + j * m.row_bits);
        pack_tile(m, (const X *)p.x + (row + i) * p.x_stride, p.x_stride, i, tile_rows, bits, true);
      }
      for (int64_t panel = 0; panel < m.panels; ++panel) {
        const int64_t first = panel * kTileColumns, width = smaller(kTileColumns, p.R - first);
        for (int64_t i = 0; i < count; ++i) {
          float *t = m.t_panel(panel) + i * kTileColumns;
          store(p.dropout.scale * load(t), t), store(p.dropout.scale * load(t + W), t + W);
          if (columns.begin == 0) memcpy(p.s + (row + i) * p.R + first, t, width * sizeof(float));
        }
      }
      pack_t(m, count);
      const Product product = {count, p.N, &p.weight, true, (const A *)p.B, p.R, true, p.scaling, (X *)p.y + row * p.N, nullptr, false};
      for (int64_t n = columns.begin; n < columns.end; n += m.group * kTileColumns) {
        const int64_t width = smaller(m.group * kTileColumns, columns.end - n);
        float column[kStep] = {};
        for (int64_t i = 0; i < width; ++i) {
          if (p.bias) column[i] = widen(((const X *)p.bias)[n + i]);
          if (p.lora_bias) column[i] += p.scaling * widen(((const A *)p.lora_bias)[n + i]);
        }
        finish_panels(p, m, product, n, width, p.bias || p.lora_bias ? column : nullptr);
      }
    }
  }

  static void forward(const Forward &problem) {
    if (FewRows<X, A>::takes(problem, kOf > 1)) return FewRows<X, A>::forward(problem);
    const int64_t tiles = problem.M / kTileRows + (problem.N + kTileColumns - 1) / kTileColumns;
    parallel_run(int(smaller(problem.threads, tiles)), [](void *data, int index, int count) {
      const Forward &p = *static_cast<const Forward *>(data);
      Range rows = {0, p.M}, columns = {0, p.N};
      if (p.M >= count * 4 * kTileRows) rows = share(p.M, kTileRows, index, count);
      else columns = share(p.N, kTileColumns, index, count);
      if (rows.begin < rows.end && columns.begin < columns.end) forward_part(p, rows, columns);
    }, const_cast<Forward *>(&problem));
  }

  // sums[q, :] += sum_m X[m, q] B[m, :] for `count` columns of packed rows, B in panels [m.rows, kTileColumns].
  static void add_outer(const Memory &m, const Word *x, int64_t stride, int64_t rows, int64_t count, const float *b, float *sums, int64_t ld) {
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t q = 0; q < count; q += kTileRows) {
      for (int64_t i = 0; i < m.panels; ++i) {
        const float *factor = b + i * m.rows * kTileColumns;
        float *target = sums + q * ld + i * kTileColumns;
        with_count(smaller(kTileRows, count - q), [&](auto columns) {
          if (m.half(i)) outer<columns, true>(x + q * kTileRows, stride, tiles, factor, target, ld);
          else outer<columns, false>(x + q * kTileRows, stride, tiles, factor, target, ld);
        });
      }
    }
  }

  // sums[:, q] += sum_m B[m, :] D(X)[m, q] for all `count` columns of rows where they lie, B in the same panels.
  static void add_outer_of_rows(const Memory &m, const X *x, int64_t stride, const uint64_t *bits, int64_t rows, int64_t count, const float *b, float *sums) {
    const int64_t ld = round_up(count, Thin::kPad);
    for (int64_t row = 0; row < rows; row += Thin::kRows) {
      const int64_t height = smaller(Thin::kRows, rows - row);
      for (int64_t panel = 0; panel < m.panels; ++panel) {
        const int64_t first = panel * kTileColumns, width = smaller(kTileColumns, m.Rp - first);
        for (int64_t i = 0; i < height; ++i) memcpy(m.b + i * m.Rp + first, b + (panel * m.rows + row + i) * kTileColumns, width * sizeof(float));
      }
      const typename Thin::Thin thin = Thin::make_thin(m.b, height, m.R, m.Rp, m.thin_memory);
      for (int64_t q = 0; q < count; q += Thin::kColumns) {
        const int64_t width = smaller(Thin::kColumns, count - q);
        int64_t ldx;
        const auto *block = Thin::load_block(x + row * stride + q, stride, height, width, bits ? bits + row * m.row_bits + q / 64 : nullptr, m.row_bits, m.buffer, &ldx);
        Thin::outer(thin, m.R, block, ldx, height, width, sums + q, ld);
      }
    }
  }

  // dx, and the thread's share of dA^T and dB; a null pointer leaves one out.
  static void backward_rows(const Backward &p, float *dA, float *dB, Range rows) {
    const Memory m(p, p.N, rows.end - rows.begin);
    const bool need_t = p.dx || p.dA;
    if (need_t) make_first_factor(p, m, p.B, p.R, false);
    for (int64_t row = rows.begin; row < rows.end; row += m.rows) {
      const int64_t count = smaller(m.rows, rows.end - row);
      memset(m.t, 0, m.panels * m.rows * kTileColumns * sizeof(float));  // what pads a tile and the ranks is multiplied
      for (int64_t i = 0; i < count; i += kTileRows) {
        pack_tile(m, (const X *)p.dy + (row + i) * p.dy_stride, p.dy_stride, i, smaller(kTileRows, count - i), nullptr, need_t);
      }
      if (dB) {
        memset(m.s, 0, m.panels * m.rows * kTileColumns * sizeof(float));
        for (int64_t panel = 0; panel < m.panels; ++panel) {
          const int64_t first = panel * kTileColumns, width = smaller(kTileColumns, p.R - first);
          for (int64_t i = 0; i < count; ++i) memcpy(m.s_panel(panel) + i * kTileColumns, p.s + (row + i) * p.R + first, width * sizeof(float));
        }
        if constexpr (kByColumn) add_outer(m, m.x, p.N * kTileRows, count, p.N, m.s, dB, ld(p));
        else add_outer_of_rows(m, (const X *)p.dy + row * p.dy_stride, p.dy_stride, nullptr, count, p.N, m.s, dB);
      }
      if (m.bits) for (int64_t i = 0; i < count; ++i) keep_bits_row(p.dropout, row + i, 0, p.K, m.bits + i * m.row_bits);
      if constexpr (!kByColumn) {
        if (dA) add_outer_of_rows(m, (const X *)p.x + row * p.x_stride, p.x_stride, m.bits, count, p.K, m.t, dA);
      } else for (int64_t k = 0; dA && k < p.K; k += kMasked) {
        const int64_t depth = smaller(kMasked, p.K - k);
        for (int64_t i = 0; i < count; i += kTileRows) {
          const uint64_t *bits = m.bits ? m.bits + i * m.row_bits + k / 64 : nullptr;
          pack((const X *)p.x + (row + i) * p.x_stride + k, p.x_stride, smaller(kTileRows, count - i), depth, bits, m.row_bits, m.chunk + i * kMasked);
        }
        add_outer(m, m.chunk, kMasked * kTileRows, count, depth, m.t, dA + k * ld(p), ld(p));
      }
      if (!p.dx) continue;
      pack_t(m, count);
      const Product product = {count, p.K, &p.weight, false, (const A *)p.A, p.K, false, p.scaling * p.dropout.scale, (X *)p.dx + row * p.K, m.bits, p.onto};
      for (int64_t k = 0; k < p.K; k += m.group * kTileColumns) finish_panels(p, m, product, k, smaller(m.group * kTileColumns, p.K - k), nullptr);
    }
  }
};

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
