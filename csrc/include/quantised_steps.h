// A quantised weight in steps: kStep neighbours of a row, decoded in registers. What AVX2 has for the formats of quantised.h where
// K is a multiple of kStep and no step has two scales (steps_take). The numbers are the same; their order is the cheapest.
//
//   step(n, k, f)   f(j, value) for 0 <= j < kVectors: lane t of value is W[n, k + element(j W + t)]
//
// For bf16 the values are rounded to it. For fp32 they are those before the scale, which is what step returns: their product,
// rounded once, is the number, and a sum of a step may be scaled as a whole.
//
// Codes of 4 bits and fp8 are looked up by byte: a shuffle finds a byte of 32 values at once, and the bytes of two or four
// shuffles, unpacked, are the values. int8 has too many of them; it is converted, multiplied and rounded.
#pragma once
#include <type_traits>

#include "quantised.h"

namespace peftkern {
namespace PEFTKERN_ISA {

constexpr int64_t kStep = 64;

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kVectors = int(kStep) / W;

template <class X> static bool steps_take(const Weight &w) {
  return !std::is_same<X, fp16>::value && w.format != WeightFormat::dense && w.columns % kStep == 0 && w.group_shift >= 6;
}

// 16 numbers whose fp32 bits are zero but for the upper BYTES bytes: a table for each of those, lowest first, in both halves.
template <int BYTES> struct ByteTables {
  __m256i part[BYTES];

  void make(const vu low, const vu high) {  // the bits of numbers 0 ... 7 and 8 ... 15
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5);
#pragma GCC unroll 4
    for (int b = 0; b < BYTES; b += 2) {
      const int shift = 32 - 8 * BYTES + 8 * b;
      const __m256i words = _mm256_packus_epi32((__m256i)(low >> shift & 0xffff), (__m256i)(high >> shift & 0xffff));
      const __m256i bytes = _mm256_packus_epi16(_mm256_and_si256(words, _mm256_set1_epi16(255)), _mm256_srli_epi16(words, 8));
      part[b] = _mm256_permutevar8x32_epi32(bytes, order);
      part[b + 1] = _mm256_permutevar8x32_epi32(bytes, _mm256_add_epi32(order, _mm256_set1_epi32(2)));
    }
  }

  // Of 32 codes, of which bits 0 to 3 count (0 where bit 7 is set): their numbers as vectors `first` to first + 3.
  template <class F> __attribute__((always_inline)) void find(__m256i codes, int first, F f) const {
    __m256i bytes[BYTES];
#pragma GCC unroll 4
    for (int b = 0; b < BYTES; ++b) bytes[b] = _mm256_shuffle_epi8(part[b], codes);
    numbers(bytes, first, f);
  }

  template <class F> __attribute__((always_inline)) static void numbers(const __m256i bytes[BYTES], int first, F f) {
    if constexpr (BYTES == 2) {
      const vu low = (vu)_mm256_unpacklo_epi8(bytes[0], bytes[1]), high = (vu)_mm256_unpackhi_epi8(bytes[0], bytes[1]);
      f(first, (vf)(low << 16)), f(first + 1, (vf)(low & 0xffff0000u));
      f(first + 2, (vf)(high << 16)), f(first + 3, (vf)(high & 0xffff0000u));
    } else {
      const __m256i low0 = _mm256_unpacklo_epi8(bytes[0], bytes[1]), low1 = _mm256_unpacklo_epi8(bytes[2], bytes[3]);
      const __m256i high0 = _mm256_unpackhi_epi8(bytes[0], bytes[1]), high1 = _mm256_unpackhi_epi8(bytes[2], bytes[3]);
      f(first, (vf)_mm256_unpacklo_epi16(low0, low1)), f(first + 1, (vf)_mm256_unpackhi_epi16(low0, low1));
      f(first + 2, (vf)_mm256_unpacklo_epi16(high0, high1)), f(first + 3, (vf)_mm256_unpackhi_epi16(high0, high1));
    }
  }

  // Which of 32 codes the number in a lane of vector j of 4 is.
  static int place(int j, int lane) {
    return lane / 4 * 16 + (BYTES == 2 ? j / 2 * 8 + lane % 4 * 2 + j % 2 : j * 4 + lane % 4);
  }
};

// The 64 nibbles from data[0]: the even ones, then the odd ones.
template <class Tables, class F> __attribute__((always_inline)) static inline void find_nibbles(const Tables &tables, const uint8_t *data, F f) {
  const __m256i codes = _mm256_loadu_si256((const __m256i *)data), mask = _mm256_set1_epi8(15);
  tables.find(_mm256_and_si256(_mm256_srli_epi16(codes, 4), mask), 0, f);
  tables.find(_mm256_and_si256(codes, mask), 4, f);
}
template <class Tables> static int element_of_nibbles(int i) {
  return Tables::place(i / W % 4, i % W) * 2 + i / W / 4;
}

// The tables of a few blocks, two made at a time: a half of the registers for each.
struct BlockTables {
  static constexpr int64_t kBlocks = 64;
  alignas(32) uint8_t low[kBlocks][16], high[kBlocks][16];
  vf even[2], odd[2];  // numbers 0 2 4 6 and 8 10 12 14, twice; 1 3 5 7 and 9 11 13 15

