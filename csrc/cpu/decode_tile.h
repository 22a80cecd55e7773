// The inner loops of decode attention: a tile of R query rows (1, 2 or 4) against a block of keys
// that stay where they lie in the cache, each reached through its own pointer.
//
// A vector of scores holds R rows x kLanes / R keys, row-major. Summing kLanes accumulators into
// such a vector costs 3 instructions per accumulator, so keys need no transposing; one load of a
// key serves R rows. bf16 multiplies with vdpbf16ps where that exists (denormal inputs and
// products count as zero there) and fp32 arithmetic serves everything else.
#pragma once
#include "simd.h"

namespace lf::LF_ISA {

inline constexpr int kKeyBlock = 32;  // keys a tile takes between two rescalings of its sums
inline constexpr float kNoScore =
    -3.0e38f;  // a maximum's start: finite, so that it can be subtracted

// What q and p are held as, and how many elements of them a vector takes.
template <class T>
struct Operand {
  using type = float;
  static constexpr int width = kLanes;
};
#if defined(LF_AVX512_BF16)
template <>
struct Operand<bf16> {
  using type = bf16;
  static constexpr int width = 32;
};
#endif

// A query tile's running softmax over one chunk of keys; `sums` has R rows of padded_dim().
struct TileState {
  float max[kLanes];  // base-2 scores; every lane of a row alike
  float total[kLanes];
  float* sums() { return reinterpret_cast<float*>(this + 1); }
};

inline int64_t padded_dim(int64_t head_dim) { return (head_dim + 31) / 32 * 32; }

// ---- lanes ----

#if defined(LF_AVX512)

template <int kDistance>
inline Vec swap_lanes(Vec a) {
  if constexpr (kDistance == 1) return {_mm512_permute_ps(a.v, 0xb1)};
  if constexpr (kDistance == 2) return {_mm512_permute_ps(a.v, 0x4e)};
  if constexpr (kDistance == 4) return {_mm512_shuffle_f32x4(a.v, a.v, 0xb1)};
  if constexpr (kDistance == 8) return {_mm512_shuffle_f32x4(a.v, a.v, 0x4e)};
}
// Lane i of the result: the sum of a[i]'s lanes.
inline Vec transpose_sum(const Vec (&a)[kLanes]) {
  __m512 quad[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 x = a[4 * i].v, y = a[4 * i + 1].v, z = a[4 * i + 2].v, w = a[4 * i + 3].v;
    const __m512d xy =
        _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y)));
    const __m512d zw =
        _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(z, w), _mm512_unpackhi_ps(z, w)));
    quad[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(xy, zw)),
                            _mm512_castpd_ps(_mm512_unpackhi_pd(xy, zw)));
  }
  const __m512 lo = _mm512_add_ps(_mm512_shuffle_f32x4(quad[0], quad[1], 0x44),
                                  _mm512_shuffle_f32x4(quad[0], quad[1], 0xee));
  const __m512 hi = _mm512_add_ps(_mm512_shuffle_f32x4(quad[2], quad[3], 0x44),
                                  _mm512_shuffle_f32x4(quad[2], quad[3], 0xee));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(lo, hi, 0x88), _mm512_shuffle_f32x4(lo, hi, 0xdd))};
}

#elif defined(LF_AVX2)

template <int kDistance>
inline Vec swap_lanes(Vec a) {
  if constexpr (kDistance == 1) return {_mm256_permute_ps(a.v, 0xb1)};
  if constexpr (kDistance == 2) return {_mm256_permute_ps(a.v, 0x4e)};
  if constexpr (kDistance == 4) return {_mm256_permute2f128_ps(a.v, a.v, 0x01)};
}
inline Vec transpose_sum(const Vec (&a)[kLanes]) {
  const __m256 lo = _mm256_hadd_ps(_mm256_hadd_ps(a[0].v, a[1].v), _mm256_hadd_ps(a[2].v, a[3].v));
  const __m256 hi = _mm256_hadd_ps(_mm256_hadd_ps(a[4].v, a[5].v), _mm256_hadd_ps(a[6].v, a[7].v));
  return {
      _mm256_add_ps(_mm256_permute2f128_ps(lo, hi, 0x20), _mm256_permute2f128_ps(lo, hi, 0x31))};
}

#else

template <int kDistance>
inline Vec swap_lanes(Vec a) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = a.v[i ^ kDistance];
  return r;
}
inline Vec transpose_sum(const Vec (&a)[kLanes]) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = reduce_add(a[i]);
  return r;
}

#endif

// Combines each aligned run of n lanes; all lanes of a run get the result.
template <int n, class Op>
inline Vec across(Vec a, Op op) {
  if constexpr (n > 1) a = op(a, swap_lanes<1>(a));
  if constexpr (n > 2) a = op(a, swap_lanes<2>(a));
  if constexpr (n > 4) a = op(a, swap_lanes<4>(a));
  if constexpr (n > 8) a = op(a, swap_lanes<8>(a));
  return a;
}

