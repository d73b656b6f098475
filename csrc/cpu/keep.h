// What dropout leaves of a matrix, unscaled, for products of which every operand is dropped.
#pragma once
#include "../include/philox.h"
#include "parallel.h"
#include "scratch.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// Elements are copied as words of their size: a NaN that is dropped becomes 0, one that is kept stays as it is.
template <class Word> static void keep_rows(const Keep &p, Range rows) {
  constexpr int64_t kColumns = 512;
  uint64_t bits[kColumns / 64];
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t k = 0; k < p.K; k += kColumns) {
      const int64_t width = smaller(kColumns, p.K - k);
      const Word *x = static_cast<const Word *>(p.x) + row * p.x_stride + k;
      Word *kept = static_cast<Word *>(p.kept) + row * p.K + k;
      keep_bits_row(p.dropout, row, k, width, bits);
      int64_t j = 0;
      for (; j + 64 <= width; j += 64) {
        for (int i = 0; i < 64; ++i) kept[j + i] = Word(x[j + i] & Word(0 - (bits[j / 64] >> i & 1)));
      }
      for (; j < width; ++j) kept[j] = bits[j / 64] >> (j % 64) & 1 ? x[j] : Word(0);
    }
  }
}

static void keep(const Keep &call) {
  constexpr int64_t kGrain = 8;
  const int threads = static_cast<int>(smaller(call.threads, (call.M + kGrain - 1) / kGrain));
  parallel_run(threads, [](void *data, int index, int count) {
    const Keep &p = *static_cast<const Keep *>(data);
    const Range rows = share(p.M, kGrain, index, count);
    if (p.dtype == DType::float32) keep_rows<uint32_t>(p, rows);
    else keep_rows<uint16_t>(p, rows);
  }, const_cast<Keep *>(&call));
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
