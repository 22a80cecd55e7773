// linear, fp8_linear and fp8_gemm: out = (x @ weight^T) * x_scale * weight_scale + bias, in fp32
// and rounded once.
//
// Up to six rows a panel of 64 output features streams through the registers, decoded on the way:
// one sequential read of the weight, which is all that such a product costs (N * K bytes for e4m3).
// With more rows a block of the panel stays in L2 while every tile of rows uses it; then the
// arithmetic is the cost, 2 M N K flops. Decoding e4m3 to bf16 again for each tile is nearly free,
// it runs on ports that the products leave idle; past kDecodeRows decoding once is faster. A plain
// weight is brought into the packed order block by block first.
//
// One output is one chain of sums over k, whatever M, the threads and the weight's layout: a row's
// result is the same bits alone or in a batch, from a packed weight or a plain one. With scales per
// block of 128 columns, or an fp32 result, the chain restarts at each block of 128 and the scaled
// sums are added in order.
// Activations that the arithmetic does not take as they are (gemm_tile.h) are converted once a
// call.
#include "gemm_tile.h"
#include "kernels.h"
#include "pack_panel.h"
#include "parallel.h"
#include "simd.h"

namespace lf::LF_ISA {
namespace {

constexpr int64_t kMaxRows = 512;           // rows of x to one pass over the weight
constexpr int64_t kBlockBytes = 128 << 10;  // of a panel at a time, as the tiles read it
constexpr int64_t kScaleBlock = 128;        // columns that share a block scale
constexpr int64_t kAhead = 4096;            // bytes between a load and its prefetch

struct Workspace {
  Scratch x, packed, decoded, acc, total, scale;
};

Workspace& workspace() {
  thread_local Workspace w;
  return w;
}

bool blockwise(const LinearParams& p) {
  return (p.x_scale && p.x_granularity == Scale::block) ||
         (p.weight_scale && p.weight_granularity == Scale::block);
}

// fp32 results are summed in blocks of 128 columns too: one chain over all of k would be three
// times as far from the truth as a blocked product. 16 bits of output cannot tell.
bool promotes(const LinearParams& p) { return blockwise(p) || p.out_dtype == DType::f32; }

int64_t scale_blocks(const LinearParams& p) { return (p.k + kScaleBlock - 1) / kScaleBlock; }

float x_scale(const LinearParams& p, int64_t row, int64_t block) {
  if (!p.x_scale) return 1.0f;
  if (p.x_granularity == Scale::tensor) return p.x_scale[0];
  if (p.x_granularity == Scale::row) return p.x_scale[row];
  return p.x_scale[row * scale_blocks(p) + block];
}

// The scales of features n0 .. n0 + n - 1: [1 or scale_blocks][64].
const float* weight_scales(const LinearParams& p, int64_t n0, int64_t n) {
  const int64_t blocks = blockwise(p) ? scale_blocks(p) : 1;
  float* out = workspace().scale.get<float>(static_cast<size_t>(blocks * kPanel));
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
  return out;
}

// [rows, K] of x as the arithmetic wants it, K padded to an even number with zeros.
template <class X, class S>
const X* convert_rows(const LinearParams& p, int64_t m0, int64_t rows, int threads) {
  const int64_t stride = p.k + p.k % 2;
  X* out = workspace().x.get<X>(static_cast<size_t>(rows * stride));
  parallel_chunks(rows, 1 + 16384 / stride, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const S* from = static_cast<const S*>(p.x) + (m0 + row) * p.x_stride;
      X* to = out + row * stride;
      int64_t i = 0;
      for (; i + kLanes <= p.k; i += kLanes) store(to + i, load(from + i));
      if (const int tail = static_cast<int>(p.k - i)) store_n(to + i, load_n(from + i, tail), tail);
      if (p.k % 2) to[p.k] = X{};
    }
  });
  return out;
}

template <class Math, class T>
void accumulate_rows(int rows, float* acc, bool fresh, const typename Math::X* x, int64_t x_stride,
                     const T* w, int64_t pairs, int64_t ahead) {
  using Kernel = decltype(&accumulate<Math, 1, T>);
  static constexpr Kernel kKernels[kTileRows] = {accumulate<Math, 1, T>, accumulate<Math, 2, T>,
                                                 accumulate<Math, 3, T>, accumulate<Math, 4, T>,
                                                 accumulate<Math, 5, T>, accumulate<Math, 6, T>};
  kKernels[rows - 1](acc, fresh, x, x_stride, w, pairs, ahead);
}

// One panel for rows [m0, m0 + rows) of x; T is the weight's dtype.
template <class Math, class T>
class PanelTask {
 public:
  using X = typename Math::X;

