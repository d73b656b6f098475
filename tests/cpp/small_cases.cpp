// The kernels without Python: small odd problems against sums in double, for sanitizers, valgrind, emulators and callgrind.
//
//   small_cases                      run every case on the baseline kernels; exit 1 where one is wrong
//   small_cases quick                half of them
//   small_cases M K N R dtype p   run forward and backward of one problem once, for counting instructions
//
// A case that multiplies by the weight itself meets it by rows and by columns. Built with the sources of the extension but
// module.cpp; -DSET=avx2 takes another instruction set's table.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../../csrc/include/call.h"

#ifndef SET
#define SET baseline
#endif
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

namespace peftkern { extern const Kernels JOIN(kernels_, SET); }
using namespace peftkern;

namespace {

const Kernels &kernels = JOIN(kernels_, SET);
uint32_t state = 1;
uint64_t masks = 0xcbf29ce484222325u;  // FNV-1a of every mask: the same for all instruction sets and machines

float uniform() {  // multiples of 1/64 in [-1, 1): exact in every dtype
  state = state * 1664525u + 1013904223u;
  return float(int(state >> 25) - 64) / 64.f;
}

uint16_t to_bf16(float value) {
  union { float number; uint32_t bits; } u = {value};
  return uint16_t((u.bits + 0x7fff + (u.bits >> 16 & 1)) >> 16);
}
float from_bf16(uint16_t value) {
  union { uint32_t bits; float number; } u = {uint32_t(value) << 16};
  return u.number;
}

// Exactly as many bytes as the elements take, so that a sanitizer sees one element too far.
struct Array {
  bool narrow;
  int64_t count;
  std::unique_ptr<char[]> memory;
  Array(int64_t count, bool narrow) : narrow(narrow), count(count), memory(new char[count * (narrow ? 2 : 4)]) {}
  void set(int64_t i, float value) {
    if (narrow) reinterpret_cast<uint16_t *>(memory.get())[i] = to_bf16(value);
    else reinterpret_cast<float *>(memory.get())[i] = value;
  }
  float get(int64_t i) const { return narrow ? from_bf16(reinterpret_cast<uint16_t *>(memory.get())[i]) : reinterpret_cast<float *>(memory.get())[i]; }
  Array &fill() { for (int64_t i = 0; i < count; ++i) set(i, uniform()); return *this; }
  void *data() const { return memory.get(); }
};

enum class Layout { none, rows, columns };  // of the weight; none: its product is given
struct Case {
  int64_t M, K, N, R; bool narrow; float p; Layout layout; int threads;
  bool one_pass() const { return layout != Layout::none; }
  bool transposed() const { return layout == Layout::columns; }
};

bool differs(const char *name, const Case &c, const Array &found, const std::vector<double> &wanted) {
  double error = 0, norm = 0;
  for (int64_t i = 0; i < found.count; ++i) {
    error += std::pow(found.get(i) - wanted[i], 2);
    norm += wanted[i] * wanted[i];
  }
  // One rounding to bf16, or fp32 sums; of the elements' size, or of that of their terms (about 1), which may cancel.
  const double bound = (found.narrow || c.narrow ? 0x1p-8 : 1e-6) * std::sqrt(norm + found.count);
  if (std::sqrt(error) <= bound) return false;
  std::printf("%s of M=%ld K=%ld N=%ld R=%ld narrow=%d p=%g layout=%d is wrong: %g > %g\n", name, long(c.M), long(c.K),
              long(c.N), long(c.R), c.narrow, c.p, int(c.layout), std::sqrt(error), bound);
  return true;
}

// Whether a result is wrong; `judged` is false where only the run counts.
bool run(const Case &c, bool judged) {
  const int64_t M = c.M, K = c.K, N = c.N, R = c.R;
  Array x(M * K, c.narrow), W(N * K, c.narrow), dy(M * N, c.narrow), A(R * K, false), B(N * R, false);
  Array y(M * N, c.narrow), dx(M * K, c.narrow), s(M * R, false), dA(R * K, false), dB(N * R, false);
  x.fill(), W.fill(), dy.fill(), A.fill(), B.fill();
  const auto weight = [&](int64_t n, int64_t k) { return W.get(c.transposed() ? k * N + n : n * K + k); };
  const uint32_t threshold = uint32_t(65536 * c.p);
  const double scaling = 0.5, scale = threshold ? 65536.0 / (65536 - threshold) : 1.0;
  const Dropout dropout = {threshold, float(scale), 0x9e3779b97f4a7c15u, 0xfedcba9876543210u};
  const int64_t words = (K + 63) / 64;
  std::vector<uint64_t> bits(M * words);
  kernels.keep_bits(dropout, M, K, bits.data());
  for (uint64_t word : bits) masks = (masks ^ word) * 0x100000001b3u;
  const auto kept = [&](int64_t m, int64_t k) { return threshold && !(bits[m * words + k / 64] >> (k % 64) & 1) ? 0.0 : scale; };
  std::vector<double> y_base(M * N), dx_base(M * K);
  for (int64_t m = 0; judged && m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) for (int64_t k = 0; k < K; ++k) y_base[m * N + n] += double(x.get(m * K + k)) * weight(n, k);
    for (int64_t k = 0; k < K; ++k) for (int64_t n = 0; n < N; ++n) dx_base[m * K + k] += double(dy.get(m * N + n)) * weight(n, k);
  }
  for (int64_t i = 0; i < M * N; ++i) y.set(i, c.one_pass() ? NAN : float(y_base[i]));
  const bool onto = c.one_pass() && c.threads == 2;  // dx is added to what another layer has left there
  for (int64_t i = 0; i < M * K; ++i) dx.set(i, onto ? 0.5f : c.one_pass() ? NAN : float(dx_base[i]));
  for (int64_t i = 0; onto && i < M * K; ++i) dx_base[i] += 0.5;

