// One tile of flash attention: consecutive queries of the heads that share a key/value head,
// against the keys of their sequence, 128 at a time.
//
// Keys and values are packed once per tile and block and serve all its rows. Scores of a strip of
// rows stay in L1, and the probabilities overwrite them there.
//
// A row's result depends on its own query and keys alone: blocks start at multiples of 128 keys, a
// row's sums run in one order whatever the tile's size, and keys that it does not see add exact
// zeros. In bf16 the row sum adds the rounded probabilities that multiply the values. The weights
// then sum to one, and rounding errors common to a row cancel.
//
// Cost: 4 * head_dim FLOPs per score, about 15 instructions of exp2 per kLanes scores, and the
// packing, 1 % at 384 rows. Memory: 0.4 MB per thread at head_dim 128, whatever the lengths.
#pragma once
#include <cfloat>
#include <limits>

#include "dot_tile.h"
#include "parallel.h"

namespace lf::LF_ISA {

inline constexpr int kStripRows = 24;
inline constexpr int kBlockKeys = 128;
static_assert(kStripRows % kTileRows == 0 && kBlockKeys % kPanel == 0 && kPanel % 2 == 0);

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
inline int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

struct AttentionTile {
  int64_t tokens, group;  // rows = tokens * group; a token's heads are adjacent
  int64_t head_dim;
  int64_t keys;
  int64_t first_seen;  // token t sees keys [0, first_seen + t), clamped to [0, keys]
  float softmax_scale;
  float value_scale = 1.0f;

