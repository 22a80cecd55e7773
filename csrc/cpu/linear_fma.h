// linear by fp32 products, on any instruction set.
//
// Weights are decoded in registers for each tile of rows, on ports that the products leave idle; if
// decoding is expensive (cheap_to_decode), once for all tiles. A tile that takes all groups at once
// streams through whole panels; others share blocks of a panel that stay in L1. Up to kPassRows
// rows share a pass over the weight: a block of x then stays in L2, worth more than fewer passes.
#pragma once
#include <atomic>

#include "linear_epilogue.h"

namespace lf::LF_ISA {

inline constexpr int64_t kPassRows = 132;
// Bytes between a load and its prefetch. AVX2: 8192 read 1.02 to 1.07 times as fast as 4096.
inline constexpr int64_t kStreamAhead = kLanes == 16 ? 4096 : 8192;

// How rows and columns are cut, which sets the layout of x: [share][k block][tile][k][tile's rows].
struct FmaPlan {
  int64_t k, block, stride;  // columns: of x, of a block, of a row with its padding

  FmaPlan(const LinearParams& p, int64_t itemsize) : k(p.k), stride(p.k + p.k % 2) {
#if defined(LF_AVX2)
    block = by_quads(p) ? kQuadColumns : 128 / itemsize;  // 16 or 8 KB of a panel as stored
#else
    block = 64;  // 16 KB of a panel, decoded
    (void)itemsize;
#endif
  }
  // True for one row, a plain e4m3 weight and a 16-bit result, without block scales.
  static bool by_quads(const LinearParams& p) {
    return p.m == 1 && !p.packed && p.weight_dtype == DType::e4m3 && !promotes(p);
  }
  static int64_t tiles(int64_t rows) { return (rows + kFmaRows - 1) / kFmaRows; }
  // First row of a tile. Tiles are as even as possible.
  static int64_t tile_begin(int64_t rows, int64_t tile) { return rows * tile / tiles(rows); }
};

// Copies one tile of a share's rows of x, times `scale`. Returns false if the largest overflows.
template <class S>
bool pack_tile(const FmaPlan& plan, float* out, int64_t share_rows, int64_t tile, const S* x,
               int64_t x_stride, float scale) {
  const int64_t begin = plan.tile_begin(share_rows, tile);
  const int64_t rows = plan.tile_begin(share_rows, tile + 1) - begin;
  Vec most = zeros();
  for (int64_t k0 = 0; k0 < plan.k; k0 += plan.block) {
    const int64_t n = plan.k - k0 < plan.block ? plan.k - k0 : plan.block, padded = n + n % 2;
    float* to = out + k0 * share_rows + begin * padded;
    for (int64_t r = 0; r < rows; ++r) {
      const S* from = x + (begin + r) * x_stride + k0;
      for (int64_t i = 0; i < n; i += kLanes) {
        const int lanes = lanes_left(n - i);
        const Vec v =
            (lanes == kLanes ? load(from + i) : load_n(from + i, lanes)) * broadcast(scale);
        most = max(abs(v), most);
        float value[kLanes];
        store(value, v);
        for (int lane = 0; lane < lanes; ++lane) to[(i + lane) * rows + r] = value[lane];
      }
      if (n % 2) to[n * rows + r] = 0.0f;
    }
  }
  return reduce_max(most) < INFINITY;
}

// One panel for `rows` rows. T is the weight's dtype.
template <class T>
class FmaTask {
 public:
  // x: this share's. scaled: by the inverse of the weights' factor, except for `unscale`.
  FmaTask(const LinearParams& p, const FmaPlan& plan, const float* x, bool scaled, float unscale,
          int64_t m0, int64_t rows, int64_t panel)
      : p_(p),
        plan_(plan),
        x_(x),
        scaled_(scaled),
        unscale_(unscale),
        m0_(m0),
        rows_(rows),
        panel_(panel),
        sums_(workspace().acc.get<float>(static_cast<size_t>(rows * kPanel))) {}