// ---- scores: q . k for R rows and kLanes / R keys ----

template <int R, class T>
inline Vec scores(const float* q, int64_t q_stride, const T* const* k, int64_t d) {
  constexpr int kKeys = kLanes / R;
  Vec acc[kLanes];
  for (Vec& a : acc) a = zeros();
  const auto step = [&](int64_t i, auto load_key) __attribute__((always_inline)) {
    Vec key[kKeys];
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) key[j] = load_key(k[j] + i);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec qv = load(q + r * q_stride + i);
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) acc[r * kKeys + j] = fma(qv, key[j], acc[r * kKeys + j]);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) step(i, [](const T* x) { return load(x); });
  if (const int tail = static_cast<int>(d - i))
    step(i, [tail](const T* x) { return load_n(x, tail); });
  return transpose_sum(acc);
}

#if defined(LF_AVX512_BF16)
template <int R>
inline Vec scores(const bf16* q, int64_t q_stride, const bf16* const* k, int64_t d) {
  constexpr int kKeys = kLanes / R;
  Vec acc[kLanes];
  for (Vec& a : acc) a = zeros();
  const auto step = [&](int64_t i, auto load_key) __attribute__((always_inline)) {
    __m512bh key[kKeys];
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) key[j] = load_key(k[j] + i);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512bh qv = (__m512bh)_mm512_loadu_si512(q + r * q_stride + i);
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j)
        acc[r * kKeys + j].v = _mm512_dpbf16_ps(acc[r * kKeys + j].v, qv, key[j]);
    }
  };
  int64_t i = 0;
  for (; i + 32 <= d; i += 32)
    step(i, [](const bf16* x) { return (__m512bh)_mm512_loadu_si512(x); });
  if (i < d) {
    const __mmask32 valid = (1u << (d - i)) - 1u;
    step(i, [valid](const bf16* x) { return (__m512bh)_mm512_maskz_loadu_epi16(valid, x); });
  }
  return transpose_sum(acc);
}
#endif

// ---- weighted sums: sums = alpha * sums + p v, `keys` a multiple of kLanes / R ----

inline void store_weights(float* p, Vec a) { store(p, a); }
#if defined(LF_AVX512_BF16)
inline void store_weights(bf16* p, Vec a) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
}
#endif