  explicit BlockTables(const float *numbers) {
    for (int i = 0; i < 2 * W; ++i) {
      even[i / W][i % W] = numbers[i / W * 8 + i % 4 * 2];
      odd[i / W][i % W] = numbers[i / W * 8 + i % 4 * 2 + 1];
    }
  }

  // Of two vectors, rounded to bf16, the upper halves of their lanes, alternating.
  static __m256i rounded_words(vf even, vf odd) {
    const __m256i a = (__m256i)even, b = (__m256i)odd;
    const __m256i upper = _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xaa), lower = _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa);
    // (lower + 0x7fff + the upper half's lowest bit) >> 16, as an average that keeps its 17th bit
    const __m256i half = _mm256_or_si256(_mm256_and_si256(upper, _mm256_set1_epi16(1)), _mm256_set1_epi16(0x7ffe));
    return _mm256_add_epi16(upper, _mm256_srli_epi16(_mm256_avg_epu16(lower, half), 15));
  }

  // numbers * scale for blocks 2 i and 2 i + 1, whose scales fill a half each
  template <class F> __attribute__((always_inline)) void make(int64_t i, F scaled) {
    const __m256i apart = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    const __m256i first = _mm256_shuffle_epi8(rounded_words(scaled(even[0]), scaled(odd[0])), apart);
    const __m256i second = _mm256_shuffle_epi8(rounded_words(scaled(even[1]), scaled(odd[1])), apart);
    _mm256_store_si256((__m256i *)low[2 * i], _mm256_unpacklo_epi64(first, second));
    _mm256_store_si256((__m256i *)high[2 * i], _mm256_unpackhi_epi64(first, second));
  }

  ByteTables<2> of(int64_t block) const {
    const auto both = [](const uint8_t *table) { return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)table)); };
    return {both(low[block]), both(high[block])};
  }
};

static inline vf halves(float first, float second) {
  return (vf)_mm256_blend_ps(_mm256_set1_ps(first), _mm256_set1_ps(second), 0xf0);
}

// The formulas of CodeFormat.
template <class X> struct CodeSteps {
  static constexpr bool kNarrow = sizeof(X) == 2;
  typedef ByteTables<kNarrow ? 2 : 4> Tables;
  static int element(int i) { return element_of_nibbles<Tables>(i); }
  const Weight &w;
  Tables tables;
  BlockTables blocks;
  int64_t first = 0;  // of the blocks that have tables
  explicit CodeSteps(const Weight &w) : w(w), blocks((const float *)w.table) {
    const float *numbers = (const float *)w.table;
    tables.make((vu)load(numbers), (vu)load(numbers + W));
  }
  // To be called for steps k ... k + count of a row n before they are taken; count <= kCount.
  static constexpr int64_t kCount = (BlockTables::kBlocks - 2) * kStep;
  void prepare(int64_t n, int64_t k, int64_t count) {
    if (!kNarrow) return;
    const int64_t i = n * w.columns + k, last = (i + count - 1) >> w.group_shift;
    first = i >> w.group_shift;
    alignas(32) float absmax[kSizes];
    sizes(first, last + 1, absmax);
    absmax[last - first + 1] = 0;  // of a last pair's second
    for (int64_t block = 0; block <= last - first; block += 2) {
      const vf size = halves(absmax[block], absmax[block + 1]);
      blocks.make(block / 2, [&](vf numbers) { return numbers * size; });
    }
  }
  // absmax[b - begin] for blocks begin to end, as CodeFormat::absmax has them; up to W more behind may be written.
  static constexpr int64_t kSizes = BlockTables::kBlocks + W;
  void sizes(int64_t begin, int64_t end, float *absmax) const {
    const int64_t count = end - begin;
    if (!w.nested_code) return void(memcpy(absmax, (const float *)w.scale + begin, count * sizeof(float)));
    const uint8_t *codes = (const uint8_t *)w.scale + begin;
    const float *numbers = w.nested_code, *sizes_of_256 = w.nested_absmax;
    const vf offset = splat(*w.nested_offset);
    alignas(32) float found[kSizes];
    for (int64_t b = 0; b < count; ++b) found[b] = numbers[codes[b]];
    for (int64_t b = count; b < count + W; ++b) found[b] = 0;
    for (int64_t b = 0, next; b < count; b = next) {
      next = smaller(count, ((begin + b) / 256 + 1) * 256 - begin);
      const vf size = splat(sizes_of_256[(begin + b) / 256]);
      for (int64_t j = b; j < next; j += W) store(product(load(found + j), size) + offset, absmax + j);
    }
  }
  template <class F> __attribute__((always_inline)) vf step(int64_t n, int64_t k, F f) const {
    const int64_t i = n * w.columns + k, block = i >> w.group_shift;
    const uint8_t *data = (const uint8_t *)w.data + (i >> 1);
    if constexpr (kNarrow) {
      find_nibbles(blocks.of(block - first), data, f);
      return vf{};
    } else {
      find_nibbles(tables, data, f);
      return splat(CodeFormat::absmax(w, block));
    }
  }
};