  void run() {
    if constexpr (std::is_same_v<T, e4m3> && kWeightShift != 0) {
      if (!scaled_ || run<false>(1.0f)) run<true>(scaled_ ? 1.0f : power_of_two(kWeightShift));
    } else {
      run<false>(1.0f);
    }
  }

  static float power_of_two(int n) { return bits_float(static_cast<uint32_t>(127 + n) << 23); }

 private:
  // Returns true if a fast form met a NaN; the results are then wrong.
  template <bool kExact>
  bool run(float factor) {
    float* scales = workspace().scale.template get<float>(static_cast<size_t>(scale_floats(p_)));
    weight_scales(p_, panel_, scales);
    float* totals = nullptr;
    if (promotes(p_))
      totals = workspace().total.template get<float>(static_cast<size_t>(rows_ * kPanel));
    Epilogue<FmaMath, T> epilogue(p_, m0_, panel_, scales, totals);
    const bool stream =
        p_.packed && plan_.tiles(rows_) == 1 && groups_at_once(static_cast<int>(rows_)) == kGroups;
    const int64_t step = !stream ? plan_.block : totals ? kScaleBlock : p_.k;
    bool nan = false;
    int64_t k0 = 0, k1;
    do {
      k1 = k0 + step < p_.k ? k0 + step : p_.k;
      nan |=
          run_block<kExact>(k0, k1, k0 == 0 || (totals && k0 % kScaleBlock == 0), factor, stream);
      if (k1 == p_.k || (totals && k1 % kScaleBlock == 0))
        epilogue.finish(sums_, 0, rows_, k1, unscale_);
      k0 = k1;
    } while (k0 < p_.k);
    return nan;
  }

  // Prefetches the next block while this one is used.
  template <bool kExact>
  bool run_block(int64_t k0, int64_t k1, bool fresh, float factor, bool stream) {
#if defined(LF_AVX2)
    if constexpr (std::is_same_v<T, e4m3> && !kExact)
      if (plan_.block == kQuadColumns && k1 - k0 == kQuadColumns) return run_quads(k0);
#endif
    const T* w = pair_rows<T>(p_, panel_, k0, k1);
    const float* x = x_ + k0 * rows_;
    const int64_t pairs = (k1 - k0 + 1) / 2;
    const int64_t ahead = !p_.packed ? 0 : stream ? kStreamAhead : pairs * kPairRow * sizeof(T);
    const char* next = reinterpret_cast<const char*>(w) + ahead;
    if constexpr (!cheap_to_decode<T, kExact>())
      if (plan_.tiles(rows_) > 1) {
        Decoded* block =
            workspace().decoded.template get<Decoded>(static_cast<size_t>(pairs * kPairRow));
        const bool nan = decode_block<T, kExact>(block, w, pairs, factor);
        run_tiles<Decoded, true>(fresh, x, block, pairs, 1.0f, next);
        return nan;
      }
    return run_tiles<T, kExact>(fresh, x, w, pairs, factor, next);
  }

#if defined(LF_AVX2)
  bool run_quads(int64_t k0) {
    Quad* quads = workspace().packed.get<Quad>(kQuadColumns / 4 * kPanel);
    const QuadRows rows(panel_features(p_, panel_), p_.weight_stride);
    const e4m3* w = static_cast<const e4m3*>(p_.weight) + panel_ * kPanel * p_.weight_stride + k0;
    pack_quads(quads, w, rows);
    // The next columns, or the start of the next panel.
    const e4m3* next = w + kQuadColumns;
    if (p_.k - k0 < 2 * kQuadColumns) next = w - k0 + kPanel * p_.weight_stride;
    return fma_quads(sums_, k0 == 0, x_ + k0, quads, next, rows);
  }
#endif

