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

// W [N, K] in `dtype`. Rows lie `stride` apart; where `transposed`, columns do, and rows are what has a unit stride.
struct Weight {
  const void *data;
  int64_t stride;
  bool transposed;
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

// One instruction set's implementation.
struct Kernels {
  const char *name;
  void (*forward)(const Forwards &);
  void (*backward)(const Backward &);
  // Bit (row, col) of the keep mask, for the tests: bits is [M, ceil(K / 64)].
  void (*keep_bits)(const Dropout &, int64_t M, int64_t K, uint64_t *bits);
};

}  // namespace peftkern
