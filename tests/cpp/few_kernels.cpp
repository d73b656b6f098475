// The baseline kernels in the dtypes that small_cases runs: for tools under which all of them take long to compile or run.
#define PEFTKERN_ISA baseline
#include "../../csrc/cpu/bodies.h"

namespace peftkern {
namespace baseline {

template <class Call> static void forward(const Call &call) {
  if (call.dtype == DType::float32) Bodies<ThinF32<float>, float>::forward(call);
  else Bodies<ThinF32<bf16>, float>::forward(call);
}

template <class Call> static void backward(const Call &call) {
  if (call.dtype == DType::float32) Bodies<ThinF32<float>, float>::backward(call);
  else Bodies<ThinF32<bf16>, float>::backward(call);
}

static void pack(const PackedWeight &call) {
  if (call.dtype == DType::float32) pack_weight<float>(call);
  else pack_weight<bf16>(call);
}

static void keep_bits(const Dropout &dropout, int64_t M, int64_t K, uint64_t *bits) {
  for (int64_t row = 0; row < M; ++row) keep_bits_row(dropout, row, 0, K, bits + row * ((K + 63) / 64));
}

}  // namespace baseline

extern const Kernels kernels_baseline;
const Kernels kernels_baseline = {"baseline", baseline::kTileColumns, baseline::forward<Forward>, baseline::backward<Backward>,
                                  baseline::pack, baseline::keep_bits};

}  // namespace peftkern
