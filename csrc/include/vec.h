// One fp32 vector of the instruction set this file is compiled for, and its conversions from and to storage types.
// Included by isa_*.cpp only, inside their own namespace: nothing here may be shared between instruction sets.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "call.h"

namespace peftkern {
namespace PEFTKERN_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

static inline vf splat(float value) { return vf{} + value; }

static inline float widen(float value) { return value; }
static inline float widen(bf16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

// fp16, in integer arithmetic: right for zeros, subnormals, infinities and NaN; used where no instruction does it.
static inline float widen(fp16 value) {
  uint32_t sign = uint32_t(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7fff, bits;
  if (magnitude >= 0x7c00) {
    bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
  } else if (magnitude >= 0x400) {
    bits = sign | ((magnitude << 13) + (112u << 23));
  } else {
    float subnormal = float(magnitude) * 0x1p-24f;
    memcpy(&bits, &subnormal, 4);
    bits |= sign;
  }
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

static inline void narrow(float value, float *target) { *target = value; }
static inline void narrow(float value, bf16 *target) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  target->bits = value != value ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline void narrow(float value, fp16 *target) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) {
    target->bits = sign | 0x7e00;
  } else if (bits >= 0x477ff000) {  // 65520 and more rounds to infinity
    target->bits = sign | 0x7c00;
  } else if (bits < 0x38800000) {   // subnormal: let the adder round to the right position
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, 4);
    target->bits = sign | uint16_t(bits - 0x3f000000);
  } else {
    target->bits = sign | uint16_t((bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13);
  }
}

static inline vf load(const float *source) {
  vf value;
  memcpy(&value, source, sizeof value);
  return value;
}
static inline vf load(const bf16 *source) {
  vh half;
  memcpy(&half, source, sizeof half);
  return (vf)(__builtin_convertvector(half, vu) << 16);
}
static inline vf load(const fp16 *source) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)source));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)source));
#else
  vf value;
  for (int lane = 0; lane < W; ++lane) value[lane] = widen(source[lane]);
  return value;
#endif
}

static inline void store(vf value, float *target) { memcpy(target, &value, sizeof value); }
static inline void store(vf value, bf16 *target) {
  vu bits = (vu)value, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  vu is_nan = (vu)(value != value);
  vh half = __builtin_convertvector((is_nan & (bits >> 16 | 0x40)) | (~is_nan & rounded), vh);
  memcpy(target, &half, sizeof half);
}
static inline void store(vf value, fp16 *target) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i *)target, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i *)target, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < W; ++lane) narrow(value[lane], target + lane);
#endif
}

// Rounded to X and widened again.
template <class X> static inline vf rounded(vf value) {
  X lanes[W];
  store(value, lanes);
  return load(lanes);
}
template <> inline vf rounded<float>(vf value) { return value; }
template <> inline vf rounded<bf16>(vf value) {
  const vu bits = (vu)value, is_nan = (vu)(value != value);
  return (vf)((is_nan & bits) | (~is_nan & ((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u)));
}

// The last count < W elements of a row, without touching memory beyond them. Loops over all lanes: compilers see the bound.
template <class T> static inline vf load_tail(const T *source, int64_t count) {
  T lanes[W];
  memset(lanes, 0, sizeof lanes);
  for (int lane = 0; lane < W; ++lane) if (lane < count) lanes[lane] = source[lane];
  return load(lanes);
}
template <class T> static inline void store_tail(vf value, T *target, int64_t count) {
  T lanes[W];
  store(value, lanes);
  for (int lane = 0; lane < W; ++lane) if (lane < count) target[lane] = lanes[lane];
}

// value where the lane's bit is set, else zero (a NaN that is dropped becomes 0).
static inline vf select(uint32_t bits, vf value) {
  vu bit;
  for (int i = 0; i < W; ++i) bit[i] = 1u << i;
  const vu keep = (vu)(((vu{} + bits) & bit) == bit);
  return (vf)((vu)value & keep);
}

static inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
