// simd.h for AVX-512 (F, BW, DQ, VL), and AVX-512-BF16 if LF_AVX512_BF16 is set: 16 lanes.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "simd_scalar.h"

namespace lf::LF_ISA {

inline constexpr int kLanes = 16;
struct Vec {
  __m512 v;
};
inline Vec zeros() { return {_mm512_setzero_ps()}; }
inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline void add_product(Vec& sum, Vec a, Vec b) { sum = fma(a, b, sum); }
inline Vec fms(Vec a, Vec b, Vec c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline __m256i f32_to_bf16_exact(__m512 x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r =
      _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0)));
}
#if defined(LF_AVX512_BF16)
// The instruction replaces eight but flushes denormals to zero. So if a result is zero the inputs
// are checked, and a denormal among them takes the long way.
inline bool has_denormal(__m512 x) { return _mm512_fpclass_ps_mask(x, 0x20) != 0; }
inline __m256i f32_to_bf16(__m512 x) {
  const __m256i h = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
  const bool zero = _mm256_testn_epi16_mask(h, _mm256_set1_epi16(0x7fff)) != 0;
  if (__builtin_expect(zero, 0) && has_denormal(x)) return f32_to_bf16_exact(x);
  return h;
}
#else
inline __m256i f32_to_bf16(__m512 x) { return f32_to_bf16_exact(x); }
#endif
inline __m512 bf16_to_f32(__m256i h) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
inline __m512 e4m3_to_f32(__m128i b) {
  // Through fp16: shifted by 7 the fields line up, 2^-8 of the value; subnormals are exact.
  const __m256i w = _mm256_cvtepu8_epi16(b);
  const __m256i magnitude = _mm256_and_si256(w, _mm256_set1_epi16(0x7f));
  __m256i h = _mm256_or_si256(_mm256_slli_epi16(magnitude, 7),
                              _mm256_slli_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0x80)), 8));
  h = _mm256_mask_mov_epi16(h, _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7f)),
                            _mm256_set1_epi16(0x7e00));
  return _mm512_mul_ps(_mm512_cvtph_ps(h), _mm512_set1_ps(256.0f));
}
inline __m512i f32_to_e4m3_lanes(__m512 x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i magnitude = _mm512_and_si512(u, _mm512_set1_epi32(0x7fffffff));
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(u, 24), _mm512_set1_epi32(0x80));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(magnitude, 20), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(
      _mm512_add_epi32(_mm512_add_epi32(magnitude, odd), _mm512_set1_epi32(0x7ffff - (120 << 23))),
      20);
  const __m512i tiny = _mm512_sub_epi32(
      _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(magnitude), _mm512_set1_ps(0x1p14f))),
      _mm512_set1_epi32(0x46800000));
  r = _mm512_mask_mov_epi32(r, _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(0x3c800000)),
                            tiny);
  r = _mm512_mask_mov_epi32(r, _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x43e80000)),
                            _mm512_set1_epi32(0x7f));
  return _mm512_or_si512(r, sign);
}
inline __m128i f32_to_e4m3_bits(__m512 x) { return _mm512_cvtepi32_epi8(f32_to_e4m3_lanes(x)); }

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const bf16* p) {
  return {bf16_to_f32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Vec load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Vec load(const e4m3* p) {
  return {e4m3_to_f32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Vec load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline Vec load_n(const bf16* p, int n) {
  return {bf16_to_f32(_mm256_maskz_loadu_epi16(first(n), p))};
}
inline Vec load_n(const f16* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))};
}
inline Vec load_n(const e4m3* p, int n) { return {e4m3_to_f32(_mm_maskz_loadu_epi8(first(n), p))}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(bf16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), f32_to_bf16(a.v));
}
inline void store(f16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store(e4m3* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), f32_to_e4m3_bits(a.v));
}
inline void store_n(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline void store_n(bf16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first(n), f32_to_bf16(a.v));
}
inline void store_n(f16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first(n),
                           _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_n(e4m3* p, Vec a, int n) {
  _mm_mask_storeu_epi8(p, first(n), f32_to_e4m3_bits(a.v));
}
template <class T>
inline Vec round_to(Vec a);
template <>
inline Vec round_to<float>(Vec a) {
  return a;
}
template <>
inline Vec round_to<bf16>(Vec a) {
  return {bf16_to_f32(f32_to_bf16(a.v))};
}
template <>
inline Vec round_to<f16>(Vec a) {
  return {_mm512_cvtph_ps(_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}

// Two vectors at a time. For bf16, a holds the even elements and b the odd ones: a shift and a mask
// instead of two permutations, which run one per cycle.
struct Pair {
  Vec a, b;
};
inline Pair bf16_to_f32(__m512i h) {
  const __m512i odd = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(h, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(h, odd))}};
}
inline __m512i interleave(__m512i even_then_odd) {
  const __m512i even = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i odd = _mm512_slli_epi32(_mm512_add_epi32(even, _mm512_set1_epi32(16)), 16);
  return _mm512_permutexvar_epi16(_mm512_or_si512(even, odd), even_then_odd);
}
inline __m512i f32_to_bf16_exact(Pair x) {
  return interleave(_mm512_inserti64x4(_mm512_castsi256_si512(f32_to_bf16_exact(x.a.v)),
                                       f32_to_bf16_exact(x.b.v), 1));
}
inline __m512i f32_to_bf16(Pair x) {
#if defined(LF_AVX512_BF16)
  const __m512i h = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(x.b.v, x.a.v));
  const bool zero = _mm512_testn_epi16_mask(h, _mm512_set1_epi16(0x7fff)) != 0;
  if (__builtin_expect(!zero, 1) || !(has_denormal(x.a.v) || has_denormal(x.b.v)))
    return interleave(h);
#endif
  return f32_to_bf16_exact(x);
}
template <class T>
inline constexpr bool kEvenOdd = std::is_same_v<T, bf16>;
inline Pair load2(const bf16* p) { return bf16_to_f32(_mm512_loadu_si512(p)); }
inline Pair load2_n(const bf16* p, int n) {
  return bf16_to_f32(_mm512_maskz_loadu_epi16((__mmask32{1} << n) - 1, p));
}
inline void store2(bf16* p, Pair x) { _mm512_storeu_si512(p, f32_to_bf16(x)); }
inline void store_even_odd(e4m3* p, Pair x) {
  const __m512i odd = _mm512_slli_epi32(f32_to_e4m3_lanes(x.b.v), 8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_or_si512(f32_to_e4m3_lanes(x.a.v), odd)));
}
inline Pair store2_rounded(bf16* p, Pair x) {
  const __m512i h = f32_to_bf16(x);
  _mm512_storeu_si512(p, h);
  return bf16_to_f32(h);
}
template <class T>
inline Pair round2_to(Pair x) {
  if constexpr (kEvenOdd<T>)
    return bf16_to_f32(f32_to_bf16(x));
  else
    return {round_to<T>(x.a), round_to<T>(x.b)};
}
// Reorders two vectors into a Pair of bf16.
inline Pair even_odd(Pair x) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {{_mm512_permutex2var_ps(x.a.v, even, x.b.v)},
          {_mm512_permutex2var_ps(x.a.v, odd, x.b.v)}};
}
inline bool any_nan(Vec a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q) != 0; }
inline Vec swap_pairs(Vec a) { return {_mm512_permute_ps(a.v, 0xb1)}; }
// An estimate and one Newton step, at half the cost of a division.
inline Vec reciprocal_from(Vec x, Vec estimate) {
  const __m512 error = _mm512_fnmadd_ps(x.v, estimate.v, _mm512_set1_ps(1.0f));
  const __mmask16 finite = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(INFINITY), _CMP_NEQ_UQ);
  return {_mm512_maskz_fmadd_ps(finite, estimate.v, error, estimate.v)};
}

struct Exponent {
  Vec n;
};
inline constexpr float kLdexpUnit = 1.0f;
inline Exponent round_exponent(Vec x) {
  return {{_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}};
}
inline Exponent round_exponent(Vec x, float factor) {
  return round_exponent(x * broadcast(factor));
}
inline Vec ldexp(Vec x, Exponent e) { return {_mm512_scalef_ps(x.v, e.n.v)}; }
inline Vec ldexp(Vec x, Exponent e, Vec addend) { return ldexp(x, e) + addend; }

}  // namespace lf::LF_ISA
