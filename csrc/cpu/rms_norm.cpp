// rms_norm, add_rms_norm and their FP8 forms.
//
//   s = x + residual                      (rounded to dtype; s = x without residual)
//   n = s * rsqrt(mean(s^2) + eps)        (fp32, then rounded to dtype)
//   out = n * weight                      (rounded to dtype)
//   FP8: scale = max(min(amax|out|, scale_ub), tiny) / 448, q = e4m3(clamp(out / scale))
//
// A row is read from memory once: the passes after the sum of squares find it in L1 or L2. One row
// is always one thread's, summed in one order, so a row's result never depends on the others.
// Cost: 4 bytes an element of memory traffic in bf16 (8 with residual), about 4 flops.
#include "kernels.h"
#include "parallel.h"
#include "quantize_row.h"
#include "simd.h"

namespace lf::LF_ISA {
namespace {

// Loads four vectors ahead of their use: one chain of fma would wait 4 cycles for each vector.
template <class T>
float sum_of_squares(const T* x, int64_t n) {
  Vec acc[4] = {zeros(), zeros(), zeros(), zeros()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int u = 0; u < 4; ++u) {
      const Vec v = load(x + i + u * kLanes);
      acc[u] = fma(v, v, acc[u]);
    }
  for (; i < n; i += kLanes) {
    const Vec v = n - i >= kLanes ? load(x + i) : load_n(x + i, static_cast<int>(n - i));
    acc[0] = fma(v, v, acc[0]);
  }
  return reduce_add((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

template <class T>
void add_rows(T* out, const T* a, const T* b, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(a + i) + load(b + i));
  if (const int tail = static_cast<int>(n - i))
    store_n(out + i, load_n(a + i, tail) + load_n(b + i, tail), tail);
}

template <class T>
void normalise(T* out, const T* x, const T* weight, int64_t n, float rstd) {
  const Vec r = broadcast(rstd);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(out + i, round_to<T>(load(x + i) * r) * load(weight + i));
  if (const int tail = static_cast<int>(n - i))
    store_n(out + i, round_to<T>(load_n(x + i, tail) * r) * load_n(weight + i, tail), tail);
}

template <class T>
void run(const RmsNormParams& p, int threads) {
  const int64_t grain = 1 + 16384 / (p.hidden + 1);
  parallel_chunks(p.rows, grain, threads, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
      if (p.residual) {
        T* sum = static_cast<T*>(p.residual_out) + row * p.hidden;
        add_rows(sum, x, static_cast<const T*>(p.residual) + row * p.residual_stride, p.hidden);
        x = sum;
      }
      const float mean = sum_of_squares(x, p.hidden) / static_cast<float>(p.hidden);
      const float rstd = 1.0f / std::sqrt(mean + p.eps);
      const T* weight = static_cast<const T*>(p.weight);
      if (!p.scale) {
        normalise(static_cast<T*>(p.out) + row * p.hidden, x, weight, p.hidden, rstd);
        continue;
      }
      T* normed = scratch.get<T>(static_cast<size_t>(p.hidden));
      normalise(normed, x, weight, p.hidden, rstd);
      p.scale[row] =
          quantize_row(static_cast<e4m3*>(p.out) + row * p.hidden, normed, p.hidden, p.scale_ub);
    }
  });
}

}  // namespace

void rms_norm(const RmsNormParams& p, int threads) {
  with_dtype(p.dtype, [&](auto* t) { run<std::remove_pointer_t<decltype(t)>>(p, threads); });
}

}  // namespace lf::LF_ISA
