// One instruction set's kernels in the dtypes that small_cases runs alone: for the many compilers and tools under which all of
// them take long to compile.
#ifndef PEFTKERN_ISA
#define PEFTKERN_ISA baseline
#endif
#include "../../csrc/cpu/bodies.h"

namespace peftkern {
namespace PEFTKERN_ISA {

#if defined(__AVX2__)
typedef ThinF32<bf16> ThinOfBF16;
#else
typedef ThinPaired ThinOfBF16;
#endif

static void forward(const Forwards &calls) {
  if (calls.calls[0].dtype == DType::float32) Bodies<ThinF32<float>, float>::forward(calls);
  else Bodies<ThinOfBF16, float>::forward(calls);
}

static void backward(const Backward &call) {
  if (call.dtype == DType::float32) Bodies<ThinF32<float>, float>::backward(call);
  else Bodies<ThinOfBF16, float>::backward(call);
}

static void keep_bits(const Dropout &dropout, int64_t M, int64_t K, uint64_t *bits) {
  for (int64_t row = 0; row < M; ++row) keep_bits_row(dropout, row, 0, K, bits + row * ((K + 63) / 64));
}

}  // namespace PEFTKERN_ISA

#define CONCATENATE(a, b) a##b
#define TABLE(isa) CONCATENATE(kernels_, isa)
#define TEXT(isa) #isa
#define NAME(isa) TEXT(isa)
extern const Kernels TABLE(PEFTKERN_ISA);
const Kernels TABLE(PEFTKERN_ISA) = {NAME(PEFTKERN_ISA), PEFTKERN_ISA::forward, PEFTKERN_ISA::backward, nullptr, nullptr, nullptr,
                                     PEFTKERN_ISA::keep_bits};

}  // namespace peftkern