  int64_t seen(int64_t row) const { return clamp(first_seen + row / group, 0, keys); }
};

// Online softmax of a strip, in base 2. Scores [n, span] become probabilities; factor[row] scales
// the row's earlier sums. row_max [n], row_sum [n, kLanes]: a row's sum is kept per lane and
// reduced once, at the end.
template <class U>
inline void softmax_strip(float* scores, int64_t n, int64_t span, float* row_max, float* row_sum,
                          float* factor) {
  for (int64_t r = 0; r < n; ++r) {
    Vec m = broadcast(row_max[r]);
    for (int64_t j = 0; j < span; j += kLanes) m = max(load(scores + r * kBlockKeys + j), m);
    factor[r] = reduce_max(m);
  }
  for (int64_t r = 0; r < n; ++r) {
    float* s = scores + r * kBlockKeys;
    const Vec m = broadcast(factor[r]);
    const Vec shrink = exp2_nonpositive<false>(broadcast(row_max[r]) - m);
    row_max[r] = factor[r];
    store_n(factor + r, shrink, 1);
    Vec sum = zeros();
    for (int64_t j = 0; j < span; j += 2 * kLanes)
      sum = sum + U::pack_probabilities(s + j / U::kElements,
                                        exp2_nonpositive<U::kShortExp>(load(s + j) - m),
                                        exp2_nonpositive<U::kShortExp>(load(s + j + kLanes) - m));
    store(row_sum + r * kLanes, fma(load(row_sum + r * kLanes), shrink, sum));
  }
}

// q(token, head), k(key), v(key) and out(token, head) return the addresses of rows of head_dim
// elements: T, and T or e4m3 for k and v. k and v are never called beyond the last key that the
// tile sees.
template <class T, class Query, class Key, class Value, class Out>
void attend_tile(const AttentionTile& t, Query&& q, Key&& k, Value&& v, Out&& out) {
  using U = Units<T>;
  const int64_t rows = t.tokens * t.group, padded = round_up(rows, kTileRows);
  const int64_t units = round_up(t.head_dim, U::kElements) / U::kElements;
  const int64_t width = round_up(t.head_dim, kLanes),
                panels = round_up(t.head_dim, kPanel) / kPanel;
  const int64_t value_panel = kBlockKeys / U::kElements * kPanel;

  thread_local Scratch scratch;
  float* queries = scratch.get<float>(
      static_cast<size_t>(padded * (units + width + kLanes + 1) + kBlockKeys * units +
                          2 * panels * value_panel + kStripRows * (kBlockKeys + 1) + 6 * kLanes));
  float* acc = queries + round_up(padded * units, kLanes);  // [padded, width]
  float* row_sum = acc + padded * width;                    // [padded, kLanes]
  float* row_max = row_sum + padded * kLanes;               // [padded]
  float* keys = row_max + round_up(padded, kLanes);         // [kBlockKeys / kPanel, units, kPanel]
  float* values = keys + kBlockKeys * units;  // [panels, kBlockKeys / kElements, kPanel]
  float* spare = values + panels * value_panel;
  float* scores = spare + panels * value_panel;  // [kStripRows, kBlockKeys]
  float* factor = scores + kStripRows * kBlockKeys;

  for (int64_t r = 0; r < padded; ++r) {
    float* row = queries + r * units;
    for (int64_t u = 0; u < units; u += kLanes) {
      const int n = static_cast<int>(units - u < kLanes ? units - u : kLanes);
      const int64_t d = u * U::kElements;
      store_n(row + u,
              r < rows ? U::load_units(q(r / t.group, r % t.group) + d, t.head_dim - d) : zeros(),
              n);
    }
    for (int64_t d = 0; d < width; d += kLanes) store(acc + r * width + d, zeros());
    store(row_sum + r * kLanes, zeros());
    row_max[r] = -FLT_MAX;  // finite, so that a fully masked row gives zeros and not NaN
  }

  // Returns whether all values are finite. Fills only what n keys fill, up to a whole pair.
  const auto pack_values = [&](float* dst, int64_t j0, int64_t n) {
    bool finite = true;
    for (int64_t j = 0; j < n; j += 2) {
      const auto* v0 = v(j0 + j);
      const auto* v1 = j + 1 < n ? v(j0 + j + 1) : nullptr;
      for (int64_t d = 0; d < width; d += kLanes)
        finite &=
            U::pack_pair(dst + d / kPanel * value_panel + j / U::kElements * kPanel + d % kPanel,
                         v0 + d, v1 ? v1 + d : nullptr, t.head_dim - d);
    }
    return finite;
  };
  const auto pack_keys = [&](int64_t j0, int64_t n) {
    for (int64_t j = 0; j < n; j += kLanes)
      for (int64_t u = 0; u < units; u += kLanes) {
        Vec block[kLanes];
        const int64_t d = u * U::kElements;
        for (int i = 0; i < kLanes; ++i)
          block[i] = j + i < n ? U::load_units(k(j0 + j + i) + d, t.head_dim - d) : zeros();
        store_transposed(keys + (j / kPanel * units + u) * kPanel + j % kPanel, block,
                         static_cast<int>(clamp(units - u, 0, kLanes)));
      }
  };

  // Rows of keys lie a token's stride apart, too far for the hardware prefetcher. Keys [from, to)
  // of the block at j0 are fetched into L2 while the previous block is computed.
  const auto prefetch = [&](int64_t j0, int64_t from, int64_t to) {
    for (int64_t j = from; j < to; ++j)
      for (int64_t d = 0; d < t.head_dim; d += static_cast<int64_t>(64 / sizeof(*k(j0)))) {
        __builtin_prefetch(k(j0 + j) + d, 0, 2);
        __builtin_prefetch(v(j0 + j) + d, 0, 2);
      }
  };

  const float scale = t.softmax_scale * 1.44269504088896341f;
  const int64_t last = t.seen(rows - 1);
  for (int64_t j0 = 0; j0 < last; j0 += kBlockKeys) {
    const int64_t n = clamp(last - j0, 0, kBlockKeys);
    pack_keys(j0, n);
    const bool finite = pack_values(values, j0, n);
    for (int64_t r0 = 0; r0 < padded; r0 += kStripRows) {
      const int64_t r1 = r0 + kStripRows < padded ? r0 + kStripRows : padded;
      const int64_t ahead = clamp(last - j0 - kBlockKeys, 0, kBlockKeys);
      prefetch(j0 + kBlockKeys, ahead * r0 / padded, ahead * r1 / padded);
      const int64_t extent = clamp(t.seen((r1 < rows ? r1 : rows) - 1) - j0, 0, n);
      if (extent == 0) continue;
      for (int64_t j = 0; j < extent; j += kPanel)
        for (int64_t r = r0; r < r1; r += kTileRows)
          dot_tile<U, kTileRows, false>((extent - j + kLanes - 1) / kLanes, queries + r * units,
                                        units, keys + j * units, units,
                                        scores + (r - r0) * kBlockKeys + j, kBlockKeys, &scale);

      const int64_t span = round_up(extent, 2 * kLanes);
      bool masked = false;
      for (int64_t r = r0; r < r1; ++r) {
        const int64_t seen = clamp(t.seen(r) - j0, 0, extent);
        masked |= seen < extent;
        for (int64_t j = seen; j < span; ++j)
          scores[(r - r0) * kBlockKeys + j] = -std::numeric_limits<float>::infinity();
      }
      softmax_strip<U>(scores, r1 - r0, span, row_max + r0, row_sum + r0 * kLanes, factor);

      if (finite || !masked) {
        for (int64_t d = 0; d < width; d += kPanel)
          for (int64_t r = r0; r < r1; r += kTileRows)
            dot_tile<U, kTileRows, true>((width - d) / kLanes, scores + (r - r0) * kBlockKeys,
                                         kBlockKeys, values + d / kPanel * value_panel,
                                         (extent + U::kElements - 1) / U::kElements,
                                         acc + r * width + d, width, factor + r - r0);
        continue;
      }
      // 0 * NaN is NaN, so each row multiplies only the values that it sees.
      for (int64_t r = r0; r < r1; ++r) {
        const int64_t seen = clamp(t.seen(r) - j0, 0, extent);
        pack_values(spare, j0, seen);
        for (int64_t d = 0; d < width; d += kPanel)
          dot_tile<U, 1, true>((width - d) / kLanes, scores + (r - r0) * kBlockKeys, kBlockKeys,
                               spare + d / kPanel * value_panel,
                               (seen + U::kElements - 1) / U::kElements, acc + r * width + d, width,
                               factor + r - r0);
      }
    }
  }

  for (int64_t r = 0; r < rows; ++r) {
    float inverse = 0.0f;
    if (t.seen(r)) inverse = 1.0f / reduce_add(load(row_sum + r * kLanes)) * t.value_scale;
    T* row = out(r / t.group, r % t.group);
    for (int64_t d = 0; d < t.head_dim; d += kLanes) {
      const Vec o = load(acc + r * width + d) * broadcast(inverse);
      if (t.head_dim - d >= kLanes)
        store(row + d, o);
      else
        store_n(row + d, o, static_cast<int>(t.head_dim - d));
    }
  }
}

}  // namespace lf::LF_ISA
