// Vec: kLanes floats in the instruction set's registers, and the conversions between it and the
// dtypes in memory. Arithmetic is fp32; store() rounds to nearest even, exactly as torch does. The
// *_n forms touch only the first n lanes of memory, so no row is accessed past its end.
//
// The instruction set's header defines Vec, kLanes, load, store, load_n, store_n, zeros, broadcast,
// abs, + - * / and fma, reduce_add, reduce_max, any_nan, and
//   max, min         return their second argument if either is NaN
//   swap_pairs       swaps lanes 2i and 2i + 1
//   round_to<T>      the value that T would store
//   round_exponent   x, or x * factor, to the nearest integer n, ties to even; |n| < 2^21
//   ldexp            x / kLdexpUnit * 2^n (+ addend), overflowing to Inf; n in [-150, 128] or, if
//                    kLdexpUnit is 2, [-126, 128], with 0 at -126: the result is never denormal.
//                    AVX-512 has instructions; the others, bits_shifted_left_23 for this header's
//   Pair             two vectors of a row; kEvenOdd<T>: elements with even and with odd indices
//   store2, round2_to  of a Pair to bf16 may lose a NaN whose lower 16 bits are not all clear.
//                    16-bit inputs and arithmetic give no such NaN; plain_nan clears the bits.
// This header defines the rest in terms of those.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../params.h"

#if defined(LF_AVX512)
#include "simd_avx512.h"
#elif defined(LF_AVX2)
#include "simd_avx2.h"
#else
#include "simd_generic.h"
#endif

namespace lf::LF_ISA {

#if !defined(LF_AVX512)
// `biased` holds n + 126 in its lowest bits: shifted into the exponent they are 2^(n - 1).
struct Exponent {
  Vec n, biased;
};
inline constexpr float kLdexpUnit = 2.0f;
inline Exponent round_biased(Vec x) { return {x - broadcast(0x1.8p23f + 126.0f), x}; }
inline Exponent round_exponent(Vec x) { return round_biased(x + broadcast(0x1.8p23f + 126.0f)); }
inline Exponent round_exponent(Vec x, float factor) {
  return round_biased(fma(x, broadcast(factor), broadcast(0x1.8p23f + 126.0f)));
}
inline Vec half_exp2(Exponent e) { return bits_shifted_left_23(e.biased); }
inline Vec ldexp(Vec x, Exponent e) { return x * half_exp2(e); }
inline Vec ldexp(Vec x, Exponent e, Vec addend) { return fma(x, half_exp2(e), addend); }
#endif

#if !defined(LF_AVX512) && !defined(LF_AVX2)
struct Pair {
  Vec a, b;
};
template <class T>
inline Pair round2_to(Pair x) {
  return {round_to<T>(x.a), round_to<T>(x.b)};
}
template <class T>
inline constexpr bool kEvenOdd = false;
#endif
template <class T>
inline Pair load2(const T* p) {
  return {load(p), load(p + kLanes)};
}
template <class T>
inline void store2(T* p, Pair x) {
  store(p, x.a);
  store(p + kLanes, x.b);
}
// Stores x and returns what was stored.
template <class T>
inline Pair store2_rounded(T* p, Pair x) {
  const Pair rounded = round2_to<T>(x);
  store2(p, rounded);
  return rounded;
}
// Loads the first n elements, 0 < n < 2 * kLanes; the rest become zero.
template <class T>
inline Pair load2_n(const T* p, int n) {
  if constexpr (!kEvenOdd<T>)
    return n <= kLanes ? Pair{load_n(p, n), zeros()}
                       : Pair{load(p), load_n(p + kLanes, n - kLanes)};
  T buffer[2 * kLanes] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load2(buffer);
}
template <class T>
inline void store2_n(T* p, Pair x, int n) {
  T buffer[2 * kLanes];
  store2(buffer, x);
  std::memcpy(p, buffer, n * sizeof(T));
}
#if defined(LF_AVX512) || defined(LF_AVX2)
// Stores a Pair in the order of load2 for T, as e4m3.
template <class T>
inline void store2_fp8(e4m3* p, Pair x) {
  if constexpr (kEvenOdd<T>) return store_even_odd(p, x);
  store(p, x.a);
  store(p + kLanes, x.b);
}
#endif
// Reorders a row of fp32 in steps of two vectors, so that load2 of it matches load2 of a row of T.
template <class T>
inline void arrange(float* to, const float* from, int64_t n) {
  int64_t i = 0;
#if defined(LF_AVX512) || defined(LF_AVX2)
  if constexpr (kEvenOdd<T>)
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) store2(to + i, even_odd(load2(from + i)));
#endif
  for (; i < n; ++i) to[i] = from[i];
}
// Swaps elements 2i and 2i + 1 of a row of T.
template <class T>
inline Pair swap_neighbors(Pair x) {
  if constexpr (kEvenOdd<T>) return {x.b, x.a};
  return {swap_pairs(x.a), swap_pairs(x.b)};
}
// Lanes of the next vector that a row uses when n > 0 elements are left.
inline int lanes_left(int64_t n) { return n < kLanes ? static_cast<int>(n) : kLanes; }
inline Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
inline Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
inline Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
inline Pair operator*(Pair x, Vec y) { return {x.a * y, x.b * y}; }
inline Pair fma(Pair x, Pair y, Pair z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }

// 2^x for x <= 0: exactly 1 at 0; exactly 0 below -150 (a masked score), or -126 if kLdexpUnit is
// 2; NaN at NaN. Minimax on [-1/2, 1/2] with the constant term fixed at 1: relative error 2e-9, or
// 3e-6 for kShort.
template <bool kShort = false>
inline Vec exp2_nonpositive(Vec x) {
  constexpr float u = kLdexpUnit;
  x = max(broadcast(u == 1.0f ? -151.0f : -126.0f), x);
  const Exponent e = round_exponent(x);
  const Vec r = x - e.n;
  Vec p = broadcast(u * (kShort ? 0.009582852944731712f : 0.00015353361959569156f));
  if constexpr (!kShort) {
    p = fma(p, r, broadcast(u * 0.0013398875016719103f));
    p = fma(p, r, broadcast(u * 0.00961843691766262f));
  }
  p = fma(p, r, broadcast(u * (kShort ? 0.055906426161527634f : 0.055503323674201965f)));
  p = fma(p, r, broadcast(u * (kShort ? 0.24024099111557007f : 0.24022647738456726f)));
  p = fma(p, r, broadcast(u * (kShort ? 0.6931241750717163f : 0.6931471824645996f)));
  p = fma(p, r, broadcast(u));
  return ldexp(p, e);
}

// Calls f(T*) with a null pointer of the C++ type of an activation's dtype.
template <class F>
inline void with_dtype(DType dtype, F&& f) {
  if (dtype == DType::f32) return f(static_cast<float*>(nullptr));
  if (dtype == DType::bf16) return f(static_cast<bf16*>(nullptr));
  return f(static_cast<f16*>(nullptr));
}

}  // namespace lf::LF_ISA
