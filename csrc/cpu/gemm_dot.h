// bf16 products: the inner loops of DotTask (linear_dot.h). vdpbf16ps multiplies pairs of bf16,
// which represents e4m3 exactly, subnormals included. Products are exact, sums are fp32. The
// instruction reads bf16 subnormals (below 1.2e-38) as zero. Panels have gemm_fma.h's layout.
#pragma once
#include "gemm_fma.h"

namespace lf::LF_ISA {

inline constexpr int kTileRows = 6;  // rows of x that share one load of the weights

struct DotMath {
  static constexpr bool kUnscales = false;
  static constexpr int kVectors = 4;

  static void load_weights(__m512i (&w)[4], const e4m3* pair_row) {
    decode_e4m3(_mm512_loadu_si512(pair_row), w[0], w[1]);
    decode_e4m3(_mm512_loadu_si512(pair_row + 64), w[2], w[3]);
  }
  static void load_weights(__m512i (&w)[4], const bf16* pair_row) {
    for (int v = 0; v < 4; ++v) w[v] = _mm512_loadu_si512(pair_row + 32 * v);
  }
  static __m512i load_x(const bf16* pair) {
    int bits;
    std::memcpy(&bits, pair, 4);
    return _mm512_set1_epi32(bits);
  }
  static Vec madd(__m512i w, __m512i x, Vec acc) {
    return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x))};
  }

  static void store_decoded(bf16* out, const e4m3* pair_row) {
    __m512i w[4];
    load_weights(w, pair_row);
    for (int v = 0; v < 4; ++v) _mm512_store_si512(out + 32 * v, w[v]);
  }

  // 64 codes are 32 features, which decode_e4m3 leaves in another order: restored once per sum
  // instead of once per k.
  template <class T>
  static Vec features(const float* acc, int i) {
    if constexpr (std::is_same_v<T, bf16>) return load(acc + i);
    const int half = i & 16, base = i & 32;
    const __m512i order =
        _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23),
                         _mm512_set1_epi32(half / 2));
    return {_mm512_permutex2var_ps(load(acc + base).v, order, load(acc + base + 16).v)};
  }
};

// acc [R][64] += x [R, 2 * pairs] @ w^T, starting from zero if `fresh`. Each pair row read
// prefetches the one `ahead` bytes further on.
template <int R, class T>
void accumulate(float* acc, bool fresh, const bf16* x, int64_t x_stride, const T* w, int64_t pairs,
                int64_t ahead) {
  constexpr int V = DotMath::kVectors;
  Sums<R, V> sum(acc, fresh);
  for (int64_t p = 0; p < pairs; ++p) {
    for (size_t line = 0; line < kPairRow * sizeof(T); line += 64)
      prefetch(reinterpret_cast<const char*>(w + p * kPairRow) + line + ahead);
    __m512i weights[V];
    DotMath::load_weights(weights, w + p * kPairRow);
    for (int r = 0; r < R; ++r) {
      const __m512i pair = DotMath::load_x(x + r * x_stride + 2 * p);
      for (int v = 0; v < V; ++v) sum.v[r][v] = DotMath::madd(weights[v], pair, sum.v[r][v]);
    }
  }
  sum.store_to(acc);
}

// The same for P whole panels of `pairs` pair rows each, contiguous in memory and read side by
// side. With one or two rows only the weight's bytes matter: four streams reach 0.92 of the read
// bandwidth, one reaches 0.85 (M = 1, two Zen 4 cores). Software prefetching gains nothing more.
template <int P, int R, class T>
void accumulate_panels(float* acc, const bf16* x, int64_t x_stride, const T* w, int64_t pairs) {
  constexpr int V = DotMath::kVectors;
  Vec sum[P][R][V];
  for (int s = 0; s < P; ++s)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[s][r][v] = zeros();
  for (int64_t p = 0; p < pairs; ++p)
    for (int s = 0; s < P; ++s) {
      __m512i weights[V];
      DotMath::load_weights(weights, w + (s * pairs + p) * kPairRow);
      for (int r = 0; r < R; ++r) {
        const __m512i pair = DotMath::load_x(x + r * x_stride + 2 * p);
        for (int v = 0; v < V; ++v) sum[s][r][v] = DotMath::madd(weights[v], pair, sum[s][r][v]);
      }
    }
  for (int s = 0; s < P; ++s)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) store(acc + (s * R + r) * kPanel + v * kLanes, sum[s][r][v]);
}

}  // namespace lf::LF_ISA
