// The inner loops of decode attention: a tile of R query rows (1, 2 or 4) against a block of keys,
// read in place from the cache through one pointer per key.
//
// A vector of scores holds R rows x kLanes / R keys, row-major. Reducing kLanes accumulators into
// such a vector costs 3 instructions per accumulator, so keys need no transposing, and one load of
// a key serves R rows. bf16 multiplies with vdpbf16ps where available (it flushes denormal inputs
// and products to zero); everything else uses fp32 arithmetic.
//
// Q is the storage type of q and p, C the cache's: q's dtype, or e4m3 (decode_chunk.h). C's scales
// are the caller's: k_scale is in TileState::scale, and v_scale multiplies the result.
#pragma once
#include "attention_tile.h"
#include "decode_chunk.h"
#include "row_stream.h"

namespace lf::LF_ISA {

inline constexpr int kKeyBlock = 32;  // keys that a tile takes between two rescalings of its sums

// Storage type of q and p for queries of dtype T.
template <class T>
struct Operand {
  using type = float;
};
#if defined(LF_AVX512_BF16)
template <>
struct Operand<bf16> {
  using type = bf16;
};
#endif

// A query tile's running softmax over one chunk of keys. `sums` has R rows of padded_dim().
struct TileState {
  float max[kLanes];    // of base-2 scores; equal in every lane of a row
  float total[kLanes];  // of p; per lane until finish_tile
  float scale[kLanes];  // turns a product of q and a key, as stored, into a base-2 score
  float* sums() { return reinterpret_cast<float*>(this + 1); }

  void start(int64_t n, float log2_scale) {
    store(scale, broadcast(log2_scale));
    store(max, broadcast(-FLT_MAX));  // finite: it gets subtracted
    store(total, zeros());
    for (int64_t i = 0; i < n; i += kLanes) store(sums() + i, zeros());
  }
};

inline int64_t padded_dim(int64_t head_dim) { return (head_dim + 63) / 64 * 64; }

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
  const auto pairs = [](Vec x, Vec y) {
    return _mm256_castps_pd(
        _mm256_add_ps(_mm256_unpacklo_ps(x.v, y.v), _mm256_unpackhi_ps(x.v, y.v)));
  };
  const auto quads = [](__m256d x, __m256d y) {
    return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)),
                         _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
  };
  const __m256 lo = quads(pairs(a[0], a[1]), pairs(a[2], a[3]));
  const __m256 hi = quads(pairs(a[4], a[5]), pairs(a[6], a[7]));
  return {_mm256_add_ps(_mm256_blend_ps(lo, hi, 0xf0), _mm256_permute2f128_ps(lo, hi, 0x21))};
}

#else

template <int kDistance>
inline Vec swap_lanes(Vec a) {
  if constexpr (kDistance == 1) return swap_pairs(a);
  if constexpr (kDistance == 2) return {pick<2, 3, 0, 1>(a.lo, a.lo), pick<2, 3, 0, 1>(a.hi, a.hi)};
  if constexpr (kDistance == 4) return {a.hi, a.lo};
}
inline Vec transpose_sum(const Vec (&a)[kLanes]) {
  const auto pairs = [](Vec x, Vec y) {
    const Floats p = x.lo + x.hi, q = y.lo + y.hi;
    return pick<0, 4, 1, 5>(p, q) + pick<2, 6, 3, 7>(p, q);
  };
  const auto quads = [](Floats p, Floats q) {
    return pick<0, 1, 4, 5>(p, q) + pick<2, 3, 6, 7>(p, q);
  };
  return {quads(pairs(a[0], a[1]), pairs(a[2], a[3])), quads(pairs(a[4], a[5]), pairs(a[6], a[7]))};
}

#endif

// Reduces each aligned run of n lanes; all lanes of a run get the result.
template <int n, class Op>
inline Vec across(Vec a, Op op) {
  if constexpr (n > 1) a = op(a, swap_lanes<1>(a));
  if constexpr (n > 2) a = op(a, swap_lanes<2>(a));
  if constexpr (n > 4) a = op(a, swap_lanes<4>(a));
  if constexpr (n > 8) a = op(a, swap_lanes<8>(a));
  return a;
}

// ---- scores: q . k for R rows and kLanes / R keys ----

// q's rows are in the order of Chunk<C>. Each load of a row of q serves two keys; with more, the
// accumulators would leave no registers for q.
template <int R, bool kExact, class C>
inline Vec scores(const float* q, int64_t q_stride, const C* const* k, int64_t d) {
  using Key = Chunk<C, kExact>;
  constexpr int kKeys = kLanes / R, kTogether = kLanes == 16 && kKeys >= 4 ? 4 : kKeys >= 2 ? 2 : 1;
  Vec acc[kLanes];
  for (Vec& a : acc) a = zeros();
  const auto step = [&](int64_t i, auto load_key) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int first = 0; first < kKeys; first += kTogether)
