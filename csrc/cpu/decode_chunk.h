// Chunks: the elements of a key or value that decode attention loads at a time, as fp32 vectors.
//
// For fp32 products, e4m3 (e4m3.h) decodes to the value times 2^-kShift. q and p are multiplied by
// 2^kShift beforehand, which changes no bit of a product. holds_nan() looks for NaN codes; blocks
// that hold one take the exact form.
#pragma once
#include "e4m3.h"
#include "simd.h"

namespace lf::LF_ISA {

inline float power_of_two(int n) { return bits_float(static_cast<uint32_t>(127 + n) << 23); }

template <class C>
struct PlainChunk {
  static constexpr int kPairs = 1, kSize = 2 * kLanes;
  Pair p;
  explicit PlainChunk(const C* x) : p(load2(x)) {}
  PlainChunk(const C* x, int n) : p(load2_n(x, n)) {}  // the first n; the rest are zero
  Pair pair(int) const { return p; }
};
template <class C, bool kExact>
struct Chunk : PlainChunk<C> {
  using PlainChunk<C>::PlainChunk;
};

// Index in a chunk of the element at position i of its pairs, for e4m3.
inline int chunk_element(int i) {
#if defined(LF_AVX512)
  return i % 32 * 2 + i / 32;
#elif defined(LF_AVX2)
  return i % kLanes * 4 + (i / kLanes % 2) * 2 + i / (2 * kLanes);
#else
  return i;
#endif
}

#if defined(LF_AVX512)
template <bool kExact>
struct Chunk<e4m3, kExact> {
  static constexpr int kPairs = 2, kSize = 64;
  __m512i codes;
  explicit Chunk(const e4m3* x) : codes(_mm512_loadu_si512(x)) {}
  Chunk(const e4m3* x, int n) : codes(_mm512_maskz_loadu_epi8((uint64_t{1} << n) - 1, x)) {}
  Pair pair(int odd) const {
    const __m512i c = odd ? codes : _mm512_slli_epi16(codes, 8);
    __m512i h = _mm512_and_si512(_mm512_srai_epi16(c, 1), _mm512_set1_epi16(short(0xbf80)));
    if constexpr (kExact) {
      const __m512i twice = _mm512_slli_epi16(_mm512_srli_epi16(c, 8), 9);
      const __mmask32 nan = _mm512_cmpeq_epi16_mask(twice, _mm512_set1_epi16(short(0xfe00)));
      h = _mm512_mask_mov_epi16(h, nan, _mm512_set1_epi16(0x7e00));
    }
    return {{_mm512_cvtph_ps(_mm512_castsi512_si256(h))},
            {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(h, 1))}};
  }
};
#elif defined(LF_AVX2)
template <bool kExact>
struct Chunk<e4m3, kExact> {
  static constexpr int kPairs = 2, kSize = 32;
  __m256i codes;
  explicit Chunk(const e4m3* x) : codes(load_bits(x)) {}
  Chunk(const e4m3* x, int n) {
    alignas(32) e4m3 buffer[kSize] = {};
    std::memcpy(buffer, x, static_cast<size_t>(n));
    codes = load_bits(buffer);
  }
  Pair pair(int odd) const {
    __m256i c = odd ? codes : _mm256_slli_epi16(codes, 8);
    __m256i h = and_memory(_mm256_srai_epi16(c, 4), kMasks.bf16_bits);
    if constexpr (kExact) {
      c = _mm256_and_si256(c, _mm256_set1_epi16(short(0xff00)));
      const __m256i twice = _mm256_add_epi16(c, c);
      h = _mm256_or_si256(h, _mm256_cmpeq_epi16(twice, _mm256_set1_epi16(short(0xfe00))));
    }
    return {half_lanes(h, 0), half_lanes(h, 1)};
  }
};
#endif

// Index of the column at position i of the sums of e4m3 values. Q: the storage type of q and p.
template <class Q>
inline int64_t value_element(int64_t i) {
  if constexpr (std::is_same_v<Q, float>) {
    constexpr int kSize = Chunk<e4m3, false>::kSize;
    return i / kSize * kSize + chunk_element(static_cast<int>(i % kSize));
  }
  return i / 64 * 64 + i % 16 / 4 * 16 + i % 64 / 16 * 4 + i % 4;
}

// Q: the storage type of q and p.
template <class Q, class C>
inline constexpr int kShift = 0;
#if defined(LF_AVX512) || defined(LF_AVX2)
template <>
inline constexpr int kShift<float, e4m3> = kWeightShift;
#endif

// Returns whether the first d elements of n rows hold a NaN, which only the exact form keeps.
template <class Q, class C>
inline bool holds_nan([[maybe_unused]] const C* const* rows, [[maybe_unused]] int n,
                      [[maybe_unused]] int64_t d) {
  bool found = false;
  if constexpr (kShift<Q, C> != 0) {
    using Key = Chunk<C, false>;
    NanSearch nan;
    alignas(64) e4m3 tail[64] = {};
    for (int j = 0; j < n; ++j) {
      int64_t i = 0;
      for (; i + Key::kSize <= d; i += Key::kSize) nan.see(rows[j] + i);
      if (i < d) {
        std::memcpy(tail, rows[j] + i, static_cast<size_t>(d - i));
        nan.see(tail);
      }
    }
    found = nan.found();
  }
  return found;
}

}  // namespace lf::LF_ISA
