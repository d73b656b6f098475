// The table of one instruction set. isa_*.cpp define PEFTKERN_ISA, are compiled with their own flags (setup.py) and include
// this file; everything they compile lies in a namespace of that name.
#pragma once
#include "bank.h"
#include "keep.h"

namespace peftkern {
extern const Kernels kernels_avx2;
namespace PEFTKERN_ISA {

template <class Thin, class A> static void body(const Forwards &call) { Bodies<Thin, A>::forward(call); }
template <class Thin, class A> static void body(const Backward &call) { Bodies<Thin, A>::backward(call); }

template <class Thin, class Call> static void run(const Problem &problem, const Call &call) {
  if (problem.adapter_dtype == DType::float32) body<Thin, float>(call);
  else body<Thin, typename Thin::Storage>(call);
}

template <class Call> static void run_any(const Problem &problem, const Call &call) {
  if (problem.dtype == DType::float32) return run<ThinF32<float>>(problem, call);
  if (problem.dtype == DType::float16) return run<ThinF32<fp16>>(problem, call);
#if defined(__AVX512BF16__)
  if (problem.round_factors) return run<ThinBF16>(problem, call);
#elif !defined(__AVX2__)
  if (problem.round_factors) return run<ThinPaired>(problem, call);
#endif
  return run<ThinF32<bf16>>(problem, call);
}

// A handful of rows of a quantised weight is its decoder's time, and the fast one is AVX2's (quantised_steps.h): half of the time.
static void forward(const Forwards &call) {
#if defined(__AVX512F__)
  const Forward &first = call.calls[0];
  if (first.one_pass && first.M <= kFewRows && first.weight.format != WeightFormat::dense) return kernels_avx2.forward(call);
#endif
  run_any(call.calls[0], call);
}
static void backward(const Backward &call) { run_any(call, call); }

static void keep_bits(const Dropout &dropout, int64_t M, int64_t K, uint64_t *bits) {
  for (int64_t row = 0; row < M; ++row) keep_bits_row(dropout, row, 0, K, bits + row * ((K + 63) / 64));
}

}  // namespace PEFTKERN_ISA

#define PEFTKERN_CONCATENATE(a, b) a##b
#define PEFTKERN_TABLE(isa) PEFTKERN_CONCATENATE(kernels_, isa)
#define PEFTKERN_TEXT(isa) #isa
#define PEFTKERN_NAME(isa) PEFTKERN_TEXT(isa)
extern const Kernels PEFTKERN_TABLE(PEFTKERN_ISA);
const Kernels PEFTKERN_TABLE(PEFTKERN_ISA) = {PEFTKERN_NAME(PEFTKERN_ISA), PEFTKERN_ISA::forward,
                                              PEFTKERN_ISA::backward, PEFTKERN_ISA::bank_forward,
                                              PEFTKERN_ISA::bank_backward, PEFTKERN_ISA::keep,
                                              PEFTKERN_ISA::keep_bits};

}  // namespace peftkern
