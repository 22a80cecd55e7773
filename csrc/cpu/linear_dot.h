// linear by vdpbf16ps: x is bf16 or e4m3, the weight too.
//
// Decoding e4m3 to bf16 for each tile of rows is nearly free, since it uses ports that the products
// leave idle. Past kDecodeRows, decoding a block once into L2 is faster. FP8 activations are
// converted once per call.
#pragma once
#if defined(LF_AVX512_BF16)
#include "gemm_dot.h"
#include "linear_epilogue.h"

namespace lf::LF_ISA {

inline constexpr int64_t kMaxRows = 512;           // rows of x per pass over the weight
inline constexpr int64_t kBlockBytes = 128 << 10;  // of a panel at a time
inline constexpr int64_t kAhead = 4096;            // bytes between a load and its prefetch
// GFLOP/s of decoding per tile and once: 400 and 250 at 16 rows, 400 and 427 at 512.
inline constexpr int64_t kDecodeRows = 128;

// [rows, K] of x in bf16, K padded to an even number with zeros.
template <class S>
const bf16* convert_rows(const LinearParams& p, int64_t m0, int64_t rows, int threads) {
  const int64_t stride = p.k + p.k % 2;
  bf16* out = workspace().x.get<bf16>(static_cast<size_t>(rows * stride));
  parallel_chunks(rows, 1 + 16384 / stride, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const S* from = static_cast<const S*>(p.x) + (m0 + row) * p.x_stride;
      bf16* to = out + row * stride;
      int64_t i = 0;
      for (; i + kLanes <= p.k; i += kLanes) store(to + i, load(from + i));
      if (const int tail = static_cast<int>(p.k - i)) store_n(to + i, load_n(from + i, tail), tail);
      if (p.k % 2) to[p.k] = bf16{};
    }
  });
  return out;
}

template <class T>
void accumulate_rows(int rows, float* acc, bool fresh, const bf16* x, int64_t x_stride, const T* w,
                     int64_t pairs, int64_t ahead) {
  using Kernel = decltype(&accumulate<1, T>);
  static constexpr Kernel kKernels[kTileRows] = {accumulate<1, T>, accumulate<2, T>,
                                                 accumulate<3, T>, accumulate<4, T>,
                                                 accumulate<5, T>, accumulate<6, T>};
  kKernels[rows - 1](acc, fresh, x, x_stride, w, pairs, ahead);
}

// One panel for rows [m0, m0 + rows) of x. T is the weight's dtype.
template <class T>
class DotTask {
 public:
  // acc: where to keep the sums; null: in this thread's workspace.
  DotTask(const LinearParams& p, const bf16* x, int64_t x_stride, int64_t m0, int64_t rows,
          int64_t panel, float* acc = nullptr)
      : p_(p),
        x_(x),
        x_stride_(x_stride),
        rows_(rows),
        panel_(panel),
        acc_(acc ? acc : workspace().acc.get<float>(static_cast<size_t>(rows * kPanel))),
        totals_(promotes(p) ? workspace().total.get<float>(static_cast<size_t>(rows * kPanel))
                            : nullptr),
        scales_(workspace().scale.get<float>(static_cast<size_t>(scale_floats(p)))),
        epilogue_(p, m0, panel, scales_, totals_) {
    weight_scales(p, panel, scales_);
  }

  void run() {
    const bool decode_once = rows_ > kDecodeRows && !std::is_same_v<T, bf16>;
    const bool stream = p_.packed && rows_ <= kTileRows;
    const int64_t column_bytes = kPanel * (decode_once ? sizeof(bf16) : sizeof(T));
    const int64_t step = stream ? p_.k : kBlockBytes / column_bytes;
    int64_t k0 = 0;
    do {
      const int64_t k1 = k0 + step < p_.k ? k0 + step : p_.k;
      const T* w = pair_rows<T>(p_, panel_, k0, k1);
      if (decode_once)
        run_block(decode(w, (k1 - k0 + 1) / 2), k0, k1, 0);
      else
        run_block(w, k0, k1, p_.packed ? kAhead : 0);
      k0 = k1;
    } while (k0 < p_.k);
  }

  // How many panels of a packed weight to read side by side.
  static int streams(const LinearParams& p) {
    if (!p.packed || promotes(p)) return 1;
    return p.m == 1 ? 4 : p.m == 2 ? 2 : 1;
  }

