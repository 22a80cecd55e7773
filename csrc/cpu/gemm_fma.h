// fp32 products: how FmaTask (linear_fma.h) decodes weights and what its register tiles do.
//
// A packed panel is pair rows, [K / 2][64][2], where the 2 are k and k + 1. A group of 2 * kLanes
// features at a time is decoded into a pair of vectors for k and another for k + 1. A lane is one
// output feature and one chain over k, carried in fp32 from block to block, so a result depends
// neither on the rows that share a tile nor on where K was cut.
//
// e4m3 (e4m3.h): x is multiplied by 2^kWeightShift beforehand, which changes no bit of a product.
// The exact form multiplies the weight instead, for an x too large for that. A panel that holds a
// NaN is computed again in the exact form.
#pragma once
#if defined(LF_X86)
#endif

#include "e4m3.h"
#include "simd.h"

namespace lf::LF_ISA {

inline constexpr int kPanel = 64;
inline constexpr int kPairRow = 2 * kPanel;  // elements
inline constexpr int kGroup = 2 * kLanes;    // features
inline constexpr int kGroups = kPanel / kGroup;

// kSums accumulators leave registers for a group's weights and a value of x.
#if defined(LF_AVX512)
inline constexpr int kFmaRows = 6, kSums = 24;
inline constexpr bool kFewRegisters = false;
#elif defined(LF_AVX2)
inline constexpr int kFmaRows = 6, kSums = 12;
inline constexpr bool kFewRegisters = true;
#else
inline constexpr int kFmaRows = 3, kSums = 6;
inline constexpr bool kFewRegisters = false;
#endif

inline void prefetch(const void* p) {
#if defined(LF_AVX512) || defined(LF_AVX2)
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
#else
  __builtin_prefetch(p);
#endif
}

// A group's weights: at(0) for k, at(1) for k + 1. features() restores the order of lanes.
template <class T, bool kExact>
struct Weights {
  Vec v[4];

  Weights(const T* p, Vec) {
    for (int i = 0; i < 4; ++i) v[i] = load(p + i * kLanes);
  }
  Pair at(int odd) const { return {every_second(v[0], v[1], odd), every_second(v[2], v[3], odd)}; }

  // Lanes odd, odd + 2 .. of a, then of b; with vector instructions, within each 128 bits.
  static Vec every_second(Vec a, Vec b, int odd) {
#if defined(LF_AVX512)
    return {odd ? _mm512_shuffle_ps(a.v, b.v, 0xdd) : _mm512_shuffle_ps(a.v, b.v, 0x88)};
#elif defined(LF_AVX2)
    return {odd ? _mm256_shuffle_ps(a.v, b.v, 0xdd) : _mm256_shuffle_ps(a.v, b.v, 0x88)};
#else
    if (odd) return {pick<1, 3, 5, 7>(a.lo, a.hi), pick<1, 3, 5, 7>(b.lo, b.hi)};
    return {pick<0, 2, 4, 6>(a.lo, a.hi), pick<0, 2, 4, 6>(b.lo, b.hi)};
#endif
  }
};

// A weight in a predecoded block: pair rows of [kGroups][2][kGroup].
struct Decoded {
  float value;
};
template <bool kExact>
struct Weights<Decoded, kExact> {
  const float* p;
  Weights(const Decoded* from, Vec) : p(&from->value) {}
  Pair at(int odd) const { return {load(p + odd * kGroup), load(p + odd * kGroup + kLanes)}; }
};

// Whether decoding in registers for each tile costs less than decoding once for all tiles.
template <class T, bool kExact>
constexpr bool cheap_to_decode() {
#if defined(LF_AVX512)
  return std::is_same_v<T, bf16>;
#elif defined(LF_AVX2)
  return std::is_same_v<T, bf16> || (std::is_same_v<T, e4m3> && !kExact);
#else
  return false;
#endif
}

#if defined(LF_AVX512)

template <bool kExact>
struct Weights<bf16, kExact> {
  __m512i a, b;
  Weights(const bf16* p, Vec) : a(_mm512_loadu_si512(p)), b(_mm512_loadu_si512(p + kGroup)) {}
  Pair at(int odd) const { return {at(a, odd), at(b, odd)}; }
  static Vec at(__m512i c, int odd) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm512_castsi512_ps(odd ? _mm512_and_si512(c, high) : _mm512_slli_epi32(c, 16))};
  }
};

template <bool kExact>
struct Weights<e4m3, kExact> {
  __m512i codes;
  Vec factor;
  Weights(const e4m3* p, Vec f) : codes(_mm512_loadu_si512(p)), factor(f) {}
  Pair at(int odd) const {
    const __m512i c = odd ? codes : _mm512_slli_epi16(codes, 8);
    __m512i h = _mm512_and_si512(_mm512_srai_epi16(c, 1), _mm512_set1_epi16(short(0xbf80)));
    if constexpr (kExact) {
      const __m512i twice = _mm512_slli_epi16(_mm512_srli_epi16(c, 8), 9);
      const __mmask32 nan = _mm512_cmpeq_epi16_mask(twice, _mm512_set1_epi16(short(0xfe00)));
      h = _mm512_mask_mov_epi16(h, nan, _mm512_set1_epi16(0x7e00));
    }
    const Pair w = {{_mm512_cvtph_ps(_mm512_castsi512_si256(h))},
                    {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(h, 1))}};
    return kExact ? w * factor : w;
  }
};