  Problem problem = {M, K, N, R, c.narrow ? DType::bfloat16 : DType::float32, DType::float32, true, float(scaling), dropout,
                     c.threads, c.one_pass(), {W.data(), c.transposed() ? N : K, c.transposed()}};
  Forward forward;
  static_cast<Problem &>(forward) = problem;
  forward.x = x.data(), forward.x_stride = K, forward.A = A.data(), forward.B = B.data();
  forward.lora_bias = forward.bias = nullptr, forward.s = static_cast<float *>(s.data()), forward.y = y.data();
  kernels.forward({&forward, 1});
  Backward backward;
  static_cast<Problem &>(backward) = problem;
  backward.dy = dy.data(), backward.dy_stride = N, backward.x = x.data(), backward.x_stride = K;
  backward.s = static_cast<const float *>(s.data()), backward.A = A.data(), backward.B = B.data();
  backward.dx = dx.data(), backward.onto = onto, backward.dA = dA.data(), backward.dB = dB.data();
  kernels.backward(backward);
  if (!judged) return false;

  std::vector<double> s_true(M * R), t_true(M * R), dA_true(R * K), dB_true(N * R);
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t r = 0; r < R; ++r) {
      double &sum = s_true[m * R + r], &back = t_true[m * R + r];
      for (int64_t k = 0; k < K; ++k) sum += kept(m, k) * x.get(m * K + k) * A.get(r * K + k);
      for (int64_t n = 0; n < N; ++n) back += double(dy.get(m * N + n)) * B.get(n * R + r);
      for (int64_t n = 0; n < N; ++n) y_base[m * N + n] += scaling * sum * B.get(n * R + r);
      for (int64_t n = 0; n < N; ++n) dB_true[n * R + r] += scaling * dy.get(m * N + n) * sum;
      for (int64_t k = 0; k < K; ++k) dx_base[m * K + k] += scaling * kept(m, k) * back * A.get(r * K + k);
      for (int64_t k = 0; k < K; ++k) dA_true[r * K + k] += scaling * back * kept(m, k) * x.get(m * K + k);
    }
  }
  int wrong = 0;  // all are looked at
  wrong += differs("s", c, s, s_true), wrong += differs("y", c, y, y_base), wrong += differs("dx", c, dx, dx_base);
  wrong += differs("dA", c, dA, dA_true), wrong += differs("dB", c, dB, dB_true);
  return wrong > 0;
}

}  // namespace

int main(int count, char **arguments) {
  if (count == 7) {
    const auto number = [&](int i) { return std::atol(arguments[i]); };
    const bool narrow = arguments[5][0] == 'b';
    return run({number(1), number(2), number(3), number(4), narrow, float(std::atof(arguments[6])), Layout::rows, 1}, false);
  }
  const bool quick = count == 2;
  const int64_t shapes[][4] = {{1, 1, 1, 1}, {1, 70, 37, 4}, {2, 35, 19, 3}, {4, 65, 33, 17}, {7, 33, 65, 2}, {16, 530, 14, 3},
                               {17, 300, 20, 5}, {23, 19, 261, 9}, {70, 40, 36, 16}};
  bool wrong = false;
  int number = 0;
  for (const auto &shape : shapes)
    for (Layout layout : {Layout::none, Layout::rows, Layout::columns})
      for (bool narrow : {false, true})
        for (float p : {0.f, 0.25f}) {
          const int index = number++, threads = 1 + (index + index / 4) % 2;  // another one for the next shape
          if (quick && (index + index / 2 + index / 20) % 2) continue;  // each dtype with one p, the next shape the other
          wrong |= run({shape[0], shape[1], shape[2], shape[3], narrow, p, layout, threads}, true);
        }
  if (!wrong) std::printf("every case is right (%s), masks %016llx\n", kernels.name, (unsigned long long)masks);
  return wrong;
}
