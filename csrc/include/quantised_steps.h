// A quantised weight in steps: kStep neighbours of a row, decoded in registers. What AVX2 has for the formats of quantised.h where
// K is a multiple of kStep and no step has two scales, but for mxfp4 and nvfp4 (steps_take). The numbers are the same; their order
// is the cheapest.
//
//   step(n, k, f)   f(j, value) for 0 <= j < kVectors, in this order: lane t of value is W[n, k + element(j W + t)]
//
// For bf16 the values are rounded to it. Where kScaled, which is for fp32, they are those before the scale, which is what step
// returns, lane by lane: their product, rounded once, is the number, and a sum of a step may be scaled as a whole.
//
// Codes of 4 bits and fp8 are looked up by byte: a shuffle finds a byte of 32 values at once, and the bytes of two or four
// shuffles, unpacked, are the values. int8 has too many of them; it is converted, multiplied and rounded.
#pragma once
#include <type_traits>

#include "byte_tables.h"

namespace peftkern {
namespace PEFTKERN_ISA {

constexpr int64_t kStep = 64;

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kVectors = int(kStep) / W;

template <class X> static bool steps_take(const Weight &w) {
  const bool whole = w.group_shift >= 6 || w.format == WeightFormat::mxfp4 || w.format == WeightFormat::nvfp4;
  return !std::is_same<X, fp16>::value && w.format != WeightFormat::dense && w.columns % kStep == 0 && whole;
}

// The formulas of CodeFormat.
template <class X> struct CodeSteps {
  static constexpr bool kNarrow = sizeof(X) == 2, kScaled = !kNarrow;
  typedef ByteTables<kNarrow ? 2 : 4> Tables;
  static int element(int i) { return element_of_nibbles<Tables>(i); }
  const Weight &w;
  Tables tables;
  BlockTables<64> blocks;
  int64_t first = 0;  // of the blocks that have tables
  explicit CodeSteps(const Weight &w) : w(w), blocks((const float *)w.table) {
    const float *numbers = (const float *)w.table;
    tables.make((vu)load(numbers), (vu)load(numbers + W));
  }
  // To be called for steps k ... k + count of a row n before they are taken; count <= kCount.
  static constexpr int64_t kCount = (decltype(blocks)::kBlocks - 2) * kStep;
  void prepare(int64_t n, int64_t k, int64_t count) {
    if (!kNarrow) return;
    const int64_t i = n * w.columns + k, last = (i + count - 1) >> w.group_shift;
    first = i >> w.group_shift;
    alignas(32) float absmax[kSizes];
    sizes(first, last + 1, absmax);
    absmax[last - first + 1] = 0;  // of a last pair's second
    for (int64_t block = 0; block <= last - first; block += 2) {
      const vf size = halves(absmax[block], absmax[block + 1]);
      blocks.make(block / 2, [&](vf numbers, int) { return numbers * size; });
    }
  }
  // absmax[b - begin] for blocks begin to end, as CodeFormat::absmax has them; up to W more behind may be written.
  static constexpr int64_t kSizes = decltype(blocks)::kBlocks + W;
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
      find_nibbles<First::high>(blocks.of(block - first), data, f);
      return vf{};
    } else {
      find_nibbles<First::high>(tables, data, f);
      return splat(CodeFormat::absmax(w, block));
    }
  }
};

// Of Int4Format: q - zero_point is a number of bf16.
template <class X> struct Int4Steps {
  static constexpr bool kScaled = sizeof(X) == 4;
  typedef ByteTables<2> Tables;
  static int element(int i) { return element_of_nibbles<Tables>(i); }
  const Weight &w;
  BlockTables<64> blocks;
  int64_t first = 0;
  explicit Int4Steps(const Weight &w) : w(w), blocks(Int4Format::kNumbers) {}
  static constexpr int64_t kCount = (decltype(blocks)::kBlocks - 2) * kStep;
  void prepare(int64_t n, int64_t k, int64_t count) {
    const int64_t row = n * w.scale_stride, last = row + ((k + count - 1) >> w.group_shift);
    first = row + (k >> w.group_shift);
    const uint8_t *zero_points = (const uint8_t *)w.table;
    const float *scales = (const float *)w.scale;
    for (int64_t block = first; block <= last; block += 2) {
      const int64_t other = smaller(block + 1, last);
      const vf zero_point = halves(zero_points[block], zero_points[other]);
      const vf scale = sizeof(X) == 4 ? splat(1) : halves(scales[block], scales[other]);
      blocks.make((block - first) / 2, [&](vf numbers, int) { return (numbers - zero_point) * scale; });
    }
  }
  template <class F> __attribute__((always_inline)) vf step(int64_t n, int64_t k, F f) const {
    const int64_t block = n * w.scale_stride + (k >> w.group_shift);
    find_nibbles<First::high>(blocks.of(block - first), (const uint8_t *)w.data + ((n * w.columns + k) >> 1), f);
    return splat(((const float *)w.scale)[block]);
  }
};