  // acc: where the sums are; null: in this thread's workspace.
  PanelTask(const LinearParams& p, const X* x, int64_t x_stride, int64_t m0, int64_t rows,
            int64_t panel, float* acc = nullptr)
      : p_(p), x_(x), x_stride_(x_stride), m0_(m0), rows_(rows), panel_(panel) {
    Workspace& w = workspace();
    n0_ = panel * kPanel;
    n_ = p.n - n0_ < kPanel ? p.n - n0_ : kPanel;
    acc_ = acc ? acc : w.acc.get<float>(static_cast<size_t>(rows * kRowFloats));
    blockwise_ = blockwise(p);
    if (promotes(p)) total_ = w.total.get<float>(static_cast<size_t>(rows * kPanel));
    scale_ = weight_scales(p, n0_, n_);
  }

  void run() {
    const bool decode_once = rows_ > Math::kDecodeRows && !std::is_same_v<T, X>;
    const bool stream = p_.packed && rows_ <= kTileRows &&
                        Math::tile_vectors(static_cast<int>(rows_)) == Math::kVectors;
    const int64_t column_bytes = kPanel * (decode_once ? sizeof(X) : sizeof(T));
    const int64_t step = stream ? p_.k : kBlockBytes / column_bytes;
    int64_t k0 = 0;
    do {
      const int64_t k1 = k0 + step < p_.k ? k0 + step : p_.k;
      const T* w = source(k0, k1);
      if (decode_once)
        run_block(decode(w, (k1 - k0 + 1) / 2), k0, k1, 0);
      else
        run_block(w, k0, k1, p_.packed ? kAhead : 0);
      k0 = k1;
    } while (k0 < p_.k);
  }

  // How many panels of a packed weight to read side by side.
  static int streams(const LinearParams& p) {
    if (Math::kVectors > 4 || !p.packed || promotes(p)) return 1;
    return p.m == 1 ? 4 : p.m == 2 ? 2 : 1;
  }

  // `count` panels from `panel` on, for one row or two.
  static void run_streams(const LinearParams& p, const X* x, int64_t x_stride, int64_t panel,
                          int64_t count) {
    if (count < streams(p)) {
      for (int64_t i = 0; i < count; ++i) PanelTask(p, x, x_stride, 0, p.m, panel + i).run();
      return;
    }
    float* acc = workspace().acc.get<float>(static_cast<size_t>(count * p.m * kRowFloats));
    const T* w = static_cast<const T*>(p.weight) + panel * kPanel * p.k;
    if constexpr (Math::kVectors <= 4) {
      if (p.m == 1)
        accumulate_panels<Math, 4, 1>(acc, x, x_stride, w, p.k / 2);
      else
        accumulate_panels<Math, 2, 2>(acc, x, x_stride, w, p.k / 2);
    }
    for (int64_t i = 0; i < count; ++i)
      PanelTask(p, x, x_stride, 0, p.m, panel + i, acc + i * p.m * kRowFloats).finish_rows(0, p.m);
  }

 private:
  static constexpr int kRowFloats = Math::kVectors * kLanes;

  // Pair rows k0 / 2 .. of the panel, in packed order.
  const T* source(int64_t k0, int64_t k1) const {
    const T* weight = static_cast<const T*>(p_.weight);
    if (p_.packed) return weight + panel_ * kPanel * p_.k + k0 * kPanel;
    T* out = workspace().packed.get<T>(static_cast<size_t>((k1 - k0 + 1) / 2 * kPairRow));
    pack_panel(out, weight + n0_ * p_.weight_stride + k0, p_.weight_stride, n_, k1 - k0);
    return out;
  }

  const X* decode(const T* w, int64_t pairs) const {
    X* out = workspace().decoded.get<X>(static_cast<size_t>(pairs * kPairRow));
    if constexpr (!std::is_same_v<T, X>)
      for (int64_t i = 0; i < pairs; ++i) Math::store_decoded(out + i * kPairRow, w + i * kPairRow);
    return out;
  }

  // Columns [k0, k1), their pair rows at w: W is T, or X when decoded.
  template <class W>
  void run_block(const W* w, int64_t k0, int64_t k1, int64_t ahead) {
    int64_t tiles = (rows_ + kTileRows - 1) / kTileRows;
    for (int64_t row = 0; tiles > 0; --tiles) {
      const int rows = static_cast<int>((rows_ - row + tiles - 1) / tiles);
      const int64_t step = total_ ? kScaleBlock : k1 - k0;
      int64_t k = k0;
      do {
        const int64_t end = k + step < k1 ? k + step : k1;
        const W* at = w + (k - k0) * kPanel;
        accumulate_rows<Math>(rows, acc_ + row * kRowFloats, total_ || k == 0,
                              x_ + row * x_stride_ + k, x_stride_, at, (end - k + 1) / 2, ahead);
        if (total_ || end == p_.k) finish_rows(row, row + rows, k / kScaleBlock, end == p_.k);
        k = end;
      } while (k < k1);
      row += rows;
    }
  }