#elif defined(LF_AVX2)

template <bool kExact>
struct Weights<bf16, kExact> {
  __m256i a, b;
  Weights(const bf16* p, Vec) : a(load_bits(p)), b(load_bits(p + kGroup)) {}
  Pair at(int odd) const { return {half_lanes(a, odd), half_lanes(b, odd)}; }
};

template <bool kExact>
struct Weights<e4m3, kExact> {
  __m256i codes;
  Vec factor;
  Weights(const e4m3* p, Vec f) : codes(load_bits(p)), factor(f) {}
  Pair at(int odd) const {
    __m256i c = odd ? codes : _mm256_slli_epi16(codes, 8);
    __m256i h = and_memory(_mm256_srai_epi16(c, 4), kMasks.bf16_bits);
    if constexpr (kExact) {
      if (odd) c = _mm256_and_si256(c, _mm256_set1_epi16(short(0xff00)));
      const __m256i twice = _mm256_add_epi16(c, c);
      h = _mm256_or_si256(h, _mm256_cmpeq_epi16(twice, _mm256_set1_epi16(short(0xfe00))));
    }
    const Pair w = {half_lanes(h, 0), half_lanes(h, 1)};  // even features, odd features
    return kExact ? w * factor : w;
  }
};

// Four columns of a group: codes of its even features, [8][4], then of its odd features.
struct Quad {
  e4m3 code[4];
};
template <bool kExact>
struct Weights<Quad, kExact> {
  __m256i even, odd;
  Weights(const Quad* p, Vec) : even(load_bits(p)), odd(load_bits(p + kLanes)) {}
  Pair at(int k) const { return {at(even, k), at(odd, k)}; }
  static Vec at(__m256i codes, int k) {
    __m256i c = _mm256_srai_epi16(k % 2 ? codes : _mm256_slli_epi16(codes, 8), 4);
    if (k < 2) c = _mm256_slli_epi32(c, 16);
    return {
        _mm256_castsi256_ps(_mm256_and_si256(c, _mm256_set1_epi32(static_cast<int>(0x87f00000))))};
  }
};

#endif

struct FmaMath {
  static constexpr bool kUnscales = true;

  // Features i .. i + kLanes - 1 of a panel from one row's sums.
  template <class T>
  static Vec features(const float* sums, int i) {
#if defined(LF_AVX2)
    if constexpr (std::is_same_v<T, e4m3>) {
      const float* group = sums + i / kGroup * kGroup;
      const __m256 even = load(group).v, odd = load(group + kLanes).v;
      const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
      return {i % kGroup ? _mm256_permute2f128_ps(low, high, 0x31)
                         : _mm256_permute2f128_ps(low, high, 0x20)};
    }
    if constexpr (!std::is_same_v<T, bf16>)  // the order of every_second
      return {
          _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(load(sums + i).v), 0b11011000))};
#elif defined(LF_AVX512)
    if constexpr (std::is_same_v<T, f16> || std::is_same_v<T, float>)
      return {_mm512_castpd_ps(_mm512_permutexvar_pd(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7),
                                                     _mm512_castps_pd(load(sums + i).v)))};
#endif
    return load(sums + i);
  }
};

// Keeps vectors in registers at this point. GCC would otherwise move the products and spill, or
// load a weight again for every row.
inline void pin(Vec& a, Vec& b) {
#if defined(LF_AVX512)
  asm volatile("" : "+v"(a.v), "+v"(b.v));
#elif defined(LF_AVX2)
  asm volatile("" : "+x"(a.v), "+x"(b.v));
#else
  (void)a, (void)b;
#endif
}

// R rows of V vectors of a panel's sums, in registers if the loops over them are unrolled.
template <int R, int V>
struct Sums {
  Vec v[R][V];

  Sums(const float* from, bool fresh) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < V; ++i) v[r][i] = fresh ? zeros() : load(from + r * kPanel + i * kLanes);
  }
  void add(int r, int i, Pair w, Vec x) {
    Vec &a = v[r][i], &b = v[r][i + 1];
    a = fma(w.a, x, a);
    b = fma(w.b, x, b);
    pin(a, b);
  }
  void store_to(float* to) const {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < V; ++i) store(to + r * kPanel + i * kLanes, v[r][i]);
  }
};

// Groups that a tile of that many rows takes at once. With all groups it reads a block once.
constexpr int groups_at_once(int rows) {
  int groups = 1;
  while (groups < kGroups && 4 * groups * rows <= kSums) groups *= 2;
  return groups;
}