// Of Int4Format: q - zero_point is a number of bf16.
template <class X> struct Int4Steps {
  typedef ByteTables<2> Tables;
  static int element(int i) { return element_of_nibbles<Tables>(i); }
  const Weight &w;
  BlockTables blocks;
  int64_t first = 0;
  explicit Int4Steps(const Weight &w) : w(w), blocks(Int4Format::kNumbers) {}
  static constexpr int64_t kCount = (BlockTables::kBlocks - 2) * kStep;
  void prepare(int64_t n, int64_t k, int64_t count) {
    const int64_t row = n * w.scale_stride, last = row + ((k + count - 1) >> w.group_shift);
    first = row + (k >> w.group_shift);
    const uint8_t *zero_points = (const uint8_t *)w.table;
    const float *scales = (const float *)w.scale;
    for (int64_t block = first; block <= last; block += 2) {
      const int64_t other = smaller(block + 1, last);
      const vf zero_point = halves(zero_points[block], zero_points[other]);
      const vf scale = sizeof(X) == 4 ? splat(1) : halves(scales[block], scales[other]);
      blocks.make((block - first) / 2, [&](vf numbers) { return (numbers - zero_point) * scale; });
    }
  }
  template <class F> __attribute__((always_inline)) vf step(int64_t n, int64_t k, F f) const {
    const int64_t block = n * w.scale_stride + (k >> w.group_shift);
    find_nibbles(blocks.of(block - first), (const uint8_t *)w.data + ((n * w.columns + k) >> 1), f);
    return splat(((const float *)w.scale)[block]);
  }
};

// Of Int8Format: 8 doublewords have 32 numbers, one of each vector.
template <class X> struct Int8Steps {
  static int element(int i) { return i / 32 * 32 + i % W * 4 + i / W % 4; }
  const Weight &w;
  explicit Int8Steps(const Weight &w) : w(w) {}
  void prepare(int64_t, int64_t, int64_t) {}
  template <class F> __attribute__((always_inline)) vf step(int64_t n, int64_t k, F f) {
    const vf scale = splat(((const float *)w.scale)[n * w.scale_stride + (k >> w.group_shift)]);
    const auto number = [&](vu upper) {
      const vf value = __builtin_convertvector((vi)upper >> 24, vf);
      return sizeof(X) == 2 ? round_decoded(value * scale, X()) : value;
    };
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      vu codes;
      memcpy(&codes, (const uint8_t *)w.data + n * w.columns + k + half * 32, sizeof codes);
      f(half * 4, number(codes << 24)), f(half * 4 + 1, number(codes << 16));
      f(half * 4 + 2, number(codes << 8)), f(half * 4 + 3, number(codes));
    }
    return scale;
  }
};