  // Computes `count` panels from `panel` on, for one or two rows.
  static void run_streams(const LinearParams& p, const bf16* x, int64_t x_stride, int64_t panel,
                          int64_t count) {
    if (count < streams(p)) {
      for (int64_t i = 0; i < count; ++i) DotTask(p, x, x_stride, 0, p.m, panel + i).run();
      return;
    }
    float* acc = workspace().acc.get<float>(static_cast<size_t>(count * p.m * kPanel));
    const T* w = static_cast<const T*>(p.weight) + panel * kPanel * p.k;
    if (p.m == 1)
      accumulate_panels<4, 1>(acc, x, x_stride, w, p.k / 2);
    else
      accumulate_panels<2, 2>(acc, x, x_stride, w, p.k / 2);
    for (int64_t i = 0; i < count; ++i) {
      DotTask task(p, x, x_stride, 0, p.m, panel + i, acc + i * p.m * kPanel);
      task.epilogue_.finish(task.acc_, 0, p.m, p.k);
    }
  }

 private:
  const bf16* decode(const T* w, int64_t pairs) const {
    bf16* out = workspace().decoded.get<bf16>(static_cast<size_t>(pairs * kPairRow));
    if constexpr (!std::is_same_v<T, bf16>)
      for (int64_t i = 0; i < pairs; ++i)
        DotMath::store_decoded(out + i * kPairRow, w + i * kPairRow);
    return out;
  }

  // Adds columns [k0, k1), with their pair rows at w. W is T, or bf16 when decoded.
  template <class W>
  void run_block(const W* w, int64_t k0, int64_t k1, int64_t ahead) {
    int64_t tiles = (rows_ + kTileRows - 1) / kTileRows;
    for (int64_t row = 0; tiles > 0; --tiles) {
      const int rows = static_cast<int>((rows_ - row + tiles - 1) / tiles);
      const int64_t step = totals_ ? kScaleBlock : k1 - k0;
      int64_t k = k0;
      do {
        const int64_t end = k + step < k1 ? k + step : k1;
        const W* at = w + (k - k0) * kPanel;
        accumulate_rows(rows, acc_ + row * kPanel, totals_ || k == 0, x_ + row * x_stride_ + k,
                        x_stride_, at, (end - k + 1) / 2, ahead);
        if (totals_ || end == p_.k) epilogue_.finish(acc_, row, row + rows, end);
        k = end;
      } while (k < k1);
      row += rows;
    }
  }

  const LinearParams& p_;
  const bf16* x_;  // this task's first row
  int64_t x_stride_, rows_, panel_;
  float* acc_;     // [rows][64] running sums, in lane order
  float* totals_;  // [rows][64] scaled sums of the finished blocks; null: one chain
  float* scales_;
  Epilogue<DotMath, T> epilogue_;
};

// S is the dtype of x, T the weight's.
template <class S, class T>
void run_dot(const LinearParams& p, int threads) {
  const int64_t panels = (p.n + kPanel - 1) / kPanel;
  for (int64_t m0 = 0; m0 < p.m; m0 += kMaxRows) {
    const int64_t rows = p.m - m0 < kMaxRows ? p.m - m0 : kMaxRows;
    const bf16* x;
    int64_t x_stride;
    if (std::is_same_v<S, bf16> && p.k % 2 == 0) {
      x = static_cast<const bf16*>(p.x) + m0 * p.x_stride;
      x_stride = p.x_stride;
    } else {
      x = convert_rows<S>(p, m0, rows, threads);
      x_stride = p.k + p.k % 2;
    }
    using Task = DotTask<T>;
    if (const int streams = Task::streams(p); streams > 1) {
      parallel_chunks((panels + streams - 1) / streams, 1, threads, [&](int64_t i, int64_t) {
        const int64_t first = i * streams, left = panels - first;
        Task::run_streams(p, x, x_stride, first, left < streams ? left : streams);
      });
      return;
    }
    const int64_t splits = row_splits(rows, panels, threads, kTileRows);
    const int64_t share = (rows + splits - 1) / splits;
    // A thread takes neighboring panels, so that what one prefetches past its end is the next.
    parallel_chunks(panels * splits, 1, threads, [&](int64_t item, int64_t) {
      const int64_t begin = item % splits * share;
      const int64_t count = rows - begin < share ? rows - begin : share;
      if (count > 0)
        Task(p, x + begin * x_stride, x_stride, m0 + begin, count, item / splits).run();
    });
  }
}

}  // namespace lf::LF_ISA
#endif
