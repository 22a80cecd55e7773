// fp8_gemm for many rows on Hopper: out = (x @ weight^T) * x_scale * weight_scale + bias.
//
// Persistent: a block a multiprocessor walks tiles of 128 rows by kN features (256; 128 with block
// scales or few tiles), in groups of rows that share their weights in L2. Three warpgroups:
//
//   producer   | load k0 | load k1 | load k2 | ...            TMA, four stages of 128 in k
//   consumer 0 |    .    | wgmma 0 | wgmma 1 | ... | store    64 rows each, all kN features
//   consumer 1 |    .    | wgmma 0 | wgmma 1 | ... | store
//
// A stage is 16 KB of x and kN * 128 bytes of weight under the 128-byte swizzle; full[stage] counts
// TMA's bytes, empty[stage] the consumers' eight warps. One wgmma group stays in flight while the
// stage before it is handed back.
//
// Row and tensor scales: one chain of sums in the tensor cores over all of k, scaled at the end
// (what torch._scaled_mm calls use_fast_accum; the cores keep about 14 bits of a sum). Block
// scales: each 128 of k is summed from zero and added in fp32 with its scales, which also restores
// the precision.
//
// Cost: 2 M N K FLOPs. Limit on H200 about 1,580 TFLOP/s: a stage of 128 x 256 x 128 is 1,024
// cycles of wgmma against 48 KB from L2, 47 bytes a cycle. By blocks the promotion adds 64 fma for
// each four wgmma a thread, beside the other consumer's products. Predicted: docs/kernels.md.
//
// An output's sums do not depend on the tile, M or the number of multiprocessors.
#include "common/tensor_map.h"
#include "common/vector.cuh"

namespace lf::cuda {
namespace {

constexpr int kM = 128, kK = 128, kStages = 4, kRowsEach = 64;
constexpr int kStore = kRowsEach * 128;  // bytes of a box of the output: 64 rows of 128 bytes
constexpr int kGroup = 16;               // row tiles that walk the features together

template <int kN>
struct Shared {
  unsigned char x[kStages][kM * kK];
  unsigned char weight[kStages][kN * kK];
  unsigned char out[2][2][kStore];  // [consumer][buffer]
  uint64_t full[kStages], empty[kStages];
};

struct Problem {
  LinearParams p;
  int tiles_m, tiles_n, k_blocks;
  bool tma_store;
};

struct Tile {
  int m, n;  // first row and feature
};
template <int kN>
LF_DEVICE Tile tile_at(const Problem& problem, int index) {
  const int per_group = kGroup * problem.tiles_n, group = index / per_group;
  const int first = group * kGroup;
  const int height = problem.tiles_m - first < kGroup ? problem.tiles_m - first : kGroup;
  const int within = index % per_group;
  return {(first + within % height) * kM, within / height * kN};
}

// Which of four stages the i-th load uses, and the parity of its barriers' phase then.
struct Turn {
  int stage, parity;
};
LF_DEVICE Turn turn(uint32_t i) {
  return {static_cast<int>(i % kStages), static_cast<int>(i / kStages % 2)};
}

LF_DEVICE float block_scale(const float* scale, Scale granularity, int64_t row, int block,
                            int blocks) {
  if (granularity == Scale::tensor) return scale[0];
  return granularity == Scale::row ? scale[row] : scale[row * blocks + block];
}

// A warp's share of the output, rows group and group + 8 of its 16, features 8 j + 2 quarter + ...:
// through shared memory and TMA, 64 features at a time, or straight out where N does not allow TMA.
template <class Out, int kN>
LF_DEVICE void store_tile(const Problem& problem, const CUtensorMap* out_map, Shared<kN>& shared,
                          const float (&sum)[kN / 2], const Tile& tile, int consumer) {
  const LinearParams& p = problem.p;
  const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
  const auto pair = [&](int j, int half) {
    const int64_t n = tile.n + j * 8 + column;
    float v[2] = {sum[j * 4 + half * 2], sum[j * 4 + half * 2 + 1]};
    if (p.bias)
      for (int i = 0; i < 2; ++i)
        if (n + i < p.n) v[i] += to_float(static_cast<const Out*>(p.bias)[n + i]);
    return float2{v[0], v[1]};
  };
  if (sizeof(Out) == 4 || !problem.tma_store) {
#pragma unroll
    for (int j = 0; j < kN / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t m = tile.m + consumer * kRowsEach + row + half * 8;
        const int64_t n = tile.n + j * 8 + column;
        if (m >= p.m) continue;
        const float2 v = pair(j, half);
        Out* out = static_cast<Out*>(p.out) + m * p.n + n;
        if (n < p.n) out[0] = from_float<Out>(v.x);
        if (n + 1 < p.n) out[1] = from_float<Out>(v.y);
      }
    return;
  }
#pragma unroll
  for (int box = 0; box < kN / 64; ++box) {
    unsigned char* buffer = shared.out[consumer][box % 2];
    if (thread == 0) ptx::tma_store_wait<1>();  // the buffer's last store has read it
    ptx::named_barrier_sync(1 + consumer, 128);
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 v = pair(box * 8 + j, half);
        const int r = row + half * 8, at = r * 128 + ((j ^ r % 8) << 4) + column * 2;
        Out two[2] = {from_float<Out>(v.x), from_float<Out>(v.y)};
        *reinterpret_cast<uint32_t*>(buffer + at) = *reinterpret_cast<const uint32_t*>(two);
      }
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(1 + consumer, 128);
    if (thread == 0) {
      ptx::tma_store_2d(out_map, buffer, tile.n + box * 64, tile.m + consumer * kRowsEach);
      ptx::tma_store_commit();
    }
  }
}

template <class Out, int kN, bool blockwise>
__global__ void __launch_bounds__(384, 1)
    many_rows_kernel(const Problem problem, const __grid_constant__ CUtensorMap x_map,
                     const __grid_constant__ CUtensorMap weight_map,
                     const __grid_constant__ CUtensorMap out_map) {
  LF_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<Shared<kN>*>(memory);
  const LinearParams& p = problem.p;
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  const int tiles = problem.tiles_m * problem.tiles_n, blocks = static_cast<int>(gridDim.x);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&shared.full[i], 1);
      ptx::mbarrier_init(&shared.empty[i], 8);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();

