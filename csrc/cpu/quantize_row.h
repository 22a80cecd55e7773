// The FP8 rule, once: every kernel that emits e4m3 quantizes through these three functions.
//
//   scale = max(min(amax|x|, scale_ub), tiny) / 448,  q = e4m3(clamp(x / scale, -448, 448))
//
// A true division, not a product with the reciprocal: the two differ in the last bit of x / scale
// and so, at ties, in q. A NaN in x makes amax, the scale and with it every q of its group NaN.
#pragma once
#include <limits>

#include "simd.h"

namespace lf::LF_ISA {

inline constexpr float kFp8Max = 448.0f;

// Magnitudes order as their bits do, NaN above Inf, so an integer maximum finds amax and keeps NaN.
// The compiler turns this loop into one instruction per 32 16-bit values.
template <class T>
inline float amax(const T* x, int64_t n) {
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int16_t>;
  Bits largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    Bits bits;
    std::memcpy(&bits, x + i, sizeof(T));
    bits &= std::numeric_limits<Bits>::max();
    largest = bits > largest ? bits : largest;
  }
  T value;
  std::memcpy(&value, &largest, sizeof(T));
  return to_float(value);
}

// The larger of two amaxes; NaN wins.
inline float max_amax(float a, float b) { return a != a || a > b ? a : b; }

inline float fp8_scale(float amax, float scale_ub) {
  if (amax != amax) return amax;
  if (amax > scale_ub) amax = scale_ub;
  // Its scale is the smallest normal number, which flush-to-zero leaves.
  constexpr float tiny = kFp8Max * std::numeric_limits<float>::min();
  return (amax > tiny ? amax : tiny) / kFp8Max;
}

#if defined(LF_AVX2) || defined(LF_AVX512)
// x / scale, correctly rounded by Markstein's theorem: the remainder of the first guess is exact,
// and corrects it. Three multiplications; a division holds the divider for as long as eight. -0
// stays -0.
struct Quotient {
  Vec scale, inverse, minus_inverse;
  explicit Quotient(float s)
      : scale(broadcast(s)), inverse(broadcast(1.0f / s)), minus_inverse(broadcast(-1.0f / s)) {}
  // Whether nothing underflows or overflows in between, and no clamping is needed, given an amax
  // that scale_ub did not limit. False for NaN and Inf.
  static bool serves(float s, float amax) {
    return s >= 0x1p-80f && s <= 0x1p80f && amax <= s * (kFp8Max + 1.0f);
  }
  Vec operator()(Vec x) const {
    const Vec guess = x * inverse;
    return fma(fms(guess, scale, x), minus_inverse, guess);
  }
};
#endif

template <class T>
inline void scale_to_fp8(e4m3* q, const T* x, int64_t n, float scale, [[maybe_unused]] float amax) {
  const Vec s = broadcast(scale), hi = broadcast(kFp8Max), lo = broadcast(-kFp8Max);
  int64_t i = 0;
#if defined(LF_AVX2) || defined(LF_AVX512)
  if (Quotient::serves(scale, amax)) {
    const Quotient quotient(scale);
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      const Pair v = load2(x + i);
      store2_fp8<T>(q + i, {quotient(v.a), quotient(v.b)});
    }
  }
#endif
  for (; i + kLanes <= n; i += kLanes) store(q + i, max(lo, min(hi, load(x + i) / s)));
  if (const int tail = static_cast<int>(n - i))
    store_n(q + i, max(lo, min(hi, load_n(x + i, tail) / s)), tail);
}

// Quantizes one row and returns its scale.
template <class T>
inline float quantize_row(e4m3* q, const T* x, int64_t n, float scale_ub) {
  const float largest = amax(x, n), scale = fp8_scale(largest, scale_ub);
  scale_to_fp8(q, x, n, scale, largest);
  return scale;
}

}  // namespace lf::LF_ISA
