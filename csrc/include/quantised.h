// Blocks of a quantised weight, decoded: what FrozenWeight.materialize of peftkern/weights gives, bit for bit.
//
//   decode<X>    out[i, j] = W[n + i, k + j], decoded in fp32 and rounded once to X
//
// Every format makes a vector of neighbours at a time from their codes and one scale; what is left over at an end, and the half
// byte with which a row may begin, goes through the same arithmetic in a vector of its own.
#pragma once
#include "vec.h"

namespace peftkern {
namespace PEFTKERN_ISA {

static inline vf round_decoded(vf value, float) { return value; }
static inline vf round_decoded(vf value, bf16) {  // of what is decoded, NaN has no payload that could overflow
  const vu bits = (vu)value;
  return (vf)((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
}
static inline vf round_decoded(vf value, fp16) {
  fp16 lanes[W];
  store(value, lanes);
  return load(lanes);
}

// A product that no later sum is fused with: the formats round it.
static inline float product(float a, float b) {
  float value = a * b;
#if defined(__x86_64__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
  return value;
}

#if defined(__AVX2__)
static inline vf product(vf a, vf b) {
  vf value = a * b;
  asm("" : "+x"(value));
  return value;
}
#endif

// Which half of a byte the first of its two nibbles is.
enum class First { high, low };

template <First FIRST> static inline uint32_t nibble(const uint8_t *data, int64_t i) {
  return (FIRST == First::low) == (i & 1) ? data[i / 2] >> 4 : data[i / 2] & 15;
}

// The W nibbles from the even place i, each in the low bits of its lane with others above it.
template <First FIRST> static inline vu nibbles(const uint8_t *data, int64_t i) {
#if defined(__AVX2__)
  uint32_t words[W / 8];
  memcpy(words, data + i / 2, sizeof words);
  const __m256i shifts = FIRST == First::low ? _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28) : _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
#if defined(__AVX512F__)
  const __m512i pairs = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set1_epi32(int(words[0]))), _mm256_set1_epi32(int(words[1])), 1);
  return (vu)_mm512_srlv_epi32(pairs, _mm512_broadcast_i64x4(shifts));
#else
  return (vu)_mm256_srlv_epi32(_mm256_set1_epi32(int(words[0])), shifts);
#endif
#else
  vu codes;
  for (int lane = 0; lane < W; ++lane) codes[lane] = nibble<FIRST>(data, i + lane);
  return codes;
#endif
}

// 16 values in registers, each found by the low four bits of a lane.
struct Table {
  vf part[16 / W];
  template <class F> Table(const float *values, F f) {
    for (int i = 0; i < 16 / W; ++i) part[i] = f(load(values + i * W));
  }
  vf operator[](vu codes) const {
#if defined(__AVX512F__)
    return (vf)_mm512_permutexvar_ps((__m512i)codes, (__m512)part[0]);
#elif defined(__AVX2__)
    const __m256 low = _mm256_permutevar8x32_ps((__m256)part[0], (__m256i)codes), high = _mm256_permutevar8x32_ps((__m256)part[1], (__m256i)codes);
    return (vf)_mm256_blendv_ps(low, high, (__m256)(codes << 28));
#else
    vf values;
    for (int lane = 0; lane < W; ++lane) values[lane] = part[(codes[lane] & 15) / W][codes[lane] % W];
    return values;
#endif
  }
};

// W bytes from `data`, one a lane.
static inline vu bytes(const uint8_t *data) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)data));
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)data));
#else
  vu codes;
  for (int lane = 0; lane < W; ++lane) codes[lane] = data[lane];
  return codes;
#endif
}

// out[j] = decode(codes of j), rounded: `at(j)` gives one code, `load(j)` the W from j, which is no smaller than `begin`.
template <class At, class Load, class Decode>
__attribute__((always_inline)) static inline void span(int64_t begin, int64_t count, float *out, At at, Load load_codes, Decode decode) {
  const auto some = [&](int64_t j, int64_t width) {
    vu codes = {};
    for (int64_t lane = 0; lane < width; ++lane) codes[lane] = at(j + lane);
    float lanes[W];
    store(decode(codes), lanes);
    memcpy(out + j, lanes, width * sizeof(float));
  };
  int64_t j = smaller(begin, count);
  if (j) some(0, j);
  for (; j + W <= count; j += W) store(decode(load_codes(j)), out + j);
  if (j < count) some(j, count - j);
}

