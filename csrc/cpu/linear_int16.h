// fp8_linear by integer products, for many rows on AVX2: both operands are rounded to 13 bits and a
// sign. The result is not exact, so the caller must choose it (LLAMA_FAST_CPU_INT16).
//
// vpmaddwd multiplies and adds twice as many products as an FMA. 64 columns share a
// scale. x, by row, is rounded to at most kMostX; the weight, by feature, to a multiple of a power
// of two that leaves its largest magnitude 12 bits. 64 products then fit 32 bits, exactly; the sums
// are scaled and added up in fp32, in order. So a row's bits depend neither on other rows, nor on
// threads, nor on the weight's layout.
//
// Error: half a step of each operand, relative to the largest of the 64: 1.1e-4 of x, 1.2e-4 or
// less of the weight, against e4m3's own 6e-2. Rows with an infinity, a NaN or magnitudes whose
// scale does not fit fp32 are computed exactly instead. A NaN code of the weight makes its
// feature's scale NaN.
#pragma once
#if defined(LF_AVX2)
#include <algorithm>
#include <vector>

#include "linear_fma.h"

namespace lf::LF_ISA {

inline constexpr int64_t kChunk = 64;       // columns that share a scale
inline constexpr int64_t kInt16Rows = 512;  // rows of x per pass over the weight
inline constexpr float kMostX = 4369;       // times 15 * 2^9 times 64 < 2^31
inline constexpr float kSmallest = 0x1p-100f, kLargest = 0x1p100f;  // amax of 64 values of x

// How rows and columns are split, which sets the layout of x: [share][k block][tile][pair][tile's
// rows] pairs of int16, and of its scales: [share][chunk][share's rows].
struct Int16Plan {
  int64_t k, block, pairs, chunks;
  explicit Int16Plan(const LinearParams& p)
      : k(p.k),
        block(promotes(p) ? kScaleBlock : 2 * kScaleBlock),  // 16 features of the weight in L1
        pairs((p.k + 1) / 2),
        chunks((p.k + kChunk - 1) / kChunk) {}
};

// Rounds one row of x into its tile. Returns false if it must be computed exactly.
template <class S>
bool round_row(const Int16Plan& plan, int32_t* out, float* scales, int64_t share_rows, int64_t row,
               const S* x) {
  const int64_t tile = [&] {
    int64_t t = row * FmaPlan::tiles(share_rows) / share_rows;
    while (FmaPlan::tile_begin(share_rows, t + 1) <= row) ++t;
    return t;
  }();
  const int64_t begin = FmaPlan::tile_begin(share_rows, tile);
  const int64_t rows = FmaPlan::tile_begin(share_rows, tile + 1) - begin;
  bool fits = true;
  Vec check = zeros();  // becomes NaN if an element is not finite
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const int64_t k0 = chunk * kChunk, n = plan.k - k0 < kChunk ? plan.k - k0 : kChunk;
    Vec v[kChunk / kLanes], most = zeros();
    for (int i = 0; i < kChunk / kLanes; ++i) {
      const int lanes = n > i * kLanes ? lanes_left(n - i * kLanes) : 0;
      v[i] = lanes == kLanes ? load(x + k0 + i * kLanes)
             : lanes         ? load_n(x + k0 + i * kLanes, lanes)
                             : zeros();
      most = max(abs(v[i]), most);
      check = fma(v[i], zeros(), check);
    }
    const float amax = reduce_max(most), inverse = amax > 0.0f ? kMostX / amax : 0.0f;
    fits &= amax == 0.0f || (amax >= kSmallest && amax <= kLargest);
    scales[chunk * share_rows + row] = amax / kMostX;
    alignas(32) int32_t rounded[kChunk / 2];
    for (int i = 0; i < kChunk / kLanes; i += 2) {
      const __m256i a = _mm256_cvtps_epi32((v[i] * broadcast(inverse)).v);
      const __m256i b = _mm256_cvtps_epi32((v[i + 1] * broadcast(inverse)).v);
      const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0b11011000);
      _mm256_store_si256(reinterpret_cast<__m256i*>(rounded + i * kLanes / 2), both);
    }
    const int64_t first = k0 / plan.block * plan.block;  // of the block
    const int64_t in_block = ((plan.k - first < plan.block ? plan.k - first : plan.block) + 1) / 2;
    int32_t* to = out + first / 2 * share_rows + begin * in_block + (k0 - first) / 2 * rows;
    for (int64_t pair = 0; pair < (n + 1) / 2; ++pair)
      to[pair * rows + row - begin] = rounded[pair];
  }
  return fits && reduce_add(check) == 0.0f;
}

