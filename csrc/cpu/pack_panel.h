// Packs 64 rows of a plain [N, K] weight into a panel: [K / 2][64][2].
#pragma once
#include "gemm_fma.h"

namespace lf::LF_ISA {

// Packing moves pairs of elements: 2, 4 or 8 bytes.
template <class T>
struct RowPair {
  T k[2];
};

template <class T>
inline constexpr int kPairsPerLine = 64 / sizeof(RowPair<T>);

// 64 rows at once are more streams than the hardware prefetcher follows, and rows a power of two
// apart share a set of L1. On one Zen 4 core: 11 GB/s with a prefetch into L1, 23 into L2.
inline void prefetch_row(const void* p) {
  constexpr int64_t kAheadInRow = 256;  // bytes
  __builtin_prefetch(static_cast<const char*>(p) + kAheadInRow, 0, 2);
}

#if defined(LF_AVX512) || defined(LF_AVX2)

#if defined(LF_AVX512)
using Bytes = __m512i;
inline Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
template <size_t kSize>
inline void interleave(Bytes a, Bytes b, Bytes& low, Bytes& high) {
  if constexpr (kSize == 2) low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
  if constexpr (kSize == 4) low = _mm512_unpacklo_epi32(a, b), high = _mm512_unpackhi_epi32(a, b);
  if constexpr (kSize == 8) low = _mm512_unpacklo_epi64(a, b), high = _mm512_unpackhi_epi64(a, b);
}
template <int kLane>
inline void store_lane(void* p, Bytes a) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_extracti32x4_epi32(a, kLane));
}
#else
using Bytes = __m256i;
inline Bytes load_bytes(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
template <size_t kSize>
inline void interleave(Bytes a, Bytes b, Bytes& low, Bytes& high) {
  if constexpr (kSize == 2) low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
  if constexpr (kSize == 4) low = _mm256_unpacklo_epi32(a, b), high = _mm256_unpackhi_epi32(a, b);
  if constexpr (kSize == 8) low = _mm256_unpacklo_epi64(a, b), high = _mm256_unpackhi_epi64(a, b);
}
template <int kLane>
inline void store_lane(void* p, Bytes a) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_extracti128_si256(a, kLane));
}
#endif

// Transposes a cache line of each of 64 rows in one go, since L1 may not keep the lines. Within 128
// bits it is a square transpose: interleaving rows i and i + half rotates an element's (row,
// column) address by one bit, so log2(side) rounds swap the two.
template <class T>
void transpose_columns(RowPair<T>* out, const T* const* rows, int64_t k) {
  constexpr int kSide = 16 / sizeof(RowPair<T>), kPairs = sizeof(Bytes) / sizeof(RowPair<T>);
  for (int row = 0; row < kPanel; row += kSide) {
    for (int i = 0; i < kSide; ++i) prefetch_row(rows[row + i] + k);
    for (int pair = 0; pair < kPairsPerLine<T>; pair += kPairs) {
      Bytes r[kSide], next[kSide];
      for (int i = 0; i < kSide; ++i) r[i] = load_bytes(rows[row + i] + k + 2 * pair);
      for (int round = 1; round < kSide; round *= 2) {
        for (int i = 0; i < kSide / 2; ++i)
          interleave<sizeof(RowPair<T>)>(r[i], r[i + kSide / 2], next[2 * i], next[2 * i + 1]);
        for (int i = 0; i < kSide; ++i) r[i] = next[i];
      }
      for (int i = 0; i < kSide; ++i) {
        RowPair<T>* to = out + (pair + i) * kPanel + row;
        store_lane<0>(to, r[i]);
        store_lane<1>(to + kSide * kPanel, r[i]);
#if defined(LF_AVX512)
        store_lane<2>(to + 2 * kSide * kPanel, r[i]);
        store_lane<3>(to + 3 * kSide * kPanel, r[i]);
#endif
      }
    }
  }
}

#else

template <class T>
void transpose_columns(RowPair<T>* out, const T* const* rows, int64_t k) {
  for (int n = 0; n < kPanel; ++n) {
    prefetch_row(rows[n] + k);
    for (int p = 0; p < kPairsPerLine<T>; ++p)
      std::memcpy(out + p * kPanel + n, rows[n] + k + 2 * p, sizeof(RowPair<T>));
  }
}