template <First FIRST, class Decode>
__attribute__((always_inline)) static inline void span_of_nibbles(const uint8_t *data, int64_t i, int64_t count, float *out, Decode decode) {
  span(i & 1, count, out, [=](int64_t j) { return nibble<FIRST>(data, i + j); }, [=](int64_t j) { return nibbles<FIRST>(data, i + j); }, decode);
}

template <class X, class Decode>
__attribute__((always_inline)) static inline void span_of_bytes(const uint8_t *data, int64_t count, float *out, Decode decode) {
  span(0, count, out, [=](int64_t j) { return uint32_t(data[j]); }, [=](int64_t j) { return bytes(data + j); },
       [&](vu codes) { return round_decoded(decode(codes), X()); });
}

// Calls f(j, width, block) for the parts of `count` elements from the place i that share a block of 2^shift.
template <class F> __attribute__((always_inline)) static inline void blocks(int64_t i, int64_t count, int shift, F f) {
  for (int64_t j = 0; j < count;) {
    const int64_t block = (i + j) >> shift, width = smaller(count - j, ((block + 1) << shift) - i - j);
    f(j, width, block);
    j += width;
  }
}

// nf4, fp4: W[i] = code[q[i]] absmax[i >> shift] over the flattened weight; absmax may be codes of a second quantisation.
struct CodeFormat {
  static float absmax(const Weight &w, int64_t block) {
    if (!w.nested_code) return ((const float *)w.scale)[block];
    return product(w.nested_code[((const uint8_t *)w.scale)[block]], w.nested_absmax[block / 256]) + *w.nested_offset;
  }
  template <class X> static inline void row(const Weight &w, int64_t n, int64_t k, int64_t count, float *out) {
    const int64_t i = n * w.columns + k;
    const float *code = (const float *)w.table;
    blocks(i, count, w.group_shift, [&](int64_t j, int64_t width, int64_t block) {
      const vf size = splat(absmax(w, block));
      const Table table(code, [&](vf value) { return round_decoded(value * size, X()); });
      span_of_nibbles<First::high>((const uint8_t *)w.data, i + j, width, out + j, [=](vu codes) { return table[codes]; });
    });
  }
};

// int4: W[n, k] = (q[n, k] - zero_point[n, g]) scale[n, g], g = k >> shift; a row begins with a byte.
struct Int4Format {
  static constexpr float kNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  template <class X> static inline void row(const Weight &w, int64_t n, int64_t k, int64_t count, float *out) {
    const uint8_t *data = (const uint8_t *)w.data + n * ((w.columns + 1) / 2);
    const uint8_t *zero_points = (const uint8_t *)w.table + n * w.scale_stride;
    const float *scales = (const float *)w.scale + n * w.scale_stride;
    blocks(k, count, w.group_shift, [&](int64_t j, int64_t width, int64_t group) {
      const vf scale = splat(scales[group]), zero_point = splat(float(zero_points[group]));
      const Table table(kNumbers, [&](vf value) { return round_decoded((value - zero_point) * scale, X()); });
      span_of_nibbles<First::high>(data, k + j, width, out + j, [=](vu codes) { return table[codes]; });
    });
  }
};

// int8: W[n, k] = q[n, k] scale[n, k >> shift].
struct Int8Format {
  template <class X> static inline void row(const Weight &w, int64_t n, int64_t k, int64_t count, float *out) {
    const uint8_t *data = (const uint8_t *)w.data + n * w.columns + k;
    const float *scales = (const float *)w.scale + n * w.scale_stride;
    blocks(k, count, w.group_shift, [&](int64_t j, int64_t width, int64_t group) {
      const vf scale = splat(scales[group]);
      span_of_bytes<X>(data + j, width, out + j, [&](vu codes) { return __builtin_convertvector((vi)(codes << 24) >> 24, vf) * scale; });
    });
  }
};

