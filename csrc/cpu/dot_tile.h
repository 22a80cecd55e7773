// The matrix kernel of attention: a tile of rows times a packed panel, by the fastest multiply
// instruction available, and the packing.
//
// Operands are units of 32 bits, an fp32 or a pair of bf16 for vdpbf16ps, stored as floats either
// way. A panel is kPanel columns: one unit of every column, then the next unit of every column. The
// kernel streams it with one vector load per kLanes columns and one broadcast per row.
#pragma once
#include "simd.h"

namespace lf::LF_ISA {

// kTileRows x kPanelVecs accumulators, kPanelVecs vectors of b and one of a fill the register file.
#if defined(LF_AVX512)
inline constexpr int kTileRows = 6, kPanelVecs = 4;
#elif defined(LF_AVX2)
inline constexpr int kTileRows = 6, kPanelVecs = 2;
#else
inline constexpr int kTileRows = 2, kPanelVecs = 2;
#endif
inline constexpr int kPanel = kPanelVecs * kLanes;

// dst[unit][key] = row(key)[unit] for a vector of keys and one of units; dst's rows are kPanel.
inline void store_transposed(float* dst, Vec* rows, int units) {
#if defined(LF_AVX512)
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_castps_si512(rows[i].v);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0x88);
      b[i + j + 4] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    a[j] = _mm512_shuffle_i32x4(b[j], b[j + 8], 0x88);
    a[j + 8] = _mm512_shuffle_i32x4(b[j], b[j + 8], 0xdd);
  }
  for (int u = 0; u < 16; ++u)
    if (u < units) _mm512_storeu_si512(dst + u * kPanel, a[u]);
#else
  float t[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) store(t[i], rows[i]);
  for (int u = 0; u < units; ++u)
    for (int i = 0; i < kLanes; ++i) dst[u * kPanel + i] = t[i][u];
#endif
}

// Arithmetic for operands of dtype T, loaded from T or e4m3.
template <class T>
struct Units {
  static constexpr int kElements = 1;
  static constexpr bool kShortExp = false;

  template <class C>
  static Vec load_units(const C* p, int64_t elements) {
    return elements >= kLanes ? load(p) : load_n(p, static_cast<int>(elements));
  }
  static Vec dot(Vec a, Vec b, Vec c) { return fma(a, b, c); }
  // Packs two rows of values; rows beyond the last key are null.
  template <class C>
  static bool pack_pair(float* dst, const C* v0, const C* v1, int64_t elements) {
    const Vec a = load_units(v0, elements), b = v1 ? load_units(v1, elements) : zeros();
    store(dst, a);
    store(dst + kPanel, b);
    return !any_nan((a - a) + (b - b));
  }
  // Converts probabilities to units, in place; returns their sum.
  static Vec pack_probabilities(float* dst, Vec p0, Vec p1) {
    store(dst, p0);
    store(dst + kLanes, p1);
    return p0 + p1;
  }
};

#if defined(LF_AVX512_BF16)
// vdpbf16ps flushes denormals to zero, in its operands and its result.
template <>
struct Units<bf16> {
  static constexpr int kElements = 2;
  static constexpr bool kShortExp = true;  // rounding to bf16 is 500 times its error

  static Vec load_units(const bf16* p, int64_t elements) {
    if (elements >= 32) return {_mm512_loadu_ps(p)};
    const auto mask = static_cast<__mmask32>((uint64_t{1} << elements) - 1);
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p))};
  }
  static Vec load_units(const e4m3* p, int64_t elements) {
    const int n = static_cast<int>(elements < 32 ? elements : 32);
    const Vec a = load_n(p, n < 16 ? n : 16), b = n > 16 ? load_n(p + 16, n - 16) : zeros();
    return {(__m512)_mm512_cvtne2ps_pbh(b.v, a.v)};
  }
  static Vec dot(Vec a, Vec b, Vec c) {
    return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
  }
  static __m256i load_values(const bf16* p, int n) { return _mm256_maskz_loadu_epi16(first(n), p); }
  static __m256i load_values(const e4m3* p, int n) {
    return (__m256i)_mm512_cvtneps_pbh(load_n(p, n).v);
  }
  template <class C>
  static bool pack_pair(float* dst, const C* v0, const C* v1, int64_t elements) {
    const int n = lanes_left(elements);
    const __m512i a = _mm512_cvtepu16_epi32(load_values(v0, n));
    const __m512i b = v1 ? _mm512_cvtepu16_epi32(load_values(v1, n)) : _mm512_setzero_si512();
    const __m512i pair = _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
    _mm512_storeu_si512(dst, pair);
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    return !_mm512_cmpeq_epi16_mask(_mm512_and_si512(pair, exponent), exponent);
  }
  static Vec pack_probabilities(float* dst, Vec p0, Vec p1) {
    const __m512bh pair = _mm512_cvtne2ps_pbh(p1.v, p0.v);
    _mm512_storeu_ps(dst, (__m512)pair);
    return dot({(__m512)pair}, broadcast(bits_float(0x3f803f80u)), zeros());
  }
};
#endif

// c [R, vecs] = a b * factor[0] or, if kAccumulate, c = c * factor[row] + a b. The product is
// summed apart from c: fp32 errors then grow with the square root of the block's length and of the
// number of blocks, not of their product.
template <class U, int R, bool kAccumulate, int NV = kPanelVecs>
inline void dot_tile(int64_t vecs, const float* a, int64_t lda, const float* b, int64_t units,
                     float* c, int64_t ldc, const float* factor) {
  if constexpr (NV > 1)
    if (vecs < NV)
      return dot_tile<U, R, kAccumulate, NV - 1>(vecs, a, lda, b, units, c, ldc, factor);
  Vec acc[R][NV];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < NV; ++i) {
      acc[r][i] = zeros();
      if (kAccumulate) __builtin_prefetch(c + r * ldc + i * kLanes, 1);
    }
  for (int64_t u = 0; u < units; ++u) {
    Vec bv[NV];
    for (int i = 0; i < NV; ++i) bv[i] = load(b + u * kPanel + i * kLanes);
    for (int r = 0; r < R; ++r) {
      const Vec av = broadcast(a[r * lda + u]);
      for (int i = 0; i < NV; ++i) acc[r][i] = U::dot(av, bv[i], acc[r][i]);
    }
  }
  for (int r = 0; r < R; ++r) {
    const Vec f = broadcast(factor[kAccumulate ? r : 0]);
    for (int i = 0; i < NV; ++i) {
      float* to = c + r * ldc + i * kLanes;
      store(to, kAccumulate ? fma(load(to), f, acc[r][i]) : acc[r][i] * f);
    }
  }
}

}  // namespace lf::LF_ISA