// Of Int8Format: 8 doublewords have 32 numbers, one of each vector.
template <class X> struct Int8Steps {
  static constexpr bool kScaled = sizeof(X) == 4;
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
  static constexpr bool kScaled = sizeof(X) == 4;
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

// Of E2M1Format<PowerScales>: a half of the registers for each of two groups, and numbers of bf16 whatever their scale.
struct MXFP4Steps {
  static constexpr bool kScaled = true;
  typedef ByteTables<2> Tables;
  static int element(int i) { return element_of_nibbles<Tables>(i); }
  const Weight &w;
  Tables tables;
  explicit MXFP4Steps(const Weight &w) : w(w) {
    const float *numbers = E2M1Format<PowerScales>::kNumbers;
    tables.make((vu)load(numbers), (vu)load(numbers + W));
  }
  void prepare(int64_t, int64_t, int64_t) {}
  template <class F> __attribute__((always_inline)) vf step(int64_t n, int64_t k, F f) const {
    find_nibbles<First::low>(tables, (const uint8_t *)w.data + ((n * w.columns + k) >> 1), f);
    const uint8_t *scale = (const uint8_t *)w.scale + n * w.scale_stride + (k >> 5);
    return PowerScales::size((vu)_mm256_blend_epi32(_mm256_set1_epi32(scale[0]), _mm256_set1_epi32(scale[1]), 0xf0));
  }
};

// Of E2M1Format<MappedScales>: a half of the registers has two groups, so for bf16 a table has the 8 magnitudes of both.
template <class X> struct NVFP4Steps {
  static constexpr bool kNarrow = sizeof(X) == 2, kScaled = false;
  typedef ByteTables<2> Tables;
  typedef E2M1Format<MappedScales> Format;
  static constexpr float kMagnitudes[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, 0.5, 1, 1.5, 2, 3, 4, 6};
  static int element(int i) { return element_of_nibbles<Tables>(i); }
  const Weight &w;
  Tables tables;
  BlockTables<128> blocks;
  float sizes[256];
  int64_t first = 0;  // where the row of the tables, or of the sizes, begins
  explicit NVFP4Steps(const Weight &w) : w(w), blocks(kMagnitudes) {
    tables.make((vu)load(Format::kNumbers), (vu)load(Format::kNumbers + W));
  }
  void prepare(int64_t n, int64_t k, int64_t count) {
    first = k;
    Format::sizes(w, n, k >> 4, count >> 4, sizes);
    for (int64_t i = 0; kNarrow && i < count / kStep; ++i) {
      const vf size[2] = {halves(sizes[4 * i], sizes[4 * i + 2]), halves(sizes[4 * i + 1], sizes[4 * i + 3])};
      blocks.make(i, [&](vf numbers, int part) { return numbers * size[part]; });
    }
  }
  template <class F> __attribute__((always_inline)) vf step(int64_t n, int64_t k, F f) const {
    const int64_t i = (k - first) / kStep;
    const uint8_t *data = (const uint8_t *)w.data + ((n * w.columns + k) >> 1);
    if constexpr (kNarrow) {
      const Tables both = blocks.of_pair(2 * i);
      const __m256i codes = _mm256_loadu_si256((const __m256i *)data);
      find(both, codes, _mm256_slli_epi16(codes, 4), 0, f);
      find(both, _mm256_srli_epi16(codes, 4), codes, 4, f);
    } else {
      const vf even = halves(sizes[4 * i], sizes[4 * i + 2]), odd = halves(sizes[4 * i + 1], sizes[4 * i + 3]);
      find_nibbles<First::low>(tables, data, [&](int j, vf value) __attribute__((always_inline)) { f(j, value * (j & 2 ? odd : even)); });
    }
    return vf{};
  }
  // Of 32 codes, their magnitudes in bits 0 to 2 and their signs in bits 7 of `signs`.
  template <class F> __attribute__((always_inline)) static void find(const Tables &both, __m256i codes, __m256i signs, int at, F f) {
    const __m256i second = _mm256_set_epi64x(0x0808080808080808, 0, 0x0808080808080808, 0);
    const __m256i places = _mm256_or_si256(_mm256_and_si256(codes, _mm256_set1_epi8(7)), second);
    const __m256i sign = _mm256_and_si256(signs, _mm256_set1_epi8(char(0x80)));
    const __m256i bytes[2] = {_mm256_shuffle_epi8(both.part[0], places), _mm256_xor_si256(_mm256_shuffle_epi8(both.part[1], places), sign)};
    Tables::numbers(bytes, at, f);
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
    case WeightFormat::mxfp4: return f(MXFP4Steps(w));
    case WeightFormat::nvfp4: return f(NVFP4Steps<X>(w));
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
        for (int at = 0; steps.kScaled && at < kVectors; ++at) store(load(target + at * W) * factor, target + at * W);
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