  if (warpgroup == 2) {
    ptx::registers_decrease<40>();
    if (threadIdx.x % 128 == 0) {
      uint32_t loads = 0;
      for (int t = static_cast<int>(blockIdx.x); t < tiles; t += blocks) {
        const Tile tile = tile_at<kN>(problem, t);
        for (int k = 0; k < problem.k_blocks; ++k, ++loads) {
          const auto [stage, parity] = turn(loads);
          ptx::mbarrier_wait(&shared.empty[stage], parity ^ 1);
          ptx::mbarrier_arrive_expect(&shared.full[stage], (kM + kN) * kK);
          ptx::tma_load_2d(shared.x[stage], &x_map, &shared.full[stage], k * kK, tile.m);
          ptx::tma_load_2d(shared.weight[stage], &weight_map, &shared.full[stage], k * kK, tile.n);
        }
      }
    }
  } else {
    ptx::registers_increase<232>();
    const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32;
    const int row = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
    uint32_t loads = 0;
    const auto release = [&](uint32_t load) {
      if (lane == 0) ptx::mbarrier_arrive(&shared.empty[turn(load).stage]);
    };
    const auto multiply = [&](float (&d)[kN / 2], int stage, bool accumulate) {
      const unsigned char* x = shared.x[stage] + warpgroup * kRowsEach * kK;
#pragma unroll
      for (int k = 0; k < kK; k += 32)
        ptx::wgmma<__nv_fp8_e4m3, false>(d, ptx::wgmma_descriptor(x + k),
                                         ptx::wgmma_descriptor(shared.weight[stage] + k),
                                         accumulate || k > 0);
    };
    for (int t = static_cast<int>(blockIdx.x); t < tiles; t += blocks) {
      const Tile tile = tile_at<kN>(problem, t);
      float sum[kN / 2];
      const int64_t m[2] = {tile.m + warpgroup * kRowsEach + row,
                            tile.m + warpgroup * kRowsEach + row + 8};
      if constexpr (!blockwise) {
        for (int k = 0; k < problem.k_blocks; ++k, ++loads) {
          const auto [stage, parity] = turn(loads);
          ptx::mbarrier_wait(&shared.full[stage], parity);
          ptx::wgmma_fence();
          multiply(sum, stage, k > 0);
          ptx::wgmma_commit();
          ptx::wgmma_wait<1>();  // the stage before this one has been read
          if (k > 0) release(loads - 1);
        }
        ptx::wgmma_wait<0>();
        release(loads - 1);
        float of_row[2];
#pragma unroll
        for (int h = 0; h < 2; ++h)
          of_row[h] = m[h] < p.m ? block_scale(p.x_scale, p.x_granularity, m[h], 0, 1) : 0.0f;
#pragma unroll
        for (int i = 0; i < kN / 2; ++i) {
          const int64_t n = tile.n + i / 4 * 8 + column + i % 2;
          const float of_column =
              n < p.n ? block_scale(p.weight_scale, p.weight_granularity, n, 0, 1) : 0.0f;
          sum[i] *= of_row[i % 4 / 2] * of_column;
        }
      } else {
#pragma unroll
        for (float& s : sum) s = 0;
        for (int k = 0; k < problem.k_blocks; ++k, ++loads) {
          const auto [stage, parity] = turn(loads);
          // The weights' block of 128 features is this tile: kN = 128.
          const int64_t weight_row = p.weight_granularity == Scale::block ? tile.n / kN : tile.n;
          float of_row[2];
          const float of_block =
              block_scale(p.weight_scale, p.weight_granularity, weight_row, k, problem.k_blocks);
#pragma unroll
          for (int h = 0; h < 2; ++h)
            of_row[h] = m[h] < p.m ? of_block * block_scale(p.x_scale, p.x_granularity, m[h], k,
                                                            problem.k_blocks)
                                   : 0.0f;
          float part[kN / 2];
          ptx::mbarrier_wait(&shared.full[stage], parity);
          ptx::wgmma_fence();
          multiply(part, stage, false);
          ptx::wgmma_commit();
          ptx::wgmma_wait<0>();
          release(loads);
#pragma unroll
          for (int i = 0; i < kN / 2; ++i) sum[i] += part[i] * of_row[i % 4 / 2];
        }
      }
      store_tile<Out, kN>(problem, &out_map, shared, sum, tile, warpgroup);
    }
    if (thread == 0) ptx::tma_store_wait<0>();  // shared memory outlives its readers
  }
}

