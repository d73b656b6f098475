// The Python module peftkern._C: raw pointers in, nothing of torch inside.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/parallel.h"
#include "facts.h"
#include "include/call.h"

namespace py = pybind11;

namespace peftkern {

extern const char build_stamp[];
extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512bf16;

// Features that not every compiler knows by name.
static bool has_f16c() {  // leaf 1, ECX bit 29
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}
static bool has_avx512bf16() {  // leaf 7, subleaf 1, EAX bit 5
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
}
#endif

// The instruction sets that this processor runs, best first.
static std::vector<const Kernels *> runnable() {
  std::vector<const Kernels *> result;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && has_avx512bf16()) result.push_back(&kernels_avx512bf16);
  if (avx512) result.push_back(&kernels_avx512);
  if (avx2) result.push_back(&kernels_avx2);
#endif
  result.push_back(&kernels_baseline);
  return result;
}

static std::vector<const Kernels *> sets = runnable();
static const Kernels *chosen = sets.front();

static void use(const std::string &name) {
  for (const Kernels *kernels : sets) {
    if (name == kernels->name) {
      chosen = kernels;
      return;
    }
  }
  throw std::invalid_argument("this processor does not run the kernels for " + name);
}

// Forget the sets above `name`, whether this processor has it or not.
static void limit(const std::string &name) {
  static const std::vector<std::string> worst_first = {"baseline", "avx2", "avx512", "avx512bf16"};
  const auto rank = [](const std::string &set) {
    return std::find(worst_first.begin(), worst_first.end(), set) - worst_first.begin();
  };
  const auto above = [&](const Kernels *kernels) { return rank(kernels->name) > rank(name); };
  sets.erase(std::remove_if(sets.begin(), sets.end(), above), sets.end());
  chosen = sets.front();
}

// The maker and the family of the processor (of Intel's, whose family is always 6, the model too): "amd-25" is Zen 3 and 4.
static std::string processor() {
#if defined(__x86_64__)
  unsigned eax, ebx, ecx, edx;
  char vendor[13] = {};
  if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx)) return "x86";
  memcpy(vendor, &ebx, 4), memcpy(vendor + 4, &edx, 4), memcpy(vendor + 8, &ecx, 4);
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return "x86";
  const unsigned family = (eax >> 8 & 15) == 15 ? 15 + (eax >> 20 & 255) : eax >> 8 & 15, model = (eax >> 4 & 15) + (eax >> 12 & 240);
  const std::string maker = vendor;
  if (maker == "AuthenticAMD") return "amd-" + std::to_string(family);
  if (maker == "GenuineIntel") return "intel-" + std::to_string(family) + "-" + std::to_string(model);
  return "x86";
#else
  return "other";
#endif
}

template <class T> static T *pointer(uintptr_t address) { return reinterpret_cast<T *>(address); }

static Dropout dropout(uint32_t threshold, uintptr_t rng_state) {
  Dropout result{threshold, threshold >= 65536 ? 0.f : 65536.f / float(65536 - threshold), 0, 0};
  if (threshold) {
    result.seed = pointer<const uint64_t>(rng_state)[0];
    result.offset = pointer<const uint64_t>(rng_state)[1];
  }
  return result;
}

// (A, B, R, adapter dtype, scaling, threshold, seed, offset, start, count, dA, dB) of each segment.
static std::vector<Segment> segments_of(const py::list &entries) {
  std::vector<Segment> result;
  int64_t s_begin = 0;
  for (const py::handle &entry : entries) {
    const py::tuple t = py::reinterpret_borrow<py::tuple>(entry);
    const auto address = [&](int i) { return pointer<void>(t[i].cast<uintptr_t>()); };
    const auto number = [&](int i) { return t[i].cast<int64_t>(); };
    const uint64_t rng_state[2] = {uint64_t(number(6)), uint64_t(number(7))};
    result.push_back({address(0), address(1), number(2), DType(number(3)), t[4].cast<float>(),
                      dropout(uint32_t(number(5)), reinterpret_cast<uintptr_t>(rng_state)), number(8), number(9), s_begin,
                      address(10), address(11)});
    s_begin += number(2) * number(9);
  }
  return result;
}

