// Vec: kLanes floats, on whatever the instruction set offers, and the conversions between it and
// the dtypes in memory. Arithmetic is fp32; store() rounds to nearest even, exactly as torch does.
// The *_n forms touch only the first n lanes of memory, so no row is read or written past its end.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../params.h"

#if defined(LF_AVX512) || defined(LF_AVX2)
#include <immintrin.h>
#endif

namespace lf::LF_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct e4m3 {
  uint8_t bits;
};

inline uint32_t float_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
inline float bits_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// ---- scalars: the definition that the vector forms below must match bit for bit ----

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return bits_float(sign | ((magnitude << 13) + (112u << 23)));
  const float tiny = static_cast<float>(magnitude) * 0x1p-24f;
  return sign ? -tiny : tiny;
}
inline float to_float(e4m3 x) {
  const uint32_t sign = (x.bits & 0x80u) << 24, magnitude = x.bits & 0x7fu;
  if (magnitude == 0x7fu) return bits_float(sign | 0x7fc00000u);
  if (magnitude >= 0x08u) return bits_float(sign | ((magnitude << 20) + (120u << 23)));
  const float tiny = static_cast<float>(magnitude) * 0x1p-9f;
  return sign ? -tiny : tiny;
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
  const uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude >= 0x38800000u)
    return {static_cast<uint16_t>(
        sign | ((magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13))};
  // Subnormal: adding 0.5 leaves the rounded value in the low bits of the mantissa.
  const uint32_t rounded = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  return {static_cast<uint16_t>(sign | rounded)};
}
template <>
inline e4m3 from_float<e4m3>(float x) {
  const uint32_t u = float_bits(x), sign = (u >> 24) & 0x80u, magnitude = u & 0x7fffffffu;
  if (magnitude >= 0x43e80001u) return {static_cast<uint8_t>(sign | 0x7fu)};  // > 464, Inf, NaN
  if (magnitude >= 0x3c800000u)                                               // >= 2^-6
    return {static_cast<uint8_t>(
        sign | ((magnitude - (120u << 23) + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20))};
  const uint32_t rounded = float_bits(bits_float(magnitude) + 0x1p14f) - 0x46800000u;
  return {static_cast<uint8_t>(sign | rounded)};
}

#if defined(LF_AVX512)

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
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
// max and min return their second argument when either is NaN.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline Vec broadcast_pair(const float* p) {
  double bits;
  std::memcpy(&bits, p, 8);
  return {_mm512_castpd_ps(_mm512_set1_pd(bits))};
}
// Sums of neighbours: lanes 2i and 2i + 1 of a, then of b.
inline Vec add_pairs(Vec a, Vec b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {
      _mm512_add_ps(_mm512_permutex2var_ps(a.v, even, b.v), _mm512_permutex2var_ps(a.v, odd, b.v))};
}
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
// The instruction replaces eight but turns denormals into zero, so a zero among the results sends
// the reader to the inputs, and a denormal there takes the long way.
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
  // Through fp16: shifted by 7 the fields line up, 2^8 too small, and fp16 subnormals are exact.
  const __m256i w = _mm256_cvtepu8_epi16(b);
  const __m256i magnitude = _mm256_and_si256(w, _mm256_set1_epi16(0x7f));
  __m256i h = _mm256_or_si256(_mm256_slli_epi16(magnitude, 7),
                              _mm256_slli_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0x80)), 8));
  h = _mm256_mask_mov_epi16(h, _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7f)),
                            _mm256_set1_epi16(0x7e00));
  return _mm512_mul_ps(_mm512_cvtph_ps(h), _mm512_set1_ps(256.0f));
}
inline __m128i f32_to_e4m3_bits(__m512 x) {
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
  return _mm512_cvtepi32_epi8(_mm512_or_si512(r, sign));
}

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

