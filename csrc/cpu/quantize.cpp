// quantize_fp8: a scale per tensor, row, 1x128 block or 128x128 block (the rule: quantize_row.h).
//
// Memory-bound: 3 bytes per element from bf16, since the second pass over a row or block finds it
// in L1 or L2. A whole tensor must be read twice: 5 bytes per element.
#include "kernels.h"
#include "parallel.h"
#include "quantize_row.h"
#include "simd.h"

namespace lf::LF_ISA {
namespace {

constexpr int64_t kBlockCols = 128;
constexpr int64_t kGrain = 16384;  // elements per work item: 5 us, enough to hide its dispatch

template <class T>
struct Quantizer {
  const QuantizeParams& p;
  int threads;

  const T* row(int64_t i) const { return static_cast<const T*>(p.x) + i * p.x_stride; }
  e4m3* out(int64_t i) const { return static_cast<e4m3*>(p.q) + i * p.cols; }

  void by_row() const {
    parallel_chunks(p.rows, kGrain / p.cols, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        p.scale[i] = quantize_row(out(i), row(i), p.cols, p.scale_ub);
    });
  }

  void by_block() const {
    const int64_t across = (p.cols + kBlockCols - 1) / kBlockCols;
    const int64_t down = (p.rows + p.block_rows - 1) / p.block_rows;
    const int64_t grain = kGrain / (p.block_rows * kBlockCols);
    parallel_chunks(down * across, grain, threads, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t top = block / across * p.block_rows, left = block % across * kBlockCols;
        const int64_t bottom = top + p.block_rows < p.rows ? top + p.block_rows : p.rows;
        const int64_t width = left + kBlockCols < p.cols ? kBlockCols : p.cols - left;
        float largest = 0.0f;
        for (int64_t i = top; i < bottom; ++i)
          largest = max_amax(largest, amax(row(i) + left, width));
        p.scale[block] = fp8_scale(largest, p.scale_ub);
        for (int64_t i = top; i < bottom; ++i)
          scale_to_fp8(out(i) + left, row(i) + left, width, p.scale[block], largest);
      }
    });
  }

  void by_tensor() const {
    constexpr int64_t kMaxParts = 64;
    float largest[kMaxParts + 1] = {};  // [0]: the overall maximum
    const int64_t part = (p.rows + kMaxParts - 1) / kMaxParts;
    const int64_t grain = part > kGrain / p.cols ? part : kGrain / p.cols;
    parallel_chunks(p.rows, grain, threads, [&](int64_t begin, int64_t end) {
      float& mine = largest[1 + begin / (grain < 1 ? 1 : grain)];
      for (int64_t i = begin; i < end; ++i) mine = max_amax(mine, amax(row(i), p.cols));
    });
    for (int64_t i = 1; i <= kMaxParts; ++i) largest[0] = max_amax(largest[0], largest[i]);
    p.scale[0] = fp8_scale(largest[0], p.scale_ub);
    parallel_chunks(p.rows, grain, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        scale_to_fp8(out(i), row(i), p.cols, p.scale[0], largest[0]);
    });
  }
};

}  // namespace

void quantize(const QuantizeParams& p, int threads) {
  with_dtype(p.dtype, [&](auto* t) {
    const Quantizer<std::remove_pointer_t<decltype(t)>> quantizer{p, threads};
    if (p.granularity == Scale::row) return quantizer.by_row();
    if (p.granularity == Scale::block) return quantizer.by_block();
    quantizer.by_tensor();
  });
}

}  // namespace lf::LF_ISA
