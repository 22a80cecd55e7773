// fp8_gemm and fp8_linear for few rows of x: out = (x @ weight^T) * x_scale * weight_scale + bias,
// summed in fp32 and rounded once. weight is e4m3; x is e4m3 (sm_89 and up) or 16-bit.
//
// Reading the weight, N * K bytes, sets the time, so the kernel streams it. A block takes 32
// features. Its eight warps cut k into eight runs, and each copies its own run through three stages
// of 32 x 128 bytes with cp.async. A block thus has 64 KB in flight while it multiplies; an H200
// needs 26 KB per multiprocessor (4.3 TB/s times 0.8 us). Plain loads to registers would need the
// compiler to keep that many together, and it did not.
//
//      a warp     copy 2 | copy 3 | copy 4 | ...      no barrier but __syncwarp
//                 mma 0  | mma 1  | mma 2  | ...
//
// A sum over k may take its terms in any order. So a lane's 16 neighboring bytes serve as the
// "columns" of two (e4m3) or four (16-bit) instructions, and x is loaded in the same order:
//
//      k:    0 .. 15   16 .. 31   32 .. 47   48 .. 63      64 bytes of a weight's row
//    lane:   4 n       4 n + 1    4 n + 2    4 n + 3       n = 0 .. 7: eight rows an instruction
//
// The warps add their sums in order through shared memory. The cuts depend on K alone, so an output
// is the same for any number of rows up to 64, which one block takes together, and whatever the
// other rows are. More rows are tiles of 64, each of which reads the weight again.
//
// For e4m3 x, each 128 of k is summed from zero and then added in fp32, times its block scales if
// any: the tensor cores of sm_89 keep about 14 bits of a sum of e4m3 products.
//
// On sm_90 an e4m3 mma.sync is two fp16 ones and conversions, still far below the matrix rate. x
// comes from L1 and L2, M / 32 of the weight's traffic.
#include "common/fp8.cuh"
#include "common/scales.cuh"

namespace lf::cuda {

// In linear_sm90.cu. Returns false if it does not support these arguments.
bool linear_sm90(const LinearParams& p, const Where& where);

namespace {

constexpr int kWarps = 8;
constexpr int kFeatures = 32;  // per block: four instructions of eight
constexpr int kTiles = kFeatures / 8;
constexpr int kRun = 64;  // values of k that the lanes of one instruction cover
constexpr int kScaleBlock = 128;
constexpr int kStages = 3, kStage = kFeatures * kScaleBlock;  // kStage: bytes per warp

// Loads 16 neighboring elements of a row as words. Elements past k_end become zero.
template <class T, bool aligned, int words>
LF_DEVICE void load_run(uint32_t (&w)[words], const T* row, int64_t k, int64_t k_end, bool valid) {
  static_assert(words * 4 == 16 * sizeof(T));
#pragma unroll
  for (int i = 0; i < words; ++i) w[i] = 0;
  if (!valid) return;
  if constexpr (aligned) {
    constexpr int per = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < words / 4; ++i)
      if (k + i * per < k_end) {
        const uint4 v = *reinterpret_cast<const uint4*>(row + k + i * per);
        w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
      }
  } else {
    constexpr int per = 4 / sizeof(T), bits = 8 * sizeof(T);
#pragma unroll
    for (int i = 0; i < words; ++i)
#pragma unroll 1  // unrolled, the loads in flight would spill
      for (int j = 0; j < per; ++j)
        if (k + i * per + j < k_end) {
          using Bits = std::conditional_t<sizeof(T) == 1, uint8_t, uint16_t>;
          const T* at = row + k + i * per + j;
          w[i] |= static_cast<uint32_t>(*reinterpret_cast<const Bits*>(at)) << j * bits;
        }
  }
}

// One warp's stages of the weight: [feature][128 of k]. The halves of odd features' 128 bytes are
// swapped, so that eight lanes reading 16 bytes each use all banks.
template <bool aligned>
class WeightStream {
 public:
  LF_DEVICE WeightStream(const LinearParams& p, int64_t n0, int64_t k_end, unsigned char* memory)
      : p_(p), n0_(n0), k_end_(k_end), memory_(memory) {}