#pragma GCC unroll 2
      for (int pair = 0; pair < Key::kPairs; ++pair) {
        Pair key[kTogether];
#pragma GCC unroll 16
        for (int j = 0; j < kTogether; ++j) key[j] = load_key(k[first + j] + i).pair(pair);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) {
            Vec* const sums = acc + r * kKeys + first;
            const Vec qv = load(q + r * q_stride + i + (2 * pair + half) * kLanes);
#pragma GCC unroll 16
            for (int j = 0; j < kTogether; ++j)
              add_product(sums[j], half ? key[j].b : key[j].a, qv);
          }
      }
  };
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + Key::kSize <= d; i += Key::kSize) step(i, [](const C* x) { return Key(x); });
  if (const int tail = static_cast<int>(d - i))
    step(i, [tail](const C* x) { return Key(x, tail); });
  return transpose_sum(acc);
}

#if defined(LF_AVX512_BF16)
template <int R, bool kExact>
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

// q's rows are in the order of decode_e4m3.
template <int R, bool kExact>
inline Vec scores(const bf16* q, int64_t q_stride, const e4m3* const* k, int64_t d) {
  constexpr int kKeys = kLanes / R, kTogether = kKeys < 4 ? kKeys : 4;
  Vec acc[kLanes];
  for (Vec& a : acc) a = zeros();
  const auto step = [&](int64_t i, auto load_key) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int first = 0; first < kKeys; first += kTogether) {
      __m512i key[kTogether][2];
#pragma GCC unroll 16
      for (int j = 0; j < kTogether; ++j) {
        __m512i codes = load_key(k[first + j] + i);
        asm("" : "+v"(codes));  // gcc would load them three times
        decode_e4m3(codes, key[j][0], key[j][1]);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m512i qv = _mm512_loadu_si512(q + r * q_stride + i + 32 * half);
#pragma GCC unroll 16
          for (int j = 0; j < kTogether; ++j) {
            Vec& sum = acc[r * kKeys + first + j];
            sum.v = _mm512_dpbf16_ps(sum.v, (__m512bh)qv, (__m512bh)key[j][half]);
          }
        }
    }
  };
  int64_t i = 0;
  for (; i + 64 <= d; i += 64) step(i, [](const e4m3* x) { return _mm512_loadu_si512(x); });
  if (i < d) {
    const __mmask64 valid = (uint64_t{1} << (d - i)) - 1;
    step(i, [valid](const e4m3* x) { return _mm512_maskz_loadu_epi8(valid, x); });
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

// Keys per run of such passes. Rows a power of two apart share few sets of L1: 16 of them fit when
// each line takes two passes.
inline constexpr int kValueKeys = kLanes == 16 ? kKeyBlock : 16;
// Pairs of columns per pass over the keys: R * 2 * kPairs sums fit the registers. Without vector
// instructions a Vec is two of SSE's 16: more than one pair spilled, 1.6 times the time at one row.
template <int R>
#if defined(LF_AVX512)
inline constexpr int kPairs = 2;
#elif defined(LF_AVX2)
inline constexpr int kPairs = 4 / R;
#else
inline constexpr int kPairs = 1;
#endif
inline constexpr int kAheadKeys = kLanes == 16 ? 4 : 8;  // per call of ahead.advance()
template <int R, class Q>
inline int64_t value_advances(int64_t keys, int64_t d) {
  constexpr int columns = std::is_same_v<Q, bf16> ? 64 : 2 * kLanes * kPairs<R>;
  return (d + columns - 1) / columns * ((keys + kAheadKeys - 1) / kAheadKeys);
}

// Adds kPairs pairs of columns to the sums from i on. load_value(row, c) returns pair c of a row.
template <int R, int kPairs, class C, class Load>
inline void weighted_columns(float* sums, const float* alpha, int64_t stride, const float* p,
                             const C* const* v, RowStream& ahead, int keys, int64_t i,
                             Load load_value) {
  constexpr int kKeys = kLanes / R, kVecs = 2 * kPairs;
  Vec acc[R][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < kVecs; ++c)
      acc[r][c] = load(sums + r * stride + i + c * kLanes) * broadcast(alpha[r * kKeys]);
  for (int j = 0; j < keys; j += kKeys, p += kLanes) {
#pragma GCC unroll 2
    for (int u = 0; u < kKeys; ++u) {
      if (u % 2 == 0 && (j + u) % kAheadKeys == 0) ahead.advance();
      Pair value[kPairs];
#pragma GCC unroll 16
      for (int c = 0; c < kPairs; ++c) value[c] = load_value(v[j + u], c);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec weight = broadcast(p[r * kKeys + u]);
#pragma GCC unroll 16
        for (int c = 0; c < kPairs; ++c) {
          add_product(acc[r][2 * c], value[c].a, weight);
          add_product(acc[r][2 * c + 1], value[c].b, weight);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < kVecs; ++c) store(sums + r * stride + i + c * kLanes, acc[r][c]);
}

template <int R, bool kExact, class C>
inline void weighted_sum(float* sums, const float* alpha, const float* p, const C* const* v,
                         RowStream& ahead, int keys, int64_t d) {
  using Value = Chunk<C, kExact>;
  constexpr int kChunks = kPairs<R> / Value::kPairs;  // of a pass; 0: half a chunk
  const int64_t stride = padded_dim(d);
  int64_t i = 0;
  if constexpr (kChunks > 1)
    for (; i + kChunks * Value::kSize <= d; i += kChunks * Value::kSize)
      weighted_columns<R, kPairs<R>>(
          sums, alpha, stride, p, v, ahead, keys, i, [i](const C* row, int c) {
            return Value(row + i + c / Value::kPairs * Value::kSize).pair(c % Value::kPairs);
          });
  const auto chunk = [&](auto load_chunk) __attribute__((always_inline)) {
    if constexpr (kChunks > 0)
      weighted_columns<R, Value::kPairs>(
          sums, alpha, stride, p, v, ahead, keys, i,
          [load_chunk](const C* row, int c) { return load_chunk(row).pair(c); });
    else {
      weighted_columns<R, 1>(sums, alpha, stride, p, v, ahead, keys, i,
                             [load_chunk](const C* row, int) { return load_chunk(row).pair(0); });
      weighted_columns<R, 1>(sums, alpha, stride, p, v, ahead, keys, i + 2 * kLanes,
                             [load_chunk](const C* row, int) { return load_chunk(row).pair(1); });
    }
  };
  for (; i + Value::kSize <= d; i += Value::kSize)
    chunk([i](const C* row) { return Value(row + i); });
  if (const int n = static_cast<int>(d - i))
    chunk([i, n](const C* row) { return Value(row + i, n); });
}
// Leaves the sums in the order of Chunk<C>.
template <class Q, class C>
inline void finish_sums(float*, int64_t, const Q*, const C*) {}

#if defined(LF_AVX512_BF16)
// Takes two keys at a time: unpacks within 128-bit lanes interleave their values into the pairs
// that vdpbf16ps needs. The sums of 32 columns are thus in the order 0-3 8-11 16-19 24-27 | 4-7
// 12-15 ... until finish_sums puts the even ones before the odd ones.
template <int R, int kVecs>
inline void weighted_columns(float* sums, const float* alpha, int64_t stride, const bf16* p,
                             const bf16* const* v, RowStream& ahead, int keys, int64_t i,
                             __mmask32 valid) {
  constexpr int kKeys = kLanes / R;
  Vec acc[R][2 * kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < 2 * kVecs; ++c)
      acc[r][c] = load(sums + r * stride + i + c * kLanes) * broadcast(alpha[r * kKeys]);
  for (int j = 0; j < keys; j += kKeys, p += kLanes) {
#pragma GCC unroll 2
    for (int u = 0; u < kKeys; u += 2) {
      if (u % kAheadKeys == 0) ahead.advance();
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

template <int R, bool kExact>
inline void weighted_sum(float* sums, const float* alpha, const bf16* p, const bf16* const* v,
                         RowStream& ahead, int keys, int64_t d) {
  const int64_t stride = padded_dim(d);
  constexpr __mmask32 kAll = ~0u;
  int64_t i = 0;
  for (; i + 64 <= d; i += 64)
    weighted_columns<R, 2>(sums, alpha, stride, p, v, ahead, keys, i, kAll);
  for (; i < d; i += 32)
    weighted_columns<R, 1>(sums, alpha, stride, p, v, ahead, keys, i,
                           d - i < 32 ? (1u << (d - i)) - 1u : kAll);
}
inline void finish_sums(float* sums, int64_t n, const bf16*, const bf16*) {
  const __m512i first =
      _mm512_setr_epi32(0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(1));
  for (int64_t i = 0; i < n; i += 32) {
    const __m512 lo = load(sums + i).v, hi = load(sums + i + 16).v;
    store(sums + i, {_mm512_permutex2var_ps(lo, first, hi)});
    store(sums + i + 16, {_mm512_permutex2var_ps(lo, second, hi)});
  }
}

// As for bf16, with the codes of two keys interleaved before they are decoded. The sums of 64
// columns are in the order of value_element.
template <int R, bool kExact>
inline void weighted_sum(float* sums, const float* alpha, const bf16* p, const e4m3* const* v,
                         RowStream& ahead, int keys, int64_t d) {
  constexpr int kKeys = kLanes / R;
  const int64_t stride = padded_dim(d);
  for (int64_t i = 0; i < d; i += 64, sums += 64) {
    const __mmask64 valid = d - i < 64 ? (uint64_t{1} << (d - i)) - 1 : ~uint64_t{0};
    const bf16* weight = p;
    Vec acc[R][4];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < 4; ++c)
        acc[r][c] = load(sums + r * stride + c * kLanes) * broadcast(alpha[r * kKeys]);
    for (int j = 0; j < keys; j += kKeys, weight += kLanes) {
#pragma GCC unroll 2
      for (int u = 0; u < kKeys; u += 2) {
        if (u % kAheadKeys == 0) ahead.advance();
        const __m512i a = _mm512_maskz_loadu_epi8(valid, v[j + u] + i);
        const __m512i b = _mm512_maskz_loadu_epi8(valid, v[j + u + 1] + i);
        __m512i pair[4];
        decode_e4m3(_mm512_unpacklo_epi8(a, b), pair[0], pair[1]);
        decode_e4m3(_mm512_unpackhi_epi8(a, b), pair[2], pair[3]);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          int32_t weights;
          std::memcpy(&weights, weight + r * kKeys + u, 4);
          const __m512bh w = (__m512bh)_mm512_set1_epi32(weights);
#pragma GCC unroll 16
          for (int c = 0; c < 4; ++c)
            acc[r][c].v = _mm512_dpbf16_ps(acc[r][c].v, w, (__m512bh)pair[c]);
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < 4; ++c) store(sums + r * stride + c * kLanes, acc[r][c]);
  }
}
#endif

// ---- a block of keys ----

// Adds n keys, all seen by all R rows, to the tile's state. Up to the next multiple of kLanes / R
// past n, k and v must point at readable rows, and v's must be finite.
// kExact: their codes may be NaN (see Chunk).
template <int R, bool kExact, class Q, class C>
__attribute__((noinline)) void attend_block(TileState& state, const Q* q, int64_t q_stride,
                                            const C* const* k, const C* const* v, int n, int64_t d,
                                            RowStream& keys_ahead, RowStream& values_ahead) {
  constexpr int kKeys = kLanes / R;
  constexpr auto larger = [](Vec a, Vec b) { return max(a, b); };
  alignas(64) float s[kKeyBlock * R];
  alignas(64) Q p[kKeyBlock * R];
  constexpr bool short_exp = std::is_same_v<Q, bf16>;  // p is rounded to 8 bits
  const Vec log2_scale = load(state.scale);
  const int steps = (n + kKeys - 1) / kKeys;

  Vec top = broadcast(-FLT_MAX);
  for (int j = 0; j < steps; ++j) {
    keys_ahead.advance();
    Vec x = scores<R, kExact>(q, q_stride, k + j * kKeys, d) * log2_scale;
    store(s + j * kLanes, x);
    if (n - j * kKeys < kKeys) {
      for (int i = 0; i < kLanes; ++i)
        if (j * kKeys + i % kKeys >= n) s[j * kLanes + i] = -INFINITY;
      x = load(s + j * kLanes);
    }
    top = max(top, x);
  }

  const Vec old = load(state.max), m = max(old, across<kKeys>(top, larger));
  const Vec shrink = exp2_nonpositive<false>(old - m);
  Vec total = load(state.total) * shrink;
  for (int j = 0; j < steps; ++j) {
    const Vec e = exp2_nonpositive<short_exp>(load(s + j * kLanes) - m);
    total = total + e;
    store_weights(p + j * kLanes, kShift<Q, C> ? e * broadcast(power_of_two(kShift<Q, C>)) : e);
  }
  store(state.max, m);
  store(state.total, total);
  alignas(64) float factor[kLanes];
  store(factor, shrink);
  for (int j = 0; j < steps * kKeys; j += kValueKeys) {
    if (j) store(factor, broadcast(1.0f));
    const int keys = steps * kKeys - j < kValueKeys ? steps * kKeys - j : kValueKeys;
    weighted_sum<R, kExact>(state.sums(), factor, p + j * R, v + j, values_ahead, keys, d);
  }
}

template <int R, class Q, class C>
inline void finish_tile(TileState& state, int64_t stride) {
  store(state.total, across<kLanes / R>(load(state.total), [](Vec a, Vec b) { return a + b; }));
  finish_sums(state.sums(), R * stride, static_cast<const Q*>(nullptr),
              static_cast<const C*>(nullptr));
}

}  // namespace lf::LF_ISA