// fp8 e4m3: W[n, k] = q[n, k] scale[n >> row_shift, k >> shift]. Subnormals are made of integers, since a processor may be told
// to take those of fp32 for zeros.
struct FP8Format {
  static inline vf widen(vu codes) {
    const vu magnitude = codes & 0x7f, sign = (codes & 0x80) << 24;
    const vu normal = (magnitude << 20) + (120u << 23), subnormal = (vu)(__builtin_convertvector((vi)magnitude, vf) * 0x1p-9f);
    const vu small = (vu)(magnitude < 8), nan = (vu)(magnitude == 0x7f);
    return (vf)((small & subnormal) | (~small & normal) | (nan & 0x7fc00000u) | sign);
  }
  template <class X> static inline void row(const Weight &w, int64_t n, int64_t k, int64_t count, float *out) {
    const uint8_t *data = (const uint8_t *)w.data + n * w.columns + k;
    const float *scales = (const float *)w.scale + (n >> w.row_shift) * w.scale_stride;
    blocks(k, count, w.group_shift, [&](int64_t j, int64_t width, int64_t group) {
      const vf scale = splat(scales[group]);
      span_of_bytes<X>(data + j, width, out + j, [&](vu codes) { return widen(codes) * scale; });
    });
  }
};

// mxfp4's scales, E8M0: 2^(code - 127), which is subnormal for 0; 255 is NaN.
struct PowerScales {
  static vf size(vu codes) { return (vf)(codes << 23 | ((vu)(((codes + 1) & 255) < 2) & 0x400000)); }
  static void read(const Weight &, const uint8_t *codes, int64_t count, float *out) { span_of_bytes<float>(codes, count, out, size); }
};

// nvfp4's, E4M3 with the global scale: looked up.
struct MappedScales {
  static void read(const Weight &w, const uint8_t *codes, int64_t count, float *out) {
    for (int64_t i = 0; i < count; ++i) out[i] = ((const float *)w.table)[codes[i]];
  }
};

// mxfp4, nvfp4: W[n, k] = number[q[n, k]] size[scale[n, g]], g = k >> shift, groups of whole vectors; a row begins with a byte.
template <class Scales> struct E2M1Format {
  static constexpr float kNumbers[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.f, -0.5, -1, -1.5, -2, -3, -4, -6};
  // out[i] is the size of the group g + i of row n.
  static inline void sizes(const Weight &w, int64_t n, int64_t g, int64_t count, float *out) {
    Scales::read(w, (const uint8_t *)w.scale + n * w.scale_stride + g, count, out);
  }
  template <class X> static inline void row(const Weight &w, int64_t n, int64_t k, int64_t count, float *out) {
    constexpr int64_t kSome = 64;
    const uint8_t *data = (const uint8_t *)w.data + n * ((w.columns + 1) / 2);
    const Table numbers(kNumbers, [](vf value) { return value; });
    const int64_t last = (k + count - 1) >> w.group_shift;
    float size[kSome];
    int64_t first = 0, end = 0;  // of the groups whose sizes are there
    const auto decoded = [&](vu codes, int64_t group) __attribute__((always_inline)) {
      if (__builtin_expect(group >= end, 0)) {
        first = group, end = smaller(group + kSome, last + 1);
        sizes(w, n, first, end - first, size);
      }
      return round_decoded(numbers[codes] * size[group - first], X());
    };
    int64_t j = 0;
    for (; k % W == 0 && j + W <= count; j += W) store(decoded(nibbles<First::low>(data, k + j), (k + j) >> w.group_shift), out + j);
    blocks(k + j, count - j, w.group_shift, [&](int64_t i, int64_t width, int64_t group) {
      span_of_nibbles<First::low>(data, k + j + i, width, out + j + i, [&](vu codes) { return decoded(codes, group); });
    });
  }
};

template <class X, class Format>
static void decode_rows(const Weight &w, int64_t n, int64_t k, int64_t rows, int64_t columns, float *out, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i) Format::template row<X>(w, n + i, k, columns, out + i * ld);
}

template <class X> static void decode(const Weight &w, int64_t n, int64_t k, int64_t rows, int64_t columns, float *out, int64_t ld) {
  switch (w.format) {
    case WeightFormat::dense: return;
    case WeightFormat::code: return decode_rows<X, CodeFormat>(w, n, k, rows, columns, out, ld);
    case WeightFormat::int4: return decode_rows<X, Int4Format>(w, n, k, rows, columns, out, ld);
    case WeightFormat::int8: return decode_rows<X, Int8Format>(w, n, k, rows, columns, out, ld);
    case WeightFormat::fp8: return decode_rows<X, FP8Format>(w, n, k, rows, columns, out, ld);
    case WeightFormat::mxfp4: return decode_rows<X, E2M1Format<PowerScales>>(w, n, k, rows, columns, out, ld);
    case WeightFormat::nvfp4: return decode_rows<X, E2M1Format<MappedScales>>(w, n, k, rows, columns, out, ld);
  }
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