  // Starts the copy of k0 .. k0 + 127. Elements past k_end or N become zero and are not read.
  LF_DEVICE void copy(int stage, int64_t k0) const {
    if (k0 >= k_end_) return;
    // Recomputed: the addresses of eight features would take 16 registers.
    const int lane = ptx::opaque(static_cast<int>(threadIdx.x) % 32), chunk = lane % 8;
    const int64_t k = k0 + chunk * 16, n = n0_ + lane / 8, left = k_end_ - k;
    const int count = left <= 0 ? 0 : left < 16 ? static_cast<int>(left) : 16;
    const int features = static_cast<int>(p_.n - n < kFeatures ? p_.n - n : kFeatures);
    const uint8_t* from = static_cast<const uint8_t*>(p_.weight) + n * p_.weight_stride + k;
    unsigned char* to = at(stage, lane / 8, chunk);
#pragma unroll
    for (int i = 0; i < kFeatures; i += 4) {
      const int there = i < features ? count : 0;
      if constexpr (aligned) {
        ptx::cp_async_16(to + i * kScaleBlock, from, there);
      } else {
#pragma unroll 1
        for (int e = 0; e < 16; ++e) to[i * kScaleBlock + e] = e < there ? from[e] : 0;
      }
      from += 4 * p_.weight_stride;
    }
  }

  LF_DEVICE uint4 read(int stage, int feature, int chunk) const {
    return *reinterpret_cast<const uint4*>(at(stage, feature, chunk));
  }

 private:
  LF_DEVICE unsigned char* at(int stage, int feature, int chunk) const {
    return memory_ + stage * kStage + feature * kScaleBlock + (chunk ^ feature % 2 * 4) * 16;
  }

  const LinearParams& p_;
  const int64_t n0_, k_end_;
  unsigned char* const memory_;
};

// Converts four e4m3 codes to two pairs of x's 16-bit type; NaN stays NaN.
template <class X>
LF_DEVICE void decode(uint32_t word, uint32_t (&pair)[2]) {
  pair[0] = from_e4m3x2(word & 0xffff), pair[1] = from_e4m3x2(word >> 16);
  if constexpr (std::is_same_v<X, __nv_bfloat16>) {
#pragma unroll
    for (uint32_t& two : pair) {
      const auto halves = *reinterpret_cast<const __half2*>(&two);
      const auto as_bf16 = __floats2bfloat162_rn(__low2float(halves), __high2float(halves));
      two = *reinterpret_cast<const uint32_t*>(&as_bf16);
    }
  }
}

struct Scales {
  ScaleAt x, weight;  // x.data is null if x is not FP8
};

template <class Out>
LF_DEVICE void finish(const LinearParams& p, int64_t m, int64_t n, float sum) {
  if (p.bias) sum += to_float(static_cast<const Out*>(p.bias)[n]);
  static_cast<Out*>(p.out)[m * p.n + n] = from_float<Out>(sum);
}

// X: uint8_t for e4m3, else bf16 or fp16. A block takes rows [row0, row0 + 16 * row_tiles).
template <class X, class Out, int row_tiles, bool aligned, bool blockwise>
__global__ void __launch_bounds__(kWarps * 32, row_tiles == 1 ? 2 : 1)
    few_rows_kernel(const LinearParams p, const Scales scales, int64_t feature_tiles) {
  LF_DYNAMIC_SHARED(memory);
  constexpr bool is_e4m3 = sizeof(X) == 1, promoted = blockwise || (is_e4m3 && ptx::kShortSums);
  constexpr int x_words = 16 * sizeof(X) / 4;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int group = lane / 4, quarter = lane % 4;
  const int64_t n0 = blockIdx.x % feature_tiles * kFeatures;
  const int64_t row0 = blockIdx.x / feature_tiles * 16 * row_tiles;
  const int64_t blocks = (p.k + kScaleBlock - 1) / kScaleBlock;
  // Runs are whole scale blocks, so that one warp sums a block.
  const int64_t share = (blocks + kWarps - 1) / kWarps * kScaleBlock;
  const int64_t k_begin = warp * share;
  const int64_t k_end = k_begin + share < p.k ? k_begin + share : p.k;

  const WeightStream<aligned> stream(p, n0, k_end, memory + warp * kStages * kStage);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    stream.copy(i, k_begin + i * kScaleBlock);
    ptx::cp_async_commit();
  }
  float sum[row_tiles][kTiles][4] = {}, part[row_tiles][kTiles][4] = {};
  int stage = 0;
  for (int64_t k0 = k_begin; k0 < k_end; k0 += kScaleBlock) {
    ptx::cp_async_wait<kStages - 2>();
    __syncwarp();  // other lanes' copies have landed, and they have read the previous stage
    stream.copy(stage == 0 ? kStages - 1 : stage - 1, k0 + (kStages - 1) * kScaleBlock);
    ptx::cp_async_commit();
#pragma unroll(row_tiles == 4 || blockwise ? 1 : 2)  // unrolled, x's early loads would spill
    for (int half = 0; half < 2; ++half) {
      const int64_t k = k0 + half * kRun + quarter * 16;
      uint32_t w[kTiles][4];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint4 v = stream.read(stage, tile * 8 + group, half * 4 + quarter);
        w[tile][0] = v.x, w[tile][1] = v.y, w[tile][2] = v.z, w[tile][3] = v.w;
      }
#pragma unroll
      for (int r = 0; r < row_tiles; ++r) {
        uint32_t low[x_words], high[x_words];  // rows group and group + 8
        // Recomputed: the addresses of eight rows would take 16 registers.
        const int64_t m = row0 + ptx::opaque(r * 16 + group);
        const X* x = static_cast<const X*>(p.x);
        load_run<X, aligned>(low, x + m * p.x_stride, k, k_end, m < p.m);
        load_run<X, aligned>(high, x + (m + 8) * p.x_stride, k, k_end, m + 8 < p.m);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          float (&d)[4] = promoted ? part[r][tile] : sum[r][tile];
          if constexpr (is_e4m3) {
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
              const uint32_t a[4] = {low[i], high[i], low[i + 1], high[i + 1]};
              ptx::mma_16832_e4m3(d, a, w[tile][i], w[tile][i + 1]);
            }
          } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              uint32_t b[2];
              decode<X>(w[tile][i], b);
              const uint32_t a[4] = {low[2 * i], high[2 * i], low[2 * i + 1], high[2 * i + 1]};
              ptx::mma_16816(d, a, b[0], b[1], X{});
            }
          }
        }
      }
    }
    stage = stage == kStages - 1 ? 0 : stage + 1;
    if constexpr (blockwise) {
      const int64_t block = k0 / kScaleBlock;
      float of_feature[kTiles][2];
      const int64_t n1 = n0 + ptx::opaque(quarter * 2), m1 = row0 + ptx::opaque(group);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int64_t n = n1 + tile * 8 + i;  // past the last feature: dropped at the end
          of_feature[tile][i] = *scales.weight(n < p.n ? n : p.n - 1, block);
        }