// What a call's scaling and dropout are filled in to.
static Problem problem(int64_t M, int64_t K, int64_t N, int64_t R, int dtype, int adapter_dtype, bool round_factors, int threads,
                       bool one_pass) {
  return {M, K, N, R, DType(dtype), DType(adapter_dtype), round_factors, 0.f, {0, 1.f, 0, 0}, threads, one_pass, {}};
}

static Problem read_dense(Problem problem, uintptr_t weight, int64_t stride, bool transposed) {
  problem.weight = {pointer<const void>(weight), stride, transposed};
  return problem;
}

static Problem read_quantised(Problem problem, int format, uintptr_t data, uintptr_t scale, int64_t scale_stride, int group_shift,
                   int row_shift, const std::vector<uintptr_t> &tables) {
  const auto table = [&](size_t i) { return i < tables.size() ? tables[i] : 0; };
  problem.weight = {pointer<const void>(data), 0, false, WeightFormat(format), problem.K, group_shift, row_shift,
                    scale_stride, pointer<const void>(scale), pointer<const void>(table(0)), pointer<const float>(table(1)),
                    pointer<const float>(table(2)), pointer<const float>(table(3))};
  return problem;
}

static Forward forward_of(const Problem &shape, float scaling, uint32_t threshold, uintptr_t rng_state, uintptr_t x, int64_t x_stride,
                          uintptr_t A, uintptr_t B, uintptr_t lora_bias, uintptr_t bias, uintptr_t s, uintptr_t y) {
  Forward call;
  static_cast<Problem &>(call) = shape;
  call.scaling = scaling, call.dropout = dropout(threshold, rng_state);
  call.x = pointer<const void>(x), call.x_stride = x_stride;
  call.A = pointer<const void>(A), call.B = pointer<const void>(B), call.lora_bias = pointer<const void>(lora_bias);
  call.bias = pointer<const void>(bias);
  call.s = pointer<float>(s), call.y = pointer<void>(y);
  return call;
}

}  // namespace peftkern

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  using namespace peftkern;
  m.doc() = "CPU kernels of peftkern. Addresses are not checked here: call them through peftkern.backends.cpp.";

  py::class_<Problem>(m, "Problem")
      .def(py::init(&problem), py::arg("M"), py::arg("K"), py::arg("N"), py::arg("R"), py::arg("dtype"),
           py::arg("adapter_dtype"), py::arg("round_factors"), py::arg("threads"), py::arg("one_pass"))
      .def("read_dense", &read_dense, py::arg("weight"), py::arg("stride"), py::arg("transposed"),
           "This problem with the weight of one pass: its address, the distance of its rows (of its columns where transposed).")
      .def("read_quantised", &read_quantised, py::arg("format"), py::arg("data"), py::arg("scale"), py::arg("scale_stride"), py::arg("group_shift"),
           py::arg("row_shift"), py::arg("tables"), "The same with a weight in a quantised format; addresses of its tables in their order.");

  py::class_<Forward>(m, "Forward").def(py::init(&forward_of));

  m.def("forward", [](const Problem &shape, float scaling, uint32_t threshold, uintptr_t rng_state, uintptr_t x, int64_t x_stride,
                      uintptr_t A, uintptr_t B, uintptr_t lora_bias, uintptr_t bias, uintptr_t s, uintptr_t y) {
    py::gil_scoped_release release;
    const Forward call = forward_of(shape, scaling, threshold, rng_state, x, x_stride, A, B, lora_bias, bias, s, y);
    chosen->forward({&call, 1});
  }, "s = D(x) A^T and y = x W^T + bias + c s B^T + c lora_bias; unless in one pass, y holds x W^T + bias beforehand.");

  m.def("forward_shared", [](const std::vector<Forward> &calls) {
    py::gil_scoped_release release;
    chosen->forward({calls.data(), int64_t(calls.size())});
  }, "forward of calls on one x; unless in one pass, their thin products take one pass over it together.");

  m.def("backward", [](const Problem &shape, float scaling, uint32_t threshold, uintptr_t rng_state, uintptr_t dy, int64_t dy_stride,
                       uintptr_t x, int64_t x_stride, uintptr_t s, uintptr_t A, uintptr_t B, uintptr_t dx, bool onto, uintptr_t dA,
                       uintptr_t dB) {
    py::gil_scoped_release release;
    Backward call;
    static_cast<Problem &>(call) = shape;
    call.scaling = scaling, call.dropout = dropout(threshold, rng_state);
    call.dy = pointer<const void>(dy), call.dy_stride = dy_stride;
    call.x = pointer<const void>(x), call.x_stride = x_stride, call.s = pointer<const float>(s);
    call.A = pointer<const void>(A), call.B = pointer<const void>(B);
    call.dx = pointer<void>(dx), call.onto = onto, call.dA = pointer<void>(dA), call.dB = pointer<void>(dB);
    chosen->backward(call);
  }, "dx = dy W + c D(t A) (unless in one pass, dx holds dy W beforehand; `onto`: it is added to), dA = c t^T D(x), dB = c dy^T s with t = dy B; zero addresses are left out.");

  m.def("bank_forward", [](const Problem &p, const py::list &entries, uintptr_t rows, uintptr_t x, int64_t x_stride, uintptr_t bias,
                           uintptr_t s, uintptr_t y) {
    const std::vector<Segment> segments = segments_of(entries);
    py::gil_scoped_release release;
    Forward call{};
    static_cast<Problem &>(call) = p;
    call.x = pointer<const void>(x), call.x_stride = x_stride, call.bias = pointer<const void>(bias);
    call.s = pointer<float>(s), call.y = pointer<void>(y);
    chosen->bank_forward(call, {pointer<const int64_t>(rows), segments.data(), int64_t(segments.size())});
  }, "y of a batch of several adapters, and s of each segment, one behind the other; p.R is 0.");

  m.def("bank_backward", [](const Problem &p, const py::list &entries, uintptr_t rows, uintptr_t dy, int64_t dy_stride, uintptr_t x,
                            int64_t x_stride, uintptr_t s, uintptr_t dx) {
    const std::vector<Segment> segments = segments_of(entries);
    py::gil_scoped_release release;
    Backward call{};
    static_cast<Problem &>(call) = p;
    call.dy = pointer<const void>(dy), call.dy_stride = dy_stride;
    call.x = pointer<const void>(x), call.x_stride = x_stride, call.s = pointer<const float>(s);
    call.dx = pointer<void>(dx);
    chosen->bank_backward(call, {pointer<const int64_t>(rows), segments.data(), int64_t(segments.size())});
  }, "dx of such a batch, and dA and dB of the segments that have addresses for them; a zero dx is left out.");

  m.def("keep", [](uint32_t threshold, uintptr_t rng_state, int64_t M, int64_t K, int dtype, uintptr_t x, int64_t x_stride,
                   uintptr_t kept, int threads) {
    py::gil_scoped_release release;
    chosen->keep({dropout(threshold, rng_state), M, K, DType(dtype), pointer<const void>(x), x_stride, pointer<void>(kept), threads});
  }, "x [M, K] where an element survives, else 0, unscaled, as a contiguous matrix.");

  m.def("holds", [](const py::tuple &facts) { return Facts(facts).hold(); }, py::arg("facts"),
        "Whether a state of Python's objects is still what it was: see Facts of peftkern.integrations.peft.memo.");

  m.def("keep_bits", [](uint32_t threshold, uintptr_t rng_state, int64_t M, int64_t K, uintptr_t bits) {
    chosen->keep_bits(dropout(threshold, rng_state), M, K, pointer<uint64_t>(bits));
  }, "The keep mask of [M, K] as one bit an element, ceil(K / 64) words a row.");

  m.attr("build_stamp") = py::str(build_stamp);  // which also keeps it in the file
  m.def("instruction_sets", [] {
    py::list names;
    for (const Kernels *kernels : sets) names.append(kernels->name);
    return names;
  }, "The instruction sets that this processor runs, best first, up to the limit.");
  m.def("limit", &limit, "Use no instruction set above this one.");
  m.def("use", &use, "Choose the kernels of one instruction set; for tests.");
  m.def("processor", &processor, "The maker and the family of the processor, for a table of what was measured.");
  m.def("instruction_set", [] { return std::string(chosen->name); });
  m.def("use_openmp", &parallel_use_openmp, "Whether to run on torch's OpenMP pool; False is for tests.");
  m.def("parallel_runtime", &parallel_runtime);
}
