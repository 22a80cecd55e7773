// Shared by both kinds of linear's arithmetic: scales, and turning sums into results.
#pragma once
#include "gemm_fma.h"
#include "kernels.h"
#include "pack_panel.h"
#include "parallel.h"

namespace lf::LF_ISA {

inline constexpr int64_t kScaleBlock = 128;  // columns that share a block scale

struct Workspace {
  Scratch x, packed, decoded, acc, total, scale;
};

inline Workspace& workspace() {
  thread_local Workspace w;
  return w;
}

inline bool blockwise(const LinearParams& p) {
  return (p.x_scale && p.x_granularity == Scale::block) ||
         (p.weight_scale && p.weight_granularity == Scale::block);
}

// fp32 results too are summed in blocks of 128 columns: one chain over all of k would have three
// times the error of a blocked product. A 16-bit output would not show it.
inline bool promotes(const LinearParams& p) { return blockwise(p) || p.out_dtype == DType::f32; }

inline int64_t scale_blocks(const LinearParams& p) { return (p.k + kScaleBlock - 1) / kScaleBlock; }

inline float x_scale(const LinearParams& p, int64_t row, int64_t block) {
  if (!p.x_scale) return 1.0f;
  if (p.x_granularity == Scale::tensor) return p.x_scale[0];
  if (p.x_granularity == Scale::row) return p.x_scale[row];
  return p.x_scale[row * scale_blocks(p) + block];
}

inline int64_t panel_features(const LinearParams& p, int64_t panel) {
  const int64_t left = p.n - panel * kPanel;
  return left < kPanel ? left : kPanel;
}

inline int64_t scale_floats(const LinearParams& p) {
  return (blockwise(p) ? scale_blocks(p) : 1) * kPanel;
}

// Expands the scales of a panel's features: [1 or scale_blocks][64].
inline void weight_scales(const LinearParams& p, int64_t panel, float* out) {
  const int64_t n0 = panel * kPanel, n = panel_features(p, panel);
  const int64_t blocks = scale_floats(p) / kPanel;
  const bool by_block = p.weight_granularity == Scale::block;
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t i = 0; i < kPanel; ++i) {
      const int64_t feature = n0 + (i < n ? i : n - 1);
      float scale = 1.0f;
      if (p.weight_scale && by_block)
        scale = p.weight_scale[feature / p.weight_block_rows * scale_blocks(p) + b];
      else if (p.weight_scale)
        scale = p.weight_scale[p.weight_granularity == Scale::row ? feature : 0];
      out[b * kPanel + i] = scale;
    }
}

// Computes one panel's results for rows from m0 on, from sums [rows][64] in the order of Math and
// T.
template <class Math, class T>
class Epilogue {
 public:
  // scales: from weight_scales. totals: [rows][64], scaled sums of earlier blocks; null: one chain.
  Epilogue(const LinearParams& p, int64_t m0, int64_t panel, const float* scales, float* totals)
      : p_(p),
        m0_(m0),
        n0_(panel * kPanel),
        n_(panel_features(p, panel)),
        scales_(scales),
        totals_(totals),
        blockwise_(blockwise(p)) {}

  // Finishes columns up to `k_end`: those since the last block of 128 if there are totals.
  void finish(const float* sums, int64_t begin, int64_t end, int64_t k_end, float unscale = 1) {
    const int64_t block = totals_ ? (k_end - 1) / kScaleBlock : 0;
    with_dtype(p_.out_dtype, [&](auto* t) {
      for (int64_t row = begin; row < end; ++row)
        finish_row<std::remove_pointer_t<decltype(t)>>(sums + row * kPanel, row, block,
                                                       k_end == p_.k, unscale);
    });
  }

 private:
  // Scales one row's sums, adds those of previous blocks and, after the last, stores the result.
  template <class Out>
  void finish_row(const float* sums, int64_t row, int64_t block, bool last, float unscale) {
    float* total = totals_ + row * kPanel;
    Out* out = static_cast<Out*>(p_.out) + (m0_ + row) * p_.n + n0_;
    const int64_t group = blockwise_ ? block : 0;
    const Vec sx = broadcast(x_scale(p_, m0_ + row, group));
    for (int i = 0; i < kPanel; i += kLanes) {
      Vec v = Math::template features<T>(sums, i);
      if constexpr (Math::kUnscales) v = v * broadcast(unscale);
      v = v * sx * load(scales_ + group * kPanel + i);
      if (block > 0) v = v + load(total + i);
      if (!last) {
        store(total + i, v);
        continue;
      }
      const int n = static_cast<int>(n_ - i);
      if (n <= 0) return;
      if (p_.bias) {
        const Out* bias = static_cast<const Out*>(p_.bias) + n0_ + i;
        v = v + (n >= kLanes ? load(bias) : load_n(bias, n));
      }
      if (n >= kLanes)
        store(out + i, v);
      else
        store_n(out + i, v, n);
    }
  }

  const LinearParams& p_;
  int64_t m0_, n0_, n_;
  const float* scales_;
  float* totals_;
  bool blockwise_;  // one scale per 128 columns
};

// Pair rows k0 / 2 .. of a panel in packed order, from either layout.
template <class T>
const T* pair_rows(const LinearParams& p, int64_t panel, int64_t k0, int64_t k1) {
  const T* weight = static_cast<const T*>(p.weight);
  if (p.packed) return weight + panel * kPanel * p.k + k0 * kPanel;
  T* out = workspace().packed.get<T>(static_cast<size_t>((k1 - k0 + 1) / 2 * kPairRow));
  pack_panel(out, weight + panel * kPanel * p.weight_stride + k0, p.weight_stride,
             panel_features(p, panel), k1 - k0);
  return out;
}

// With few items the rows are split too, at the cost of decoding a panel more than once.
inline int64_t row_splits(int64_t rows, int64_t items, int threads, int tile_rows) {
  const int64_t splits = items >= 4 * threads ? 1 : 4 * threads / items;
  const int64_t most = (rows + 8 * tile_rows - 1) / (8 * tile_rows);
  return splits < most ? splits : most;
}

}  // namespace lf::LF_ISA