#pragma unroll
      for (int r = 0; r < row_tiles; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t m = m1 + r * 16 + half * 8;
          float of_row = 1;
          if (scales.x.data) of_row = *scales.x(m < p.m ? m : p.m - 1, block);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              sum[r][tile][2 * half + i] +=
                  part[r][tile][2 * half + i] * (of_row * of_feature[tile][i]);
              part[r][tile][2 * half + i] = 0;
            }
        }
    } else if constexpr (promoted) {
#pragma unroll
      for (int r = 0; r < row_tiles; ++r)
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sum[r][tile][i] += part[r][tile][i];
            part[r][tile][i] = 0;
          }
    }
  }
  ptx::cp_async_wait<0>();
  // The warps' sums are added in order, one row tile at a time: [warp][feature tile][lane][4].
  auto* scratch = reinterpret_cast<float4*>(memory);
#pragma unroll
  for (int r = 0; r < row_tiles; ++r) {
    __syncthreads();  // the stages or the previous row tile have been read
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
      scratch[(warp * kTiles + tile) * 32 + lane] =
          float4{sum[r][tile][0], sum[r][tile][1], sum[r][tile][2], sum[r][tile][3]};
    __syncthreads();
    if (warp >= kTiles) continue;  // warp t finishes feature tile t
    float total[4] = {};
#pragma unroll
    for (int other = 0; other < kWarps; ++other) {
      const float4 v = scratch[(other * kTiles + warp) * 32 + lane];
      total[0] += v.x, total[1] += v.y, total[2] += v.z, total[3] += v.w;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t m = row0 + r * 16 + group + i / 2 * 8;
      const int64_t n = n0 + warp * 8 + quarter * 2 + i % 2;
      if (m >= p.m || n >= p.n) continue;
      if constexpr (!blockwise) {
        if (scales.x.data) total[i] *= *scales.x(m);
        total[i] *= *scales.weight(n);
      }
      finish<Out>(p, m, n, total[i]);
    }
  }
}

LF_DEVICE float of_code(uint8_t code) {
  const uint32_t pair = from_e4m3x2(code);
  return __low2float(*reinterpret_cast<const __half2*>(&pair));
}