// Rounds 16 features of `pairs` pair rows to out [pairs][16] pairs of int16, and writes what to
// multiply by for each chunk: scales [chunks][16]. Even features come first, as FmaMath expects.
inline void round_weights(int32_t* out, float* scales, const e4m3* w, int64_t pairs,
                          int64_t ahead) {
  const auto bytes = [](int value) { return _mm256_set1_epi8(static_cast<char>(value)); };
  const auto table = [](auto entry) {
    alignas(16) char values[16];
    for (int e = 0; e < 16; ++e) values[e] = static_cast<char>(entry(e));
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(values)));
  };
  // By exponent: the mantissa's implicit bit, and both bytes of 2^(e - 1), where 0 counts as 1.
  const __m256i implicit = table([](int e) { return e ? 8 : 0; });
  const __m256i power_low = table([](int e) { return 1 << (e ? e - 1 : 0) & 0xff; });
  const __m256i power_high = table([](int e) { return 1 << (e ? e - 1 : 0) >> 8; });
  const __m256i low = _mm256_set1_epi16(0xff);
  const auto exponents = [&](__m256i codes) {
    return _mm256_and_si256(_mm256_srli_epi16(codes, 3), bytes(15));
  };
  const auto store_bits = [](void* to, __m256i a) {
    _mm256_store_si256(static_cast<__m256i*>(to), a);
  };
  for (int64_t first = 0; first < pairs; first += kChunk / 2, scales += kGroup) {
    const int64_t end = first + kChunk / 2 < pairs ? first + kChunk / 2 : pairs;
    __m256i most = _mm256_setzero_si256();
    for (int64_t pair = first; pair < end; ++pair) {
      const e4m3* from = w + pair * kPairRow;
      __builtin_prefetch(from + ahead, 0, 2);
      most = _mm256_max_epu8(most, _mm256_and_si256(load_bits(from), bytes(0x7f)));
    }
    most = _mm256_and_si256(_mm256_max_epu8(most, _mm256_srli_epi16(most, 8)), low);
    const __m256i nan = _mm256_cmpeq_epi16(most, _mm256_set1_epi16(0x7f));
    const __m256i top = _mm256_max_epi16(_mm256_srli_epi16(most, 3), _mm256_set1_epi16(1));
    // A weight is its int16 times 2^(top - 19).
    const auto scale = [&](__m256i top32, __m256i nan32) {
      const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(top32, _mm256_set1_epi32(108)), 23);
      return _mm256_or_si256(bits, nan32);
    };
    const __m256i high = _mm256_srli_epi32(top, 16), quiet = _mm256_set1_epi32(0x7fc00000);
    store_bits(scales,
               scale(_mm256_and_si256(top, _mm256_set1_epi32(0xffff)),
                     _mm256_and_si256(_mm256_srai_epi32(_mm256_slli_epi32(nan, 16), 16), quiet)));
    store_bits(scales + kLanes, scale(high, _mm256_and_si256(_mm256_srai_epi32(nan, 16), quiet)));
    // 2^(15 - top), as the difference of 2^15's exponent: top is at least 1.
    const __m256i distance = _mm256_sub_epi16(_mm256_set1_epi16(16), top);  // 1 .. 15
    const __m256i index = _mm256_or_si256(distance, _mm256_slli_epi16(distance, 8));
    const __m256i shrink =
        _mm256_or_si256(_mm256_and_si256(_mm256_shuffle_epi8(power_low, index), low),
                        _mm256_andnot_si256(low, _mm256_shuffle_epi8(power_high, index)));
    for (int64_t pair = first; pair < end; ++pair, out += kGroup) {
      const __m256i codes = load_bits(w + pair * kPairRow), e = exponents(codes);
      const __m256i mantissa =
          _mm256_or_si256(_mm256_and_si256(codes, bytes(7)), _mm256_shuffle_epi8(implicit, e));
      const __m256i p_low = _mm256_shuffle_epi8(power_low, e);
      const __m256i p_high = _mm256_shuffle_epi8(power_high, e);
      // mantissa * 2^10 * 2^(e - 1 + 15 - top) * 2^-15, rounded half away from zero.
      const auto rounded = [&](__m256i mantissa16, __m256i power, __m256i sign) {
        const __m256i factor = _mm256_mullo_epi16(power, shrink);
        return _mm256_sign_epi16(_mm256_mulhrs_epi16(_mm256_slli_epi16(mantissa16, 10), factor),
                                 sign);
      };
      const __m256i even_k =
          rounded(_mm256_and_si256(mantissa, low),
                  _mm256_or_si256(_mm256_and_si256(p_low, low), _mm256_slli_epi16(p_high, 8)),
                  _mm256_slli_epi16(codes, 8));
      const __m256i odd_k = rounded(
          _mm256_srli_epi16(mantissa, 8),
          _mm256_or_si256(_mm256_srli_epi16(p_low, 8), _mm256_andnot_si256(low, p_high)), codes);
      store_bits(out, _mm256_blend_epi16(even_k, _mm256_slli_epi32(odd_k, 16), 0xaa));
      store_bits(out + kLanes, _mm256_blend_epi16(_mm256_srli_epi32(even_k, 16), odd_k, 0xaa));
    }
  }
}