  void finish_rows(int64_t begin, int64_t end, int64_t block = 0, bool last = true) {
    with_dtype(p_.out_dtype, [&](auto* t) {
      for (int64_t row = begin; row < end; ++row)
        finish<std::remove_pointer_t<decltype(t)>>(row, block, last);
    });
  }

  // Scales one row's sums, adds those of the blocks before and, after the last, stores the result.
  template <class Out>
  void finish(int64_t row, int64_t block, bool last) {
    if (!total_) block = 0;
    const float* acc = acc_ + row * kRowFloats;
    float* total = total_ + row * kPanel;
    Out* out = static_cast<Out*>(p_.out) + (m0_ + row) * p_.n + n0_;
    const int64_t group = blockwise_ ? block : 0;
    const Vec sx = broadcast(x_scale(p_, m0_ + row, group));
    for (int i = 0; i < kPanel; i += kLanes) {
      Vec v = Math::template features<T>(acc, i) * sx * load(scale_ + group * kPanel + i);
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
  const X* x_;  // the first row of this task
  int64_t x_stride_, m0_, rows_, panel_, n0_, n_;
  bool blockwise_;  // a scale to every 128 columns
  const float* scale_;
  float* acc_;              // [rows][kRowFloats] running sums, lane order
  float* total_ = nullptr;  // [rows][64] scaled sums of the finished blocks; null: one chain
};

template <class Math, class S, class T>
void run(const LinearParams& p, int threads) {
  using X = typename Math::X;
  const int64_t panels = (p.n + kPanel - 1) / kPanel;
  for (int64_t m0 = 0; m0 < p.m; m0 += kMaxRows) {
    const int64_t rows = p.m - m0 < kMaxRows ? p.m - m0 : kMaxRows;
    const X* x;
    int64_t x_stride;
    if (std::is_same_v<S, X> && p.k % 2 == 0) {
      x = static_cast<const X*>(p.x) + m0 * p.x_stride;
      x_stride = p.x_stride;
    } else {
      x = convert_rows<X, S>(p, m0, rows, threads);
      x_stride = p.k + p.k % 2;
    }
    using Task = PanelTask<Math, T>;
    if (const int streams = Task::streams(p); streams > 1) {
      parallel_for((panels + streams - 1) / streams, threads, [&](int64_t i) {
        const int64_t first = i * streams, left = panels - first;
        Task::run_streams(p, x, x_stride, first, left < streams ? left : streams);
      });
      return;
    }
    // Few panels: the rows are shared out too, at the price of decoding a panel more than once.
    int64_t splits = panels >= 4 * threads ? 1 : 4 * threads / panels;
    const int64_t most = (rows + 8 * kTileRows - 1) / (8 * kTileRows);
    if (splits > most) splits = most;
    const int64_t share = (rows + splits - 1) / splits;
    parallel_for(panels * splits, threads, [&](int64_t item) {
      const int64_t begin = item % splits * share;
      const int64_t count = rows - begin < share ? rows - begin : share;
      if (count > 0)
        Task(p, x + begin * x_stride, x_stride, m0 + begin, count, item / splits).run();
    });
  }
}

template <class S, class T>
void choose_math(const LinearParams& p, int threads) {
#if defined(LF_AVX512_BF16)
  constexpr bool kDot = (std::is_same_v<S, bf16> || std::is_same_v<S, e4m3>) &&
                        (std::is_same_v<T, bf16> || std::is_same_v<T, e4m3>);
  if constexpr (kDot) return run<DotMath, S, T>(p, threads);
#endif
  run<FmaMath, S, T>(p, threads);
}

}  // namespace

void linear(const LinearParams& p, int threads) {
  if (p.m == 0 || p.n == 0) return;
  if (p.x_dtype == DType::e4m3) return choose_math<e4m3, e4m3>(p, threads);
  with_dtype(p.x_dtype, [&](auto* t) {
    using S = std::remove_pointer_t<decltype(t)>;
    if (p.weight_dtype == DType::e4m3) return choose_math<S, e4m3>(p, threads);
    choose_math<S, S>(p, threads);
  });
}

void pack_weight(const void* weight, void* packed, int64_t n, int64_t k, int64_t stride,
                 int itemsize, int threads) {
  const auto pack = [&](auto unit) {
    using T = decltype(unit);
    parallel_for(n / kPanel, threads, [&](int64_t panel) {
      pack_panel(static_cast<T*>(packed) + panel * kPanel * k,
                 static_cast<const T*>(weight) + panel * kPanel * stride, stride, kPanel, k);
    });
  };
  if (itemsize == 1) return pack(e4m3{});
  if (itemsize == 2) return pack(bf16{});
  pack(float{});
}

}  // namespace lf::LF_ISA
