// Attention of one fp32 query by one warp, with plain FMAs, since tensor cores would round fp32. A
// lane takes every 32nd key for the scores and every 32nd column for the sums.
#pragma once

#include "attention_tile.cuh"
#include "fp8.cuh"

namespace lf::cuda {

constexpr int kFp32Warps = 4;  // per block, each with its own query
constexpr int kFp32Columns = 256 / 32;
constexpr int kFp32SharedBytes = kFp32Warps * (256 + 32) * 4;

struct Fp32Row {
  float acc[kFp32Columns];  // columns lane, lane + 32, ...
  float top, total;         // total: this lane's keys only, until finish
};

LF_DEVICE float cache_value(const float* row, int d) { return row[d]; }
LF_DEVICE float cache_value(const uint8_t* row, int d) {
  const uint32_t pair = from_e4m3x2(row[d]);
  return __low2float(*reinterpret_cast<const __half2*>(&pair));
}

// Takes keys [first, last). at(key, k, v) sets the addresses of a key's rows and returns whether it
// exists. memory: the block's kFp32SharedBytes.
template <class Cache, class At>
LF_DEVICE Fp32Row attend_fp32(const float* query, int head_dim, int64_t first, int64_t last,
                              float scale, float* memory, At at) {
  const int lane = lane_id();
  float* q = memory + threadIdx.x / 32 * (256 + 32);
  float* p = q + 256;
  for (int d = lane; d < head_dim; d += 32) q[d] = query[d];
  Fp32Row r{{}, kMinusInfinity, 0};
  for (int64_t begin = first; begin < last; begin += 32) {
    __syncwarp();  // q is written; p has been read
    const Cache *k = nullptr, *v = nullptr;
    const bool exists = begin + lane < last && at(begin + lane, k, v);
    const unsigned seen = __ballot_sync(0xffffffffu, exists);
    float score = kMinusInfinity;
    if (exists) {
      float sum = 0;
      for (int d = 0; d < head_dim; ++d) sum = fmaf(q[d], cache_value(k, d), sum);
      score = sum * scale;
    }
    const float higher =
        fmaxf(r.top, reduce_warp(score, [](float a, float b) { return fmaxf(a, b); }));
    const float base = base_of(higher), shrink = ptx::exp2_approx(r.top - base);
    const float mine = ptx::exp2_approx(score - base);
    r.total = r.total * shrink + mine;
    r.top = higher;
    p[lane] = mine;
    __syncwarp();
#pragma unroll
    for (int c = 0; c < kFp32Columns; ++c) r.acc[c] *= shrink;
    for (int j = 0; j < 32; ++j) {
      if (!(seen >> j & 1)) continue;
      at(begin + j, k, v);
#pragma unroll
      for (int c = 0; c < kFp32Columns; ++c)
        if (lane + 32 * c < head_dim)
          r.acc[c] = fmaf(p[j], cache_value(v, lane + 32 * c), r.acc[c]);
    }
  }
  r.total = reduce_warp(r.total, Sum{});
  return r;
}

}  // namespace lf::cuda