// One piece: GCC would move the products and spill sums, or copy these. 1.07 times the time.
inline void add_products(__m256i (&sums)[2], __m256i x, __m256i a, __m256i b) {
  __m256i product;
  asm volatile(
      "vpmaddwd %4, %2, %3\n\tvpmaddwd %5, %2, %2\n\tvpaddd %3, %0, %0\n\tvpaddd %2, %1, %1"
      : "+x"(sums[0]), "+x"(sums[1]), "+x"(x), "=&x"(product)
      : "x"(a), "x"(b));
}

// sums [R][64] += x [pairs][R] times w [pairs][16], from zero if `fresh`. Scales of x are
// `x_stride` apart from chunk to chunk.
template <int R>
__attribute__((noinline)) void int16_tile(float* sums, bool fresh, const int32_t* x,
                                          const float* x_scales, int64_t x_stride, const int32_t* w,
                                          const float* w_scales, int64_t pairs) {
  for (; pairs > 0; pairs -= kChunk / 2, x_scales += x_stride, w_scales += kGroup, fresh = false) {
    __m256i acc[R][2];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
    for (int64_t p = pairs < kChunk / 2 ? pairs : kChunk / 2; p > 0; --p, x += R, w += kGroup) {
      const __m256i a = load_bits(w), b = load_bits(w + kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        add_products(acc[r], _mm256_set1_epi32(x[r]), a, b);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        float* to = sums + r * kPanel + i * kLanes;
        const Vec scale = load(w_scales + i * kLanes) * broadcast(x_scales[r]);
        store(to, fma({_mm256_cvtepi32_ps(acc[r][i])}, scale, fresh ? zeros() : load(to)));
      }
  }
}

// One panel for a share's rows.
inline void int16_panel(const LinearParams& p, const Int16Plan& plan, const int32_t* x,
                        const float* x_scales, int64_t m0, int64_t rows, int64_t panel) {
  static constexpr decltype(&int16_tile<1>) kTiles[] = {
      int16_tile<1>, int16_tile<2>, int16_tile<3>, int16_tile<4>, int16_tile<5>, int16_tile<6>};
  Workspace& work = workspace();
  float* scales = work.scale.get<float>(static_cast<size_t>(scale_floats(p)));
  weight_scales(p, panel, scales);
  const auto floats = static_cast<size_t>(rows * kPanel);
  float* totals = promotes(p) ? work.total.get<float>(floats) : nullptr;
  float* sums = work.acc.get<float>(floats);
  Epilogue<FmaMath, e4m3> epilogue(p, m0, panel, scales, totals);
  const int64_t most = plan.block / 2;
  int32_t* w = work.decoded.get<int32_t>(static_cast<size_t>(most * kGroup + plan.block));
  float* w_scales = reinterpret_cast<float*>(w + most * kGroup);
  for (int64_t k0 = 0; k0 < p.k; k0 += plan.block) {
    const int64_t k1 = k0 + plan.block < p.k ? k0 + plan.block : p.k, pairs = (k1 - k0 + 1) / 2;
    const e4m3* codes = pair_rows<e4m3>(p, panel, k0, k1);
    const int32_t* at = x + k0 / 2 * rows;
    const float* at_scales = x_scales + k0 / kChunk * rows;
    for (int g = 0; g < kGroups; ++g) {
      round_weights(w, w_scales, codes + g * 2 * kGroup, pairs, p.packed ? pairs * kPairRow : 0);
      for (int64_t tile = 0; tile < FmaPlan::tiles(rows); ++tile) {
        const int64_t row = FmaPlan::tile_begin(rows, tile);
        kTiles[FmaPlan::tile_begin(rows, tile + 1) - row - 1](
            sums + row * kPanel + g * kGroup, k0 == 0 || totals, at + row * pairs, at_scales + row,
            rows, w, w_scales, pairs);
      }
    }
    if (totals || k1 == p.k) epilogue.finish(sums, 0, rows, k1);
  }
}

// S is the dtype of x.
template <class S>
void run_int16(const LinearParams& p, int threads) {
  const Int16Plan plan(p);
  const int64_t panels = (p.n + kPanel - 1) / kPanel;
  for (int64_t m0 = 0; m0 < p.m; m0 += kInt16Rows) {
    const int64_t rows = p.m - m0 < kInt16Rows ? p.m - m0 : kInt16Rows;
    const int64_t splits = row_splits(rows, panels, threads, kFmaRows);
    const int64_t share = (rows + splits - 1) / splits;
    int32_t* x = workspace().x.get<int32_t>(
        static_cast<size_t>(rows * (plan.pairs + plan.chunks) + (rows + 3) / 4));
    float* scales = reinterpret_cast<float*>(x + rows * plan.pairs);
    bool* fits = reinterpret_cast<bool*>(scales + rows * plan.chunks);
    const S* from = static_cast<const S*>(p.x) + m0 * p.x_stride;
    const auto share_rows = [&](int64_t s) {
      return rows - s * share < share ? rows - s * share : share;
    };
    parallel_for(rows, threads, [&](int64_t row) {
      const int64_t first = row / share * share;
      fits[row] = round_row(plan, x + first * plan.pairs, scales + first * plan.chunks,
                            share_rows(row / share), row - first, from + row * p.x_stride);
    });
    parallel_chunks(panels * splits, 1, threads, [&](int64_t item, int64_t) {
      const int64_t s = item % splits, count = share_rows(s);
      if (count > 0)
        int16_panel(p, plan, x + s * share * plan.pairs, scales + s * share * plan.chunks,
                    m0 + s * share, count, item / splits);
    });
    LinearParams exact = p;  // runs of rows
    exact.int16 = false;
    const bool all = std::all_of(fits, fits + rows, [](bool fit) { return fit; });
    std::vector<char> flags;
    if (!all) flags.assign(fits, fits + rows);  // run_fma uses the same workspace
    for (size_t row = 0, end; row < flags.size(); row = end) {
      for (end = row + 1; end < flags.size() && flags[end] == flags[row];) ++end;
      if (flags[row]) continue;
      const int64_t first = m0 + static_cast<int64_t>(row);
      exact.x = static_cast<const S*>(p.x) + first * p.x_stride;
      exact.out = static_cast<char*>(p.out) + first * p.n * static_cast<int64_t>(sizeof(S));
      exact.m = static_cast<int64_t>(end - row);
      run_fma<S, e4m3>(exact, threads);
    }
  }
}

}  // namespace lf::LF_ISA
#endif