// For x without a matrix instruction: fp32, and e4m3 below sm_89. One warp per output.
template <class X, class Out>
__global__ void __launch_bounds__(kWarps * 32)
    plain_kernel(const LinearParams p, const Scales scales) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (item >= p.m * p.n) return;
  const int64_t m = item / p.n, n = item % p.n;
  const X* x = static_cast<const X*>(p.x) + m * p.x_stride;
  const uint8_t* w = static_cast<const uint8_t*>(p.weight) + n * p.weight_stride;
  const int64_t blocks = (p.k + kScaleBlock - 1) / kScaleBlock;
  float total = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    float sum = 0;
    const int64_t k0 = block * kScaleBlock, k1 = k0 + kScaleBlock < p.k ? k0 + kScaleBlock : p.k;
    for (int64_t k = k0 + lane; k < k1; k += 32) {
      float value;
      if constexpr (sizeof(X) == 1)
        value = of_code(x[k]);
      else
        value = to_float(x[k]);
      sum += value * of_code(w[k]);
    }
    const float of_row = scales.x.data ? *scales.x(m, block) : 1.0f;
    total += sum * (of_row * *scales.weight(n, block));
  }
  total = reduce_warp(total, Sum{});
  if (lane == 0) finish<Out>(p, m, n, total);
}

Scales scales_of(const LinearParams& p) {
  return {scale_at(p.x_scale, p.x_granularity, p.k),
          scale_at(p.weight_scale, p.weight_granularity, p.k, p.weight_block_rows)};
}

template <class X, class Out>
void plain(const LinearParams& p, const Where& where) {
  const int64_t blocks = (p.m * p.n + kWarps - 1) / kWarps;
  launch(where,
         {"fp8_gemm", {p.m, p.n, p.k}, dim3(static_cast<unsigned>(blocks)), dim3(kWarps * 32)},
         plain_kernel<X, Out>, p, scales_of(p));
}

template <class X, class Out, int row_tiles, bool aligned, bool blockwise>
void few_rows(const LinearParams& p, const Where& where) {
  const int64_t feature_tiles = (p.n + kFeatures - 1) / kFeatures;
  const int64_t rows = 16 * row_tiles, row_blocks = (p.m + rows - 1) / rows;
  launch(where,
         {"fp8_gemm",
          {p.m, p.n, p.k},
          dim3(static_cast<unsigned>(feature_tiles * row_blocks)),
          dim3(kWarps * 32),
          kWarps * kStages * kStage},
         few_rows_kernel<X, Out, row_tiles, aligned, blockwise>, p, scales_of(p), feature_tiles);
}

template <class X, class Out>
void run(const LinearParams& p, const Where& where) {
  if constexpr (std::is_same_v<X, float>) {
    return plain<X, Out>(p, where);
  } else {
    const bool blockwise = p.x_granularity == Scale::block || p.weight_granularity == Scale::block;
    const bool aligned = p.k % 16 == 0 && p.x_stride % 16 == 0 && p.weight_stride % 16 == 0 &&
                         is_aligned(p.x) && is_aligned(p.weight);
    if (!aligned)
      return blockwise ? few_rows<X, Out, 1, false, true>(p, where)
                       : few_rows<X, Out, 1, false, false>(p, where);
    // Block scales need a second set of sums, which beside the sums of 64 rows would spill.
    if (blockwise)
      return p.m <= 16 ? few_rows<X, Out, 1, true, true>(p, where)
                       : few_rows<X, Out, 2, true, true>(p, where);
    if (p.m <= 16) return few_rows<X, Out, 1, true, false>(p, where);
    if (p.m <= 32) return few_rows<X, Out, 2, true, false>(p, where);
    few_rows<X, Out, 4, true, false>(p, where);
  }
}

}  // namespace

void linear(const LinearParams& p, const Where& where) {
  if (p.weight_dtype != DType::e4m3 || p.packed)
    throw std::runtime_error("fp8_gemm: needs an e4m3 weight that is not packed");
  if (linear_sm90(p, where)) return;
  if (p.x_dtype != DType::e4m3)
    return with_dtype(p.x_dtype, "fp8_linear", [&](auto t) {
      using T = decltype(t);
      run<T, T>(p, where);
    });
  with_dtype(p.out_dtype, "fp8_gemm", [&](auto t) {
    using Out = decltype(t);
    if (device_of(where).sm >= 89) return run<uint8_t, Out>(p, where);
    plain<uint8_t, Out>(p, where);
  });
}

}  // namespace lf::cuda
