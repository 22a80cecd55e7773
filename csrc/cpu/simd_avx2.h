// simd.h for AVX2 with FMA and F16C: 8 lanes.
#pragma once
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "simd_scalar.h"

namespace lf::LF_ISA {

inline constexpr int kLanes = 8;
struct Vec {
  __m256 v;
};
inline Vec zeros() { return {_mm256_setzero_ps()}; }
inline Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// Of FMA's three forms gcc also picks those that overwrite a factor. It then copies registers for
// that factor, runs out of them and spills sums: 1.5 times the time.
inline void add_product(Vec& sum, Vec a, Vec b) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum.v) : "x"(a.v), "xm"(b.v));
}
inline Vec fms(Vec a, Vec b, Vec c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
inline Vec abs(Vec a) {
  return {_mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)))};
}
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline float reduce_add(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float reduce_max(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

inline __m128i narrow_epi32_epi16(__m256i x) {
  return _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
inline __m256i f32_to_bf16_bits(__m256 x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r =
      _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0),
                            _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
inline __m256 e4m3_to_f32(__m128i low8) {
  const __m128i w = _mm_cvtepu8_epi16(low8);
  const __m128i magnitude = _mm_and_si128(w, _mm_set1_epi16(0x7f));
  __m128i h = _mm_or_si128(_mm_slli_epi16(magnitude, 7),
                           _mm_slli_epi16(_mm_and_si128(w, _mm_set1_epi16(0x80)), 8));
  h = _mm_blendv_epi8(h, _mm_set1_epi16(0x7e00), _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f)));
  return _mm256_mul_ps(_mm256_cvtph_ps(h), _mm256_set1_ps(256.0f));
}
inline __m256i f32_to_e4m3_lanes(__m256 x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i magnitude = _mm256_and_si256(u, _mm256_set1_epi32(0x7fffffff));
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(u, 24), _mm256_set1_epi32(0x80));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(magnitude, 20), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(
      _mm256_add_epi32(_mm256_add_epi32(magnitude, odd), _mm256_set1_epi32(0x7ffff - (120 << 23))),
      20);
  const __m256i tiny = _mm256_sub_epi32(
      _mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(magnitude), _mm256_set1_ps(0x1p14f))),
      _mm256_set1_epi32(0x46800000));
  r = _mm256_blendv_epi8(r, tiny, _mm256_cmpgt_epi32(_mm256_set1_epi32(0x3c800000), magnitude));
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7f),
                         _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x43e80000)));
  return _mm256_or_si256(r, sign);
}
inline __m128i f32_to_e4m3_bits(__m256 x) {  // 8 bytes in the low half
  const __m128i h = narrow_epi32_epi16(f32_to_e4m3_lanes(x));
  return _mm_packus_epi16(h, h);
}

inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const bf16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
inline Vec load(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Vec load(const e4m3* p) {
  return {e4m3_to_f32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
template <class T>
inline Vec load_n(const T* p, int n) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(bf16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_epi32_epi16(f32_to_bf16_bits(a.v)));
}
inline void store(f16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store(e4m3* p, Vec a) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), f32_to_e4m3_bits(a.v));
}
template <class T>
inline void store_n(T* p, Vec a, int n) {
  T buffer[kLanes];
  store(buffer, a);
  std::memcpy(p, buffer, n * sizeof(T));
}
template <class T>
inline Vec round_to(Vec a);
template <>
inline Vec round_to<float>(Vec a) {
  return a;
}
template <>
inline Vec round_to<bf16>(Vec a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(f32_to_bf16_bits(a.v), 16))};
}
template <>
inline Vec round_to<f16>(Vec a) {
  return {_mm256_cvtph_ps(_mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}
inline bool any_nan(Vec a) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)) != 0;
}
inline Vec swap_pairs(Vec a) { return {_mm256_permute_ps(a.v, 0xb1)}; }

inline Vec bits_shifted_left_23(Vec a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23))};
}

// Two vectors at a time. For bf16, a holds the even elements and b the odd ones: a shift and a
// mask, where widening 8 takes a shuffle, and no packing on the way back.
struct Pair {
  Vec a, b;
};
template <class T>
inline constexpr bool kEvenOdd = std::is_same_v<T, bf16>;
inline __m256 upper_halves(__m256i x) {
  return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline Pair load2(const bf16* p) {
  __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  asm("" : "+x"(h));  // gcc would load twice, and two loads per cycle are the limit
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(h, 16))}, {upper_halves(h)}};
}
// The upper half of each lane is the bf16; the lower half is leftover.
inline __m256i round_upper_half(Vec x) {
  const __m256i u = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
}
inline Pair store2_rounded(bf16* p, Pair x) {
  const __m256i even = round_upper_half(x.a), odd = round_upper_half(x.b);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa));
  return {{upper_halves(even)}, {upper_halves(odd)}};
}
inline void store2(bf16* p, Pair x) { store2_rounded(p, x); }
inline void store_even_odd(e4m3* p, Pair x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   narrow_epi32_epi16(_mm256_or_si256(
                       f32_to_e4m3_lanes(x.a.v), _mm256_slli_epi32(f32_to_e4m3_lanes(x.b.v), 8))));
}
template <class T>
inline Pair round2_to(Pair x) {
  if constexpr (kEvenOdd<T>)
    return {{upper_halves(round_upper_half(x.a))}, {upper_halves(round_upper_half(x.b))}};
  else
    return {round_to<T>(x.a), round_to<T>(x.b)};
}
inline Vec plain_nan(Vec x) {
  return {_mm256_blendv_ps(x.v, _mm256_set1_ps(bits_float(0x7fc00000u)),
                           _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q))};
}
// Reorders two vectors, fp32 from outside, into a Pair of bf16.
inline Pair even_odd(Pair x) {
  const auto gather = [](__m256 halves) {
    return plain_nan({_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(halves), 0xd8))});
  };
  return {gather(_mm256_shuffle_ps(x.a.v, x.b.v, 0x88)),
          gather(_mm256_shuffle_ps(x.a.v, x.b.v, 0xdd))};
}

}  // namespace lf::LF_ISA