// `ahead` is called once per vector of weights.
template <int R, int kVecs, class T, class Ahead>
inline void weighted_columns(float* sums, const float* alpha, int64_t stride, const float* p,
                             const T* const* v, int keys, int64_t i, int n, Ahead&& ahead) {
  constexpr int kKeys = kLanes / R;
  Vec acc[R][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < kVecs; ++c)
      acc[r][c] = load(sums + r * stride + i + c * kLanes) * broadcast(alpha[r * kKeys]);
  for (int j = 0; j < keys; j += kKeys, p += kLanes) {
    ahead();
    for (int u = 0; u < kKeys; ++u) {
      const T* row = v[j + u] + i;
      Vec value[kVecs];
#pragma GCC unroll 16
      for (int c = 0; c < kVecs; ++c)
        value[c] = n == kVecs * kLanes ? load(row + c * kLanes) : load_n(row, n);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int c = 0; c < kVecs; ++c)
          acc[r][c] = fma(broadcast(p[r * kKeys + u]), value[c], acc[r][c]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < kVecs; ++c) store(sums + r * stride + i + c * kLanes, acc[r][c]);
}

template <int R, class T, class Ahead>
inline void weighted_sum(float* sums, const float* alpha, const float* p, const T* const* v,
                         int keys, int64_t d, Ahead&& ahead) {
  constexpr int kVecs = kLanes == 16 ? 4 : 2;  // R * kVecs sums fit the registers
  const int64_t stride = padded_dim(d);
  int64_t i = 0;
  for (; i + kVecs * kLanes <= d; i += kVecs * kLanes)
    weighted_columns<R, kVecs>(sums, alpha, stride, p, v, keys, i, kVecs * kLanes, ahead);
  for (; i < d; i += kLanes) {
    const int n = static_cast<int>(d - i < kLanes ? d - i : kLanes);
    weighted_columns<R, 1>(sums, alpha, stride, p, v, keys, i, n, ahead);
  }
}
template <class T>
inline void finish_sums(float*, int64_t, const T*) {}

#if defined(LF_AVX512_BF16)
// Two keys at a time: their values interleave into the pairs that vdpbf16ps takes, by unpacks
// within 128-bit lanes. The sums of 32 columns thus lie as 0-3 8-11 16-19 24-27 | 4-7 12-15 ...
// until finish_sums.
template <int R, int kVecs, class Ahead>
inline void weighted_columns(float* sums, const float* alpha, int64_t stride, const bf16* p,
                             const bf16* const* v, int keys, int64_t i, __mmask32 valid,
                             Ahead&& ahead) {
  constexpr int kKeys = kLanes / R;
  Vec acc[R][2 * kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < 2 * kVecs; ++c)
      acc[r][c] = load(sums + r * stride + i + c * kLanes) * broadcast(alpha[r * kKeys]);
  for (int j = 0; j < keys; j += kKeys, p += kLanes) {
    ahead();
#pragma GCC unroll 2
    for (int u = 0; u < kKeys; u += 2) {
      __m512i pair[2 * kVecs];
#pragma GCC unroll 16
      for (int c = 0; c < kVecs; ++c) {
        const __m512i a = _mm512_maskz_loadu_epi16(valid, v[j + u] + i + c * 32);
        const __m512i b = _mm512_maskz_loadu_epi16(valid, v[j + u + 1] + i + c * 32);
        pair[2 * c] = _mm512_unpacklo_epi16(a, b);
        pair[2 * c + 1] = _mm512_unpackhi_epi16(a, b);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        int32_t weights;
        std::memcpy(&weights, p + r * kKeys + u, 4);
        const __m512bh w = (__m512bh)_mm512_set1_epi32(weights);
#pragma GCC unroll 16
        for (int c = 0; c < 2 * kVecs; ++c)
          acc[r][c].v = _mm512_dpbf16_ps(acc[r][c].v, w, (__m512bh)pair[c]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < 2 * kVecs; ++c) store(sums + r * stride + i + c * kLanes, acc[r][c]);
}

template <int R, class Ahead>
inline void weighted_sum(float* sums, const float* alpha, const bf16* p, const bf16* const* v,
                         int keys, int64_t d, Ahead&& ahead) {
  const int64_t stride = padded_dim(d);
  constexpr __mmask32 kAll = ~0u;
  int64_t i = 0;
  for (; i + 64 <= d; i += 64)
    weighted_columns<R, 2>(sums, alpha, stride, p, v, keys, i, kAll, ahead);
  for (; i < d; i += 32)
    weighted_columns<R, 1>(sums, alpha, stride, p, v, keys, i,
                           d - i < 32 ? (1u << (d - i)) - 1u : kAll, ahead);
}
inline void finish_sums(float* sums, int64_t n, const bf16*) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int64_t i = 0; i < n; i += 32) {
    const __m512 lo = load(sums + i).v, hi = load(sums + i + 16).v;
    store(sums + i, {_mm512_permutex2var_ps(lo, first, hi)});
    store(sums + i + 16, {_mm512_permutex2var_ps(lo, second, hi)});
  }
}
#endif

// Passes of weighted_sum over the keys.
template <class T>
inline int64_t value_passes(int64_t d) {
  constexpr int64_t kColumns = std::is_same_v<typename Operand<T>::type, bf16> ? 64
                               : kLanes == 16                                  ? 64
                                                                               : 16;
  return (d + kColumns - 1) / kColumns;
}

// ---- a block of keys ----

// Takes n keys into the tile's state. Row r sees the first visible[r] of them. k and v must point
// at finite rows up to the next multiple of kLanes / R past n.
template <int R, class T, class Ahead>
inline void attend_block(TileState& state, const typename Operand<T>::type* q, int64_t q_stride,
                         const T* const* k, const T* const* v, int n, const int64_t* visible,
                         int64_t d, float log2_scale, Ahead&& ahead) {
  constexpr int kKeys = kLanes / R;
  constexpr auto larger = [](Vec a, Vec b) { return max(a, b); };
  alignas(64) float s[kKeyBlock * R];
  alignas(64) typename Operand<T>::type p[kKeyBlock * R];
  const int steps = (n + kKeys - 1) / kKeys, keys = steps * kKeys;

  Vec top = broadcast(kNoScore);
  for (int j = 0; j < steps; ++j) {
    ahead.keys();
    const Vec x = scores<R>(q, q_stride, k + j * kKeys, d) * broadcast(log2_scale);
    store(s + j * kLanes, x);
    top = max(top, x);
  }
  bool masked = false;
  for (int r = 0; r < R; ++r)
    for (int64_t j = visible[r] > 0 ? visible[r] : 0; j < keys; ++j, masked = true)
      s[j / kKeys * kLanes + r * kKeys + j % kKeys] = -INFINITY;
  if (masked) {
    top = broadcast(kNoScore);
    for (int j = 0; j < steps; ++j) top = max(top, load(s + j * kLanes));
  }

  const Vec old = load(state.max), m = max(old, across<kKeys>(top, larger));
  const Vec scale = exp2_nonpositive(old - m);
  Vec total = load(state.total) * scale;
  for (int j = 0; j < steps; ++j) {
    const Vec e = exp2_nonpositive(load(s + j * kLanes) - m);
    total = total + e;
    store_weights(p + j * kLanes, e);
  }
  store(state.max, m);
  store(state.total, total);
  alignas(64) float alpha[kLanes];
  store(alpha, scale);
  weighted_sum<R>(state.sums(), alpha, p, v, keys, d, [&] { ahead.values(); });
}

}  // namespace lf::LF_ISA
