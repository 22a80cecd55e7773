// silu_and_mul, the middle of SwiGLU, and its FP8 form.
//
//   s = gate / (1 + e^-gate)     (fp32, then rounded to dtype)
//   out = s * up                 (rounded to dtype)
//   FP8: scale = max(min(amax|out|, scale_ub), tiny) / 448, q = e4m3(clamp(out / scale))
//
// Cost: 6 bytes per element of out in bf16; one exponential and one division, about 25 FLOPs.
#include "kernels.h"
#include "parallel.h"
#include "quantize_row.h"
#include "simd.h"

namespace lf::LF_ISA {
namespace {

constexpr int kStep = 2 * kLanes;

// 1 + e^-x, Inf below -89: Cody-Waite reduction by ln 2, then a minimax polynomial of e^-r,
// |r| <= ln 2 / 2 (relative error 4e-9; 9e-8 for 16-bit types, 1/2,000 of their rounding error).
// Past 86 e^-x is negligible beside 1. min and max return a NaN given as their second operand.
template <class T>
inline Vec one_plus_exp_negated(Vec x) {
  constexpr float u = kLdexpUnit;
  x = min(broadcast(86.0f), max(broadcast(-89.0f), x));
  const Exponent e = round_exponent(x, -1.44269504088896341f);
  Vec r = fma(e.n, broadcast(0.693359375f), x);
  r = fma(e.n, broadcast(-2.12194440e-4f), r);
  // Not Horner's scheme: its chain of six FMAs took the time, not their number.
  const Vec r2 = r * r;
  Vec p;
  if constexpr (sizeof(T) == 4) {
    const Vec high = fma(broadcast(u * -0.008368796668946743f), r, broadcast(u * 0.04166839644f));
    const Vec low = fma(broadcast(u * -0.1666651964187622f), r, broadcast(u * 0.4999999403953552f));
    p = fma(fma(broadcast(u * 0.0013814433477818966f), r2, high), r2, low);
    p = fma(p, r2, broadcast(u) - broadcast(u) * r);
  } else {
    p = fma(broadcast(u * -0.008289499f), r, broadcast(u * 0.041898176f));
    p = fma(p, r, broadcast(u * -0.1666765f));
    p = fma(p, r, broadcast(u * 0.49999148f));
    p = fma(p, r, broadcast(u * -0.9999997f));
    p = fma(p, r, broadcast(u));
  }
  return ldexp(p, e, broadcast(1.0f));
}

// -Inf gives NaN (-Inf / Inf) and all x below -88.7 give -0, as in torch: e^-x overflows.
template <class T>
inline Vec silu(Vec x) {
  const Vec d = one_plus_exp_negated<T>(x);
#if defined(LF_AVX512)
  if constexpr (sizeof(T) == 2) return x * reciprocal_from(d, {_mm512_rcp14_ps(d.v)});
#endif
  return x / d;
}

#if defined(LF_AVX512)
// Advances eight vectors of 16-bit x in step. One vector's 25 or so steps depend on each other, and
// the core looks only 64 ahead. The reduction uses an exact product with the first 13 bits of log2
// e, so the rest can be added afterwards. 2^r on [0, 1]: relative error 6e-9. A NaN may be lost on
// the way, but the result is multiplied by x.
inline void silu_16bit(Vec (&x)[8]) {
  constexpr int kSmallerMagnitudeSignOfFirst = 0x2;
  constexpr int kFraction = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const Vec coefficients[] = {broadcast(0.0012442055f), broadcast(0.009678331f),
                              broadcast(0.055483762f),  broadcast(0.24022968f),
                              broadcast(0.693147f),     broadcast(1.0f)};
  __m512 t[8];
  Vec r[8], p[8];
#define LF_EACH _Pragma("GCC unroll 8") for (int i = 0; i < 8; ++i)
  LF_EACH r[i].v = _mm512_range_ps(x[i].v, _mm512_set1_ps(105.0f), kSmallerMagnitudeSignOfFirst);
  LF_EACH t[i] = _mm512_mul_ps(r[i].v, _mm512_set1_ps(-1.442627f));
  LF_EACH p[i].v = _mm512_reduce_ps(t[i], kFraction);
  LF_EACH r[i] = fma(r[i], broadcast(-6.8087764e-05f), p[i]);
  LF_EACH p[i] = broadcast(2.1700618e-04f);
  for (const Vec& c : coefficients) LF_EACH p[i] = fma(p[i], r[i], c);
  LF_EACH p[i].v = _mm512_scalef_ps(p[i].v, t[i]);
  LF_EACH p[i] = p[i] + broadcast(1.0f);
  LF_EACH r[i].v = _mm512_rcp14_ps(p[i].v);
  LF_EACH p[i] = reciprocal_from(p[i], r[i]);
  LF_EACH x[i] = x[i] * p[i];
#undef LF_EACH
}
#endif

template <class T>
void silu_and_mul_row(T* out, const T* gate, const T* up, int64_t n) {
  int64_t i = 0;
#if defined(LF_AVX512)
  if constexpr (sizeof(T) == 2)
    for (; i + 4 * kStep <= n; i += 4 * kStep) {
      Vec g[8];
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        const Pair v = load2(gate + i + u * kStep);
        g[2 * u] = v.a, g[2 * u + 1] = v.b;
      }
      silu_16bit(g);
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u)
        store2(out + i + u * kStep,
               round2_to<T>({g[2 * u], g[2 * u + 1]}) * load2(up + i + u * kStep));
    }
#endif
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
void run(const ActivationParams& p, int threads) {
  // A work item is columns [c * kWidth, ...) of a row, or whole rows if they are short or FP8.
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

void activation(const ActivationParams& p, int threads) {
  with_dtype(p.dtype, [&](auto* t) { run<std::remove_pointer_t<decltype(t)>>(p, threads); });
}

}  // namespace lf::LF_ISA
