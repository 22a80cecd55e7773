// silu_and_mul, the middle of SwiGLU, and its FP8 form.
//
//   s = gate / (1 + e^-gate)     (fp32, then rounded to dtype)
//   out = s * up                 (rounded to dtype)
//   FP8: scale = max(min(amax|out|, scale_ub), tiny) / 448, q = e4m3(clamp(out / scale))
//
// Cost: 6 bytes an element of out in bf16; an exponential and a division, about 25 flops.
#include "kernels.h"
#include "parallel.h"
#include "quantize_row.h"
#include "simd.h"

namespace lf::LF_ISA {
namespace {

constexpr int kStep = 2 * kLanes;

// e^-x to 2 ulp, 0 past 105 and Inf below -89: Cody-Waite reduction by ln 2, then a minimax
// polynomial on [-ln 2 / 2, ln 2 / 2] (relative error 4e-9). NaN, as min's and max's second
// operand, comes through.
inline Vec exp_negated(Vec x) {
  x = min(broadcast(105.0f), max(broadcast(-89.0f), x));
  const Vec n = round_int(x * broadcast(-1.44269504088896341f));
  Vec r = fma(n, broadcast(0.693359375f), x);
  r = fma(n, broadcast(-2.12194440e-4f), r);
  // Not Horner's: its chain of six fma, and not their number, was what the time went on.
  const Vec r2 = r * r;
  const Vec high = fma(broadcast(-0.008368796668946743f), r, broadcast(0.041668396443128586f));
  const Vec low = fma(broadcast(-0.1666651964187622f), r, broadcast(0.4999999403953552f));
  Vec p = fma(fma(broadcast(0.0013814433477818966f), r2, high), r2, low);
  p = fma(p, r2, broadcast(1.0f) - r);
  return ldexp(p, n);
}

// -Inf gives NaN (-Inf / Inf) and everything below -88.7 gives -0, as in torch: e^-x overflows.
template <class T>
inline Vec silu(Vec x) {
  const Vec d = broadcast(1.0f) + exp_negated(x);
  if constexpr (sizeof(T) == 4) return x / d;
  return x * reciprocal(d);
}

template <class T>
void silu_and_mul_row(T* out, const T* gate, const T* up, int64_t n) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    const Pair g = load2(gate + i);
    store2(out + i, round2_to<T>({silu<T>(g.a), silu<T>(g.b)}) * load2(up + i));
  }
  for (; i < n; i += kLanes) {
    const int m = lanes_left(n - i);
    store_n(out + i, round_to<T>(silu<T>(load_n(gate + i, m))) * load_n(up + i, m), m);
  }
}

template <class T>
void run(const SiluAndMulParams& p, int threads) {
  // A work item: columns [c * kWidth, ...) of a row, or whole rows where they are short or FP8.
  constexpr int64_t kWidth = 4096;
  const int64_t width = p.scale || p.width < kWidth ? p.width : kWidth;
  const int64_t across = (p.width + width - 1) / width;
  parallel_chunks(p.rows * across, kWidth / width, threads, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / across, left = item % across * width;
      const int64_t n = left + width < p.width ? width : p.width - left;
      const T* gate = static_cast<const T*>(p.gate_up) + row * p.gate_up_stride + left;
      const T* up = gate + p.width;
      if (!p.scale) {
        silu_and_mul_row(static_cast<T*>(p.out) + row * p.width + left, gate, up, n);
        continue;
      }
      T* activated = scratch.get<T>(static_cast<size_t>(n));
      silu_and_mul_row(activated, gate, up, n);
      p.scale[row] =
          quantize_row(static_cast<e4m3*>(p.out) + row * p.width, activated, n, p.scale_ub);
    }
  });
}

}  // namespace

void silu_and_mul(const SiluAndMulParams& p, int threads) {
  with_dtype(p.dtype, [&](auto* t) { run<std::remove_pointer_t<decltype(t)>>(p, threads); });
}

}  // namespace lf::LF_ISA