  template <class W, bool kExact>
  bool run_tiles(bool fresh, const float* x, const W* w, int64_t pairs, float factor,
                 const char* next) {
    using Kernel = decltype(&fma_tile<1, W, kExact>);
    static constexpr Kernel kKernels[] = {
        fma_tile<1, W, kExact>, fma_tile<2, W, kExact>, fma_tile<3, W, kExact>,
#if defined(LF_AVX512) || defined(LF_AVX2)
        fma_tile<4, W, kExact>, fma_tile<5, W, kExact>, fma_tile<6, W, kExact>,
#endif
    };
    static_assert(sizeof(kKernels) / sizeof(Kernel) == kFmaRows);
    bool nan = false;
    const int64_t tiles = plan_.tiles(rows_);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = plan_.tile_begin(rows_, tile);
      const int rows = static_cast<int>(plan_.tile_begin(rows_, tile + 1) - row);
      // Each pass of each tile prefetches its part of every pair row.
      const int64_t passes = kGroups / groups_at_once(rows), parts = passes * tiles;
      const int64_t bytes = kPairRow * sizeof(T);
      const int64_t stride = p_.packed ? (bytes + parts - 1) / parts : 0;
      nan |= kKernels[rows - 1](sums_ + row * kPanel, fresh, x + row * 2 * pairs, w, pairs, factor,
                                next, stride);
      next += passes * pairs * stride;
    }
    return nan;
  }

  const LinearParams& p_;
  const FmaPlan& plan_;
  const float* x_;
  bool scaled_;
  float unscale_;
  int64_t m0_, rows_, panel_;
  float* sums_;  // [rows][64] running sums, in the order of Weights
};

// S is the dtype of x, T the weight's.
template <class S, class T>
void run_fma(const LinearParams& p, int threads) {
  // FP8 and fp16 values need headroom: 448 and 65504 times 2^120 exceed fp32. The sums of their
  // products with e4m3 are multiples of 2^-33, so giving up 2^9 at the bottom loses nothing.
  constexpr bool kScales = std::is_same_v<T, e4m3> && kWeightShift != 0;
  constexpr int kRoom = kWeightShift < 100        ? 0
                        : std::is_same_v<S, e4m3> ? 1
                        : std::is_same_v<S, f16>  ? 9
                                                  : 0;
  const float up = FmaTask<T>::power_of_two(kScales ? kWeightShift - kRoom : 0);
  const float unscale = FmaTask<T>::power_of_two(kScales ? kRoom : 0);
  const FmaPlan plan(p, sizeof(T));
  const int64_t panels = (p.n + kPanel - 1) / kPanel;
  const int64_t passes = (p.m + kPassRows - 1) / kPassRows;
  const int64_t pass_rows = plan.tiles((p.m + passes - 1) / passes) * kFmaRows;
  for (int64_t m0 = 0; m0 < p.m; m0 += pass_rows) {
    const int64_t rows = p.m - m0 < pass_rows ? p.m - m0 : pass_rows;
    const int64_t splits = row_splits(rows, panels, threads, kFmaRows);
    const int64_t share = (rows + splits - 1) / splits;
    float* x = workspace().x.get<float>(static_cast<size_t>(rows * plan.stride));
    const auto share_rows = [&](int64_t s) {
      return rows - s * share < share ? rows - s * share : share;
    };
    const auto pack = [&](float scale) {
      std::atomic<bool> finite{true};
      const int64_t tiles = plan.tiles(share);
      parallel_for(splits * tiles, threads, [&](int64_t item) {
        const int64_t s = item / tiles, tile = item % tiles, count = share_rows(s);
        if (count <= 0 || tile >= plan.tiles(count)) return;
        const S* from = static_cast<const S*>(p.x) + (m0 + s * share) * p.x_stride;
        if (!pack_tile(plan, x + s * share * plan.stride, count, tile, from, p.x_stride, scale))
          finite = false;
      });
      return finite.load();
    };
    bool scaled = kScales;
    if (!pack(up) && kScales) scaled = false, pack(1.0f);
    // A thread takes neighboring panels, so that what one prefetches past its end is the next.
    parallel_chunks(panels * splits, 1, threads, [&](int64_t item, int64_t) {
      const int64_t s = item % splits, count = share_rows(s);
      if (count > 0)
        FmaTask<T>(p, plan, x + s * share * plan.stride, scaled, scaled ? unscale : 1.0f,
                   m0 + s * share, count, item / splits)
            .run();
    });
  }
}

}  // namespace lf::LF_ISA
