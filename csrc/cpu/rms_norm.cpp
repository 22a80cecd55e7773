// rms_norm, add_rms_norm and their FP8 forms.
//
//   s = x + residual                      (rounded to dtype; s = x without residual)
//   n = s * rsqrt(mean(s^2) + eps)        (fp32, then rounded to dtype)
//   out = n * weight                      (rounded to dtype)
//   FP8: scale = max(min(amax|out|, scale_ub), tiny) / 448, q = e4m3(clamp(out / scale))
//
// A row is read from memory once: the passes after the sum of squares find it in L1 or L2. One
// thread sums a whole row in a fixed order, so a row's result never depends on the others. Cost: 4
// bytes of memory traffic per element in bf16 (8 with residual), about 4 FLOPs.
#include "kernels.h"
#include "parallel.h"
#include "quantize_row.h"
#include "simd.h"

namespace lf::LF_ISA {
namespace {

constexpr int kStep = 2 * kLanes;

// Step i of a row: x, or x + residual, rounded and kept in `sum`.
template <class T>
struct Plain {
  const T* x;
  Pair two(int64_t i) const { return load2(x + i); }
  Vec some(int64_t i, int n) const { return load_n(x + i, n); }
};
template <class T>
struct Sum {
  T* sum;
  const T *x, *residual;
  Pair two(int64_t i) const { return store2_rounded(sum + i, load2(x + i) + load2(residual + i)); }
  Vec some(int64_t i, int n) const {
    const Vec s = round_to<T>(load_n(x + i, n) + load_n(residual + i, n));
    store_n(sum + i, s, n);
    return s;
  }
};

// Two pairs of accumulators: one chain of FMAs would wait 4 cycles per vector.
template <class Row>
float sum_of_squares(const Row& row, int64_t n) {
  Pair sum[2] = {};
  int64_t i = 0;
  for (; i + 2 * kStep <= n; i += 2 * kStep)
    for (int u = 0; u < 2; ++u) {
      const Pair v = row.two(i + u * kStep);
      sum[u] = fma(v, v, sum[u]);
    }
  for (; i < n; i += kLanes) {
    const Vec v = row.some(i, lanes_left(n - i));
    sum[0].a = fma(v, v, sum[0].a);
  }
  return reduce_add((sum[0].a + sum[0].b) + (sum[1].a + sum[1].b));
}

// next: the row of x that this thread sums next, prefetched here, because the hardware prefetchers
// stop at the end of a page, where rows end.
template <class T>
void normalize(T* out, const T* x, const T* weight, int64_t n, float rstd, const T* next) {
  const Vec r = broadcast(rstd);
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    __builtin_prefetch(next + i);
    store2(out + i, round2_to<T>(load2(x + i) * r) * load2(weight + i));
  }
  for (; i < n; i += kLanes) {
    const int m = lanes_left(n - i);
    store_n(out + i, round_to<T>(load_n(x + i, m) * r) * load_n(weight + i, m), m);
  }
}

template <class T>
void run(const RmsNormParams& p, int threads) {
  const int64_t grain = 1 + 16384 / (p.hidden + 1);
  parallel_chunks(p.rows, grain, threads, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
      const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
      const T* next = row + 1 < end ? x + p.x_stride : x;
      float squares;
      if (p.residual) {
        T* sum = static_cast<T*>(p.residual_out) + row * p.hidden;
        squares = sum_of_squares(Sum<T>{sum, x, residual}, p.hidden);
        x = sum;
      } else {
        squares = sum_of_squares(Plain<T>{x}, p.hidden);
      }
      const float mean = squares / static_cast<float>(p.hidden);
      const float rstd = plain_nan(1.0f / std::sqrt(mean + p.eps));
      const T* weight = static_cast<const T*>(p.weight);
      if (!p.scale) {
        normalize(static_cast<T*>(p.out) + row * p.hidden, x, weight, p.hidden, rstd, next);
        continue;
      }
      T* normed = scratch.get<T>(static_cast<size_t>(p.hidden));
      normalize(normed, x, weight, p.hidden, rstd, next);
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