// sums [R][64] += x [2 * pairs][R] times the pair rows at w, from zero if `fresh`. Each step
// prefetches its part of a pair row, from `next` on and `stride` bytes further each time. Returns
// whether a fast form met a NaN.
template <int R, class T, bool kExact>
__attribute__((noinline)) bool fma_tile(float* sums, bool fresh, const float* x, const T* w,
                                        int64_t pairs, float factor, const char* next,
                                        int64_t stride) {
  constexpr int G = groups_at_once(R);
  constexpr int64_t kShare = kPairRow * sizeof(T) * G / kGroups;
  constexpr bool kSearch = std::is_same_v<T, e4m3> && !kExact;
  constexpr bool kFull = 2 * G * R == kSums;  // no register left
  NanSearch nan[kFull ? G : 1];
  for (int g0 = 0; g0 < kGroups; g0 += G) {
    Sums<R, 2 * G> sum(sums + g0 * kGroup, fresh);
    const T* from = w + g0 * 2 * kGroup;
    const float* at = x;
    const Vec f = broadcast(factor);
    for (int64_t p = 0; p < pairs; ++p, from += kPairRow, at += 2 * R, next += stride) {
      for (int64_t line = 0; line < kShare; line += 64) prefetch(next + line);
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) {
        if constexpr (kSearch) nan[kFull ? g : 0].template see<kFull>(from + g * 2 * kGroup);
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
          if constexpr (R > 2 && kFewRegisters)  // load again rather than keep
            asm volatile("" : "+r"(at), "+r"(from));
          Pair pair = Weights<T, kExact>(from + g * 2 * kGroup, f).at(odd);
          if constexpr (R > 1) pin(pair.a, pair.b);
#pragma GCC unroll 12
          for (int r = 0; r < R; ++r) sum.add(r, 2 * g, pair, broadcast(at[odd * R + r]));
        }
      }
    }
    sum.store_to(sums + g0 * kGroup);
  }
  bool found = false;
  for (const NanSearch& n : nan) found |= n.found();
  return found;
}

#if defined(LF_AVX2)

// One row reads every code once, so what it costs to decode shows, and the prefetch goes to L1
// alone. A load one byte earlier has the codes of k in the high bytes and saves a shift.
template <>
__attribute__((noinline)) inline bool fma_tile<1, e4m3, false>(float* sums, bool fresh,
                                                               const float* x, const e4m3* w,
                                                               int64_t pairs, float,
                                                               const char* next, int64_t stride) {
  const __m256i bits = _mm256_set1_epi16(short(0x87f0));
  const __m256i high_half = _mm256_set1_epi32(static_cast<int>(0x87f00000u));
  Sums<1, 2 * kGroups> sum(sums, fresh);
  NanSearch nan;
  const auto step = [&](auto first) __attribute__((always_inline)) {
    for (int64_t line = 0; line < kPairRow; line += 64) _mm_prefetch(next + line, _MM_HINT_NTA);
    const Vec x0 = broadcast(x[0]), x1 = broadcast(x[1]);
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      const e4m3* from = w + g * 2 * kGroup;
      const auto add = [&](__m256i codes, Vec xk) __attribute__((always_inline)) {
        const __m256i c = _mm256_srai_epi16(codes, 4);
        const __m256i even = _mm256_slli_epi32(_mm256_and_si256(c, bits), 16);
        const __m256i odd = _mm256_and_si256(c, high_half);
        add_product(sum.v[0][2 * g], {_mm256_castsi256_ps(even)}, xk);
        add_product(sum.v[0][2 * g + 1], {_mm256_castsi256_ps(odd)}, xk);
      };
      const __m256i codes = load_bits(from);
      nan.see(from);
      add(first ? _mm256_slli_epi16(codes, 8) : load_bits(&from->bits - 1), x0);
      add(codes, x1);
    }
    w += kPairRow, x += 2, next += stride;
  };
  step(std::true_type{});  // nothing may lie before the first byte
  for (int64_t p = 1; p < pairs; ++p) step(std::false_type{});
  sum.store_to(sums);
  return nan.found();
}

#endif

// Decodes the pair rows at w. Returns whether a fast form met a NaN.
template <class T, bool kExact>
__attribute__((noinline)) bool decode_block(Decoded* out, const T* w, int64_t pairs, float factor) {
  NanSearch nan;
  const Vec f = broadcast(factor);
  for (int64_t i = 0; i < pairs * kPairRow; i += 2 * kGroup) {
    if constexpr (std::is_same_v<T, e4m3> && !kExact) nan.see(w + i);
    const Weights<T, kExact> weights(w + i, f);
    for (int odd = 0; odd < 2; ++odd) {
      const Pair pair = weights.at(odd);
      store(&out[i + odd * kGroup].value, pair.a);
      store(&out[i + odd * kGroup + kLanes].value, pair.b);
    }
  }
  return nan.found();
}

}  // namespace lf::LF_ISA