#endif

#if defined(LF_AVX2)

// For one row of x and a plain e4m3 weight, kQuadColumns of a panel at a time become quads in L1, a
// third less work than pair rows. Even features of a group come first, as FmaMath expects.
inline constexpr int kQuadColumns = 256;

// Offset of each row in that order from the panel's first, in elements.
struct QuadRows {
  int64_t offset[kPanel];
  QuadRows(int64_t features, int64_t stride) {
    for (int i = 0; i < kPanel; ++i) {
      const int64_t feature = i / kGroup * kGroup + 2 * (i % kLanes) + i % kGroup / kLanes;
      offset[i] = (feature < features ? feature : features - 1) * stride;
    }
  }
};

// Fills out [kQuadColumns / 4][64] from the columns at `weight`, a line of eight rows at a time:
// the rows of most weights share a set of L1, which holds eight.
inline void pack_quads(Quad* out, const e4m3* weight, const QuadRows& rows) {
  for (int row = 0; row < kPanel; row += kLanes)
    for (int line = 0; line < kQuadColumns; line += 64)
#pragma GCC unroll 4
      for (int k = line; k < line + 64; k += 16) {
        Bytes r[4], a, b, c, d;
        const auto load = [&](int i) {
          const e4m3* p = weight + rows.offset[row + i] + k;
          return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        };
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          r[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(load(i)), load(i + 4), 1);
        interleave<4>(r[0], r[1], a, b);
        interleave<4>(r[2], r[3], c, d);
        interleave<8>(a, c, r[0], r[1]);
        interleave<8>(b, d, r[2], r[3]);
        Quad* to = out + k / 4 * kPanel + row;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          _mm256_store_si256(reinterpret_cast<Bytes*>(to + i * kPanel), r[i]);
      }
}

// fma_tile for one row of x and those quads, in the same order. Each step prefetches a row of the
// kQuadColumns at `next`: the hardware prefetcher does not follow 64 rows.
__attribute__((noinline)) inline bool fma_quads(float* sums, bool fresh, const float* x,
                                                const Quad* quads, const e4m3* next,
                                                const QuadRows& rows) {
  static_assert(kQuadColumns / 4 == kPanel, "a row to a step");
  NanSearch nan;
  Sums<1, 2 * kGroups> sum(sums, fresh);
  for (int step = 0; step < kPanel; ++step, x += 4, quads += kPanel) {
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      nan.see(quads + g * kGroup);
      nan.see(quads + g * kGroup + kLanes);
      asm volatile("" : "+r"(x));  // load x again rather than spill sums
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k)
        sum.add(0, 2 * g, Weights<Quad, false>(quads + g * kGroup, zeros()).at(k), broadcast(x[k]));
    }
    const e4m3* row = next + rows.offset[step];
#pragma GCC unroll 4
    for (int line = 0; line < kQuadColumns; line += 64) __builtin_prefetch(row + line, 0, 2);
  }
  sum.store_to(sums);
  return nan.found();
}

#endif

// Fills out [ceil(k / 2)][64][2] from `n` <= 64 rows of k elements. Features past n repeat the last
// row (their sums are never stored); an odd k is padded with a zero.
template <class T>
void pack_panel(T* out, const T* weight, int64_t stride, int64_t n, int64_t k) {
  constexpr int kStep = 2 * kPairsPerLine<T>;
  RowPair<T>* to = reinterpret_cast<RowPair<T>*>(out);
  const T* rows[kPanel];
  for (int64_t i = 0; i < kPanel; ++i) rows[i] = weight + (i < n ? i : n - 1) * stride;
  int64_t done = 0;
  for (; done + kStep <= k; done += kStep) {
    transpose_columns(to + done / 2 * kPanel, rows, done);
  }
  for (; done < k; done += 2)
    for (int i = 0; i < kPanel; ++i)
      to[done / 2 * kPanel + i] = {rows[i][done], done + 1 < k ? rows[i][done + 1] : T{}};
}

}  // namespace lf::LF_ISA