// Of FP8Format. A code is s eeee mmm. Its number is that of 000e mmm with eee more in the exponent of 4, a step of which is 1 in the
// upper byte; those of eeee = 0 have a table of their own. So two tables of 16 are enough, as long as the exponents of scaled numbers fit.
template <class X> struct FP8Steps {
  typedef ByteTables<2> Tables;
  static int element(int i) { return i / 32 * 32 + Tables::place(i / W % 4, i % W); }
  const Weight &w;
  Tables normal, subnormal;
  int64_t row = -1, group = -1;
  float scale = 0;
  bool fits = true;
  explicit FP8Steps(const Weight &w) : w(w) { if (sizeof(X) == 4) make_tables(1); }
  void prepare(int64_t, int64_t, int64_t) {}
  template <class F> __attribute__((always_inline)) vf step(int64_t n, int64_t k, F f) {
    if (n != row || k >> w.group_shift != group) make(n, k >> w.group_shift);
    const uint8_t *data = (const uint8_t *)w.data + n * w.columns + k;
    if (__builtin_expect(fits, 1)) {
      find(data, 0, f);
      find(data + 32, 4, f);
    } else {
      float lanes[kStep];
      one_by_one(data, lanes);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) f(j, load(lanes + j * W));
    }
    return splat(scale);
  }
  template <class F> __attribute__((always_inline)) void find(const uint8_t *data, int first, F f) const {
    const __m256i codes = _mm256_loadu_si256((const __m256i *)data);
    const __m256i magnitude = _mm256_and_si256(codes, _mm256_set1_epi8(0x7f)), nan = _mm256_cmpeq_epi8(magnitude, _mm256_set1_epi8(0x7f));
    // A code that is not a table's has its bit 7 set, and finds 0.
    const __m256i is_small = _mm256_cmpgt_epi8(_mm256_set1_epi8(8), magnitude);
    const __m256i in_normal = _mm256_or_si256(magnitude, is_small), in_subnormal = _mm256_adds_epu8(magnitude, _mm256_set1_epi8(0x78));
    __m256i bytes[2];
#pragma GCC unroll 2
    for (int b = 0; b < 2; ++b) {
      const __m256i found = _mm256_or_si256(_mm256_shuffle_epi8(normal.part[b], in_normal), _mm256_shuffle_epi8(subnormal.part[b], in_subnormal));
      bytes[b] = _mm256_or_si256(found, nan);
    }
    const __m256i more = _mm256_and_si256(_mm256_srli_epi16(magnitude, 4), _mm256_set1_epi8(7));
    const __m256i sign = _mm256_andnot_si256(_mm256_or_si256(nan, _mm256_set1_epi8(0x7f)), codes);
    bytes[1] = _mm256_xor_si256(_mm256_add_epi8(bytes[1], _mm256_andnot_si256(nan, more)), sign);
    Tables::numbers(bytes, first, f);
  }
  void make(int64_t n, int64_t g) {
    row = n, group = g, scale = ((const float *)w.scale)[(n >> w.row_shift) * w.scale_stride + g];
    const float size = scale < 0 ? -scale : scale;
    fits = sizeof(X) == 4 || (size > 0x1p-100f && size < 0x1p100f);
    if (sizeof(X) == 2) make_tables(scale);
  }
  void make_tables(float factor) {
    float normal_numbers[16], small_numbers[16];
    for (int i = 0; i < 16; ++i) {
      normal_numbers[i] = float(8 + i % 8) * (i < 8 ? 0x1p-10f : 0x1p-9f);
      small_numbers[i] = float(i % 8) * 0x1p-9f;
    }
    const auto number = [&](const float *numbers) { return (vu)round_decoded(load(numbers) * factor, bf16()); };
    normal.make(number(normal_numbers), number(normal_numbers + W));
    subnormal.make(number(small_numbers), number(small_numbers + W));
  }
  void one_by_one(const uint8_t *data, float *lanes) const {
    for (int64_t i = 0; i < kStep; i += W) {
      vu codes;
      for (int lane = 0; lane < W; ++lane) codes[lane] = data[element(int(i) + lane)];
      store(round_decoded(FP8Format::widen(codes) * scale, X()), lanes + i);
    }
  }
};

// f with the steps of the weight's format.
template <class X, class F> static inline void with_steps(const Weight &w, F f) {
  switch (w.format) {
    case WeightFormat::dense: return;
    case WeightFormat::code: return f(CodeSteps<X>(w));
    case WeightFormat::int4: return f(Int4Steps<X>(w));
    case WeightFormat::int8: return f(Int8Steps<X>(w));
    case WeightFormat::fp8: return f(FP8Steps<X>(w));
  }
}

// out[i * ld + j] = W[n + i, k + element(j)]
template <class X> static void decode_steps(const Weight &w, int64_t n, int64_t k, int64_t rows, int64_t count, float *out, int64_t ld) {
  with_steps<X>(w, [&](auto steps) {
    for (int64_t i = 0; i < rows; ++i) {
      steps.prepare(n + i, k, count);
      for (int64_t j = 0; j < count; j += kStep) {
        float *target = out + i * ld + j;
        const vf factor = steps.step(n + i, k + j, [&](int at, vf value) __attribute__((always_inline)) { store(value, target + at * W); });
        for (int at = 0; sizeof(X) == 4 && at < kVectors; ++at) store(load(target + at * W) * factor, target + at * W);
      }
    }
  });
}

// from[i] = element(i)
template <class X> static void order_of_steps(const Weight &w, uint8_t from[kStep]) {
  with_steps<X>(w, [&](auto steps) { for (int i = 0; i < kStep; ++i) from[i] = uint8_t(steps.element(i)); });
}
#else
template <class X> static bool steps_take(const Weight &) { return false; }
template <class X> static void decode_steps(const Weight &, int64_t, int64_t, int64_t, int64_t, float *, int64_t) {}
template <class X> static void order_of_steps(const Weight &, uint8_t *) {}
#endif

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