CUtensorMap bytes_map(const void* data, int64_t rows, int64_t k, int64_t stride, int box_rows) {
  return tensor_map({data,
                     DType::e4m3,
                     2,
                     {static_cast<uint64_t>(k), static_cast<uint64_t>(rows)},
                     {1, static_cast<uint64_t>(stride)},
                     {kK, static_cast<uint32_t>(box_rows)},
                     true},
                    "fp8_gemm");
}

template <class Out, int kN, bool blockwise>
void run(const LinearParams& p, const Where& where) {
  Problem problem{p, static_cast<int>((p.m + kM - 1) / kM), static_cast<int>((p.n + kN - 1) / kN),
                  static_cast<int>((p.k + kK - 1) / kK),
                  sizeof(Out) == 2 && p.n % 8 == 0 && is_aligned(p.out)};
  const CUtensorMap x_map = bytes_map(p.x, p.m, p.k, p.x_stride, kM);
  const CUtensorMap weight_map = bytes_map(p.weight, p.n, p.k, p.weight_stride, kN);
  CUtensorMap out_map{};
  if (problem.tma_store)
    out_map = tensor_map({p.out,
                          p.out_dtype,
                          2,
                          {static_cast<uint64_t>(p.n), static_cast<uint64_t>(p.m)},
                          {1, static_cast<uint64_t>(p.n)},
                          {64, kRowsEach},
                          true},
                         "fp8_gemm");
  const int tiles = problem.tiles_m * problem.tiles_n;
  const int blocks =
      tiles < device_of(where).multiprocessors ? tiles : device_of(where).multiprocessors;
  launch(where,
         {"fp8_gemm",
          {p.m, p.n, p.k},
          dim3(static_cast<unsigned>(blocks)),
          dim3(384),
          sizeof(Shared<kN>)},
         many_rows_kernel<Out, kN, blockwise>, problem, x_map, weight_map, out_map);
}

template <class Out>
void run(const LinearParams& p, const Where& where, bool blockwise) {
  if (blockwise) return run<Out, 128, true>(p, where);
  // Wide tiles read less, unless they leave multiprocessors without one.
  if constexpr (sizeof(Out) == 2) {  // fp32's stores would spill beside 128 sums a thread
    const int64_t wide = (p.m + kM - 1) / kM * ((p.n + 255) / 256);
    if (wide >= device_of(where).multiprocessors) return run<Out, 256, false>(p, where);
  }
  run<Out, 128, false>(p, where);
}

}  // namespace

// False where these arguments are for the portable kernel: few rows, other types, rows that TMA
// cannot step over, block scales of single weight rows.
bool linear_sm90(const LinearParams& p, const Where& where) {
  constexpr int64_t kFew = 64;
  const bool by_rows = p.weight_granularity == Scale::row || p.weight_granularity == Scale::tensor;
  const bool blockwise = p.x_granularity == Scale::block || p.weight_granularity == Scale::block;
  if (device_of(where).sm != 90 || p.m <= kFew || p.x_dtype != DType::e4m3) return false;
  if (p.x_stride % 16 || p.weight_stride % 16 || !is_aligned(p.x) || !is_aligned(p.weight))
    return false;
  if (blockwise && (by_rows ? p.weight_granularity == Scale::row : p.weight_block_rows != 128))
    return false;
  with_dtype(p.out_dtype, "fp8_gemm", [&](auto t) { run<decltype(t)>(p, where, blockwise); });
  return true;
}

}  // namespace lf::cuda
