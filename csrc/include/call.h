// The operands of one call, as raw pointers. No framework header is included anywhere below csrc/.
//
//   forward    s = D(x) A^T            y += c s B^T + c lora_bias
//   backward   t = dy B                dx += c D(t A)
//              dA = c t^T D(x)         dB = c dy^T s
//
// In one pass, the product with the frozen weight is computed in the same call; otherwise y and dx hold it when the call begins.
#pragma once
#include <cstdint>

namespace peftkern {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// Storage tags of the 16-bit types; arithmetic is in fp32 (or in bf16 pairs with an fp32 accumulator).
struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

struct Dropout {
  uint32_t threshold;  // of 65536 lane values; 0 means no dropout
  float scale;         // 65536 / (65536 - threshold)
  uint64_t seed, offset;
};

// How `data` of a Weight is to be read: as it is, as indices of 16 values (nf4, fp4), or as numbers with a scale.
enum class WeightFormat : int { dense = 0, code = 1, int4 = 2, int8 = 3, fp8 = 4, mxfp4 = 5, nvfp4 = 6 };

// W [N, K]. A dense one is in `dtype`; its rows lie `stride` apart, or, where `transposed`, its columns do, and rows are what
// has a unit stride. Of the other formats (peftkern/weights has their formulas) everything is contiguous.
struct Weight {
  const void *data;
  int64_t stride;
  bool transposed;
  WeightFormat format = WeightFormat::dense;
  int64_t columns = 0;         // K
  int group_shift = 0;         // log2 of how many neighbours share a scale
  int row_shift = 0;           // log2 of how many rows do (fp8)
  int64_t scale_stride = 0;    // from a row's scales to the next's
  const void *scale = nullptr; // fp32; or, nested, mxfp4 and nvfp4, a byte each
  const void *table = nullptr; // code: fp32 [16]; int4: zero points; nvfp4: fp32 [256], of the scales
  const float *nested_absmax = nullptr, *nested_code = nullptr, *nested_offset = nullptr;
};

struct Problem {
  int64_t M, K, N, R;
  DType dtype;          // of x, y, dy, dx
  DType adapter_dtype;  // of A, B, dA, dB, lora_bias: dtype or float32
  bool round_factors;   // precision "base": A and B are rounded to dtype before they are multiplied
  float scaling;        // c
  Dropout dropout;
  int threads;
  bool one_pass;
  Weight weight;  // read in one pass alone, and then for y and dx alone
};

struct Forward : Problem {
  const void *x; int64_t x_stride;  // [M, K], unit stride along K
  const void *A, *B;                // [R, K] and [N, R], contiguous
  const void *lora_bias;            // [N] or null
  const void *bias;                 // [N] in dtype or null; read in one pass alone
  float *s;                         // [M, R], contiguous, written
  void *y;                          // [M, N], contiguous, accumulated into, or written in one pass
};

// Calls that read the same x: M, K, dtypes, threads, one_pass and x are equal.
struct Forwards {
  const Forward *calls;
  int64_t count;
};

struct Backward : Problem {
  const void *dy; int64_t dy_stride;  // [M, N], unit stride along N
  const void *x; int64_t x_stride;    // [M, K] or null where dA is not needed
  const float *s;                     // [M, R] or null where dB is not needed
  const void *A, *B;
  void *dx;                           // [M, K] accumulated into (written in one pass, unless `onto`), or null
  bool onto;                          // in one pass: dx is accumulated into there too
  void *dA, *dB;                      // [R, K], [N, R] written, or null
};

// One adapter's part of a batch that belongs to several: its operands, and its rows in the bank's index.
struct Segment {
  const void *A, *B;         // [R, K] and [N, R], contiguous
  int64_t R;
  DType adapter_dtype;
  float scaling;
  Dropout dropout;           // row numbers count from the segment's first row
  int64_t start, count;      // in Bank::rows
  int64_t s_begin;           // where its s, [count, R], begins in the call's
  void *dA, *dB;             // written by backward, or null together
};

struct Bank {
  const int64_t *rows;
  const Segment *segments;
  int64_t size;
};

// x [M, K] where an element survives, else 0; without dropout's scale.
struct Keep {
  Dropout dropout;
  int64_t M, K;
  DType dtype;
  const void *x; int64_t x_stride;  // unit stride along K
  void *kept;                       // [M, K], contiguous, written
  int threads;
};

// One instruction set's implementation.
struct Kernels {
  const char *name;
  void (*forward)(const Forwards &);
  void (*backward)(const Backward &);
  // The base with R = 0, and the segments of a bank on top. Unless in one pass, y and dx hold the base's when they begin.
  void (*bank_forward)(const Forward &, const Bank &);
  void (*bank_backward)(const Backward &, const Bank &);
  void (*keep)(const Keep &);
  // Bit (row, col) of the keep mask, for the tests: bits is [M, ceil(K / 64)].
  void (*keep_bits)(const Dropout &, int64_t M, int64_t K, uint64_t *bits);
};

}  // namespace peftkern