// Two vectors at a time. Of bf16, a holds the elements with even indices and b those with odd ones:
// a shift and a mask instead of two permutations, of which this core does one a cycle.
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
inline Pair load2(const bf16* p) { return bf16_to_f32(_mm512_loadu_si512(p)); }
inline void store2(bf16* p, Pair x) { _mm512_storeu_si512(p, f32_to_bf16(x)); }
template <class T>
inline Pair round2_to(Pair x) {
  if constexpr (std::is_same_v<T, bf16>)
    return bf16_to_f32(f32_to_bf16(x));
  else
    return {round_to<T>(x.a), round_to<T>(x.b)};
}
inline bool any_nan(Vec a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q) != 0; }
// x * 2^n for integral n in [-252, 254] held as floats; overflows to Inf, underflows gradually.
inline Vec ldexp(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }
// Lanes 2i and 2i + 1 change places.
inline Vec swap_pairs(Vec a) { return {_mm512_permute_ps(a.v, 0xb1)}; }
// 1 / x to 1 ulp for 1 <= x <= Inf (0) and NaN: an estimate and one Newton step, at half the cost
// of a division.
inline Vec reciprocal_from(Vec x, Vec estimate) {
  const __m512 error = _mm512_fnmadd_ps(x.v, estimate.v, _mm512_set1_ps(1.0f));
  const __mmask16 finite = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(INFINITY), _CMP_NEQ_UQ);
  return {_mm512_maskz_fmadd_ps(finite, estimate.v, error, estimate.v)};
}
inline Vec reciprocal(Vec x) { return reciprocal_from(x, {_mm512_rcp14_ps(x.v)}); }
inline Vec round_int(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

#elif defined(LF_AVX2)

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
inline Vec broadcast_pair(const float* p) {
  double bits;
  std::memcpy(&bits, p, 8);
  return {_mm256_castpd_ps(_mm256_set1_pd(bits))};
}
inline Vec add_pairs(Vec a, Vec b) {
  const __m256 sums = _mm256_hadd_ps(a.v, b.v);  // a and b alternate every two lanes
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(sums), 0b11011000))};
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
inline __m128i f32_to_e4m3_bits(__m256 x) {  // 8 bytes in the low half
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
  const __m128i h = narrow_epi32_epi16(_mm256_or_si256(r, sign));
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
inline Vec ldexp(Vec x, Vec n) {  // in two steps: 2^n alone may not fit
  const __m256i i = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(i, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i a = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i b = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(i, half), bias), 23);
  return {_mm256_mul_ps(_mm256_mul_ps(x.v, _mm256_castsi256_ps(a)), _mm256_castsi256_ps(b))};
}
inline Vec swap_pairs(Vec a) { return {_mm256_permute_ps(a.v, 0xb1)}; }
inline Vec reciprocal(Vec x) { return broadcast(1.0f) / x; }
inline Vec round_int(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

#else  // any C++17 compiler

inline constexpr int kLanes = 8;
struct Vec {
  float v[kLanes];
};
#define LF_EACH for (int i = 0; i < kLanes; ++i)
inline Vec broadcast(float x) {
  Vec r;
  LF_EACH r.v[i] = x;
  return r;
}
inline Vec zeros() { return broadcast(0.0f); }
inline Vec operator+(Vec a, Vec b) {
  LF_EACH a.v[i] += b.v[i];
  return a;
}
inline Vec operator-(Vec a, Vec b) {
  LF_EACH a.v[i] -= b.v[i];
  return a;
}
inline Vec operator*(Vec a, Vec b) {
  LF_EACH a.v[i] *= b.v[i];
  return a;
}
inline Vec operator/(Vec a, Vec b) {
  LF_EACH a.v[i] /= b.v[i];
  return a;
}
// Two roundings: a true fma without the instruction is a library call.
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec abs(Vec a) {
  LF_EACH a.v[i] = bits_float(float_bits(a.v[i]) & 0x7fffffffu);
  return a;
}
inline Vec max(Vec a, Vec b) {
  LF_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline Vec min(Vec a, Vec b) {
  LF_EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline float reduce_add(Vec a) {
  for (int step = kLanes / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) a.v[i] += a.v[i + step];
  return a.v[0];
}
inline Vec broadcast_pair(const float* p) {
  Vec r;
  LF_EACH r.v[i] = p[i % 2];
  return r;
}
inline Vec add_pairs(Vec a, Vec b) {
  Vec r;
  for (int i = 0; i < kLanes / 2; ++i) {
    r.v[i] = a.v[2 * i] + a.v[2 * i + 1];
    r.v[i + kLanes / 2] = b.v[2 * i] + b.v[2 * i + 1];
  }
  return r;
}
inline float reduce_max(Vec a) {
  for (int i = 1; i < kLanes; ++i) a.v[0] = a.v[0] > a.v[i] ? a.v[0] : a.v[i];
  return a.v[0];
}
template <class T>
inline Vec load(const T* p) {
  Vec r;
  LF_EACH r.v[i] = to_float(p[i]);
  return r;
}
template <class T>
inline Vec load_n(const T* p, int n) {
  Vec r = zeros();
  for (int i = 0; i < n; ++i) r.v[i] = to_float(p[i]);
  return r;
}
template <class T>
inline void store(T* p, Vec a) {
  LF_EACH p[i] = from_float<T>(a.v[i]);
}
template <class T>
inline void store_n(T* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) p[i] = from_float<T>(a.v[i]);
}
template <class T>
inline Vec round_to(Vec a) {
  LF_EACH a.v[i] = to_float(from_float<T>(a.v[i]));
  return a;
}
inline bool any_nan(Vec a) {
  bool nan = false;
  LF_EACH nan |= a.v[i] != a.v[i];
  return nan;
}
inline float exp2_int(int32_t n) { return bits_float(static_cast<uint32_t>(n + 127) << 23); }
inline Vec ldexp(Vec x, Vec n) {  // in two steps: 2^n alone may not fit
  LF_EACH {
    const int32_t whole = n.v[i] == n.v[i] ? static_cast<int32_t>(n.v[i]) : 0;
    const int32_t half = whole / 2;
    x.v[i] = x.v[i] * exp2_int(half) * exp2_int(whole - half);
  }
  return x;
}
inline Vec swap_pairs(Vec a) {
  Vec r;
  LF_EACH r.v[i] = a.v[i ^ 1];
  return r;
}
inline Vec reciprocal(Vec x) { return broadcast(1.0f) / x; }
inline Vec round_int(Vec a) {
  LF_EACH a.v[i] = std::nearbyint(a.v[i]);
  return a;
}
#undef LF_EACH

#endif

// ---- on top of the above, the same for every instruction set ----

#if !defined(LF_AVX512)
struct Pair {
  Vec a, b;
};
template <class T>
inline Pair round2_to(Pair x) {
  return {round_to<T>(x.a), round_to<T>(x.b)};
}
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
// Reorders a row of fp32 in steps of two vectors so that load2 finds it as it finds a row of T.
template <class T>
inline void arrange(float* to, const float* from, int64_t n) {
  int64_t i = 0;
#if defined(LF_AVX512)
  if constexpr (std::is_same_v<T, bf16>) {
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      const Pair x = load2(from + i);
      store2(to + i, Pair{{_mm512_permutex2var_ps(x.a.v, even, x.b.v)},
                          {_mm512_permutex2var_ps(x.a.v, odd, x.b.v)}});
    }
  }
#endif
  for (; i < n; ++i) to[i] = from[i];
}
// Elements 2i and 2i + 1 of a row of T change places.
template <class T>
inline Pair swap_neighbours(Pair x) {
#if defined(LF_AVX512)
  if constexpr (std::is_same_v<T, bf16>) return {x.b, x.a};
#endif
  return {swap_pairs(x.a), swap_pairs(x.b)};
}
// How many lanes the next vector of a row uses when n > 0 elements are left.
inline int lanes_left(int64_t n) { return n < kLanes ? static_cast<int>(n) : kLanes; }
inline Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
inline Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
inline Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
inline Pair operator*(Pair x, Vec y) { return {x.a * y, x.b * y}; }
inline Pair fma(Pair x, Pair y, Pair z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }

// 2^x for x <= 0: exactly 1 at 0, exactly 0 below -150 (a masked score), NaN at NaN. Minimax on
// [-1/2, 1/2] with the constant term held at 1: relative error 2e-9, or 3e-6 for short.
template <bool kShort = false>
inline Vec exp2_nonpositive(Vec x) {
  x = max(broadcast(-151.0f), x);
  const Vec n = round_int(x), r = x - n;
  Vec p = broadcast(kShort ? 0.009582852944731712f : 0.00015353361959569156f);
  if constexpr (!kShort) {
    p = fma(p, r, broadcast(0.0013398875016719103f));
    p = fma(p, r, broadcast(0.00961843691766262f));
  }
  p = fma(p, r, broadcast(kShort ? 0.055906426161527634f : 0.055503323674201965f));
  p = fma(p, r, broadcast(kShort ? 0.24024099111557007f : 0.24022647738456726f));
  p = fma(p, r, broadcast(kShort ? 0.6931241750717163f : 0.6931471824645996f));
  p = fma(p, r, broadcast(1.0f));
  return ldexp(p, n);
}

// Calls f with a null pointer of the C++ type that an activation's dtype names: f(T*).
template <class F>
inline void with_dtype(DType dtype, F&& f) {
  if (dtype == DType::f32) return f(static_cast<float*>(nullptr));
  if (dtype == DType::bf16) return f(static_cast<bf16*>(nullptr));
  return f(static_cast<f16*>(nullptr));
}

}  // namespace lf::LF_ISA
