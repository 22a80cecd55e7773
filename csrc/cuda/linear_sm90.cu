// fp8_gemm for many rows on Hopper: out = (x @ weight^T) * x_scale * weight_scale + bias.
//
// Persistent: a block per multiprocessor walks tiles of 128 rows by kN features (256; 128 for fp32
// results or few tiles), in groups of rows that share their weights in L2. Two blocks with
// neighboring rows and the same features form a cluster, and each copies half of the weight to
// both. A block has three warpgroups:
//
//   producer   | load k0 | load k1 | load k2 | ...            TMA, four stages of 128 in k
//   consumer 0 |    .    | wgmma 0 a, + | wgmma 0 b, + | ... | store    64 rows each,
//   consumer 1 |    .    |   wgmma 0 a, + | wgmma 0 b, + | ... | store  all kN features
//
// A stage is 16 KB of x and kN * 128 bytes of weight under the 128-byte swizzle. With block scales
// it also holds the 128 + kN / 128 scales of that k, which the producer's other threads copy.
// full[stage] counts TMA's bytes and those copies. empty[stage] counts the consumers of both
// blocks, eight warps each.
//
// Hopper's tensor cores keep about 14 bits of a sum of e4m3 products. So each 128 of k is summed
// there from zero, for 128 features at a time (a, b), and added in fp32: with block scales by an
// FMA with them, otherwise plainly, with the scales at the end. One consumer adds while the other
// multiplies. Sums of 256 features and products of 128 take 192 registers.
//
// Cost: 2 M N K FLOPs. The limit on H200 is about 1,580 TFLOP/s: a stage of 128 x 256 x 128 takes
// 1,024 cycles of wgmma, 32 KB from L2 (31 bytes a cycle; 47 without clusters), and 2 x 64 fp32
// additions by each consumer thread.
//
// An output's sums do not depend on the tile, M or the number of multiprocessors.
#include "common/scales.cuh"
#include "common/tensor_map.h"

namespace lf::cuda {
namespace {

constexpr int kM = 128, kK = 128, kStages = 4, kRowsEach = 64;
constexpr int kPart = 128;               // features with products summed at once
constexpr int kStore = kRowsEach * 128;  // bytes of a box of the output: 64 rows of 128 bytes
constexpr int kGroup = 16;               // row tiles that walk the features together

template <class Out, int kN, bool blockwise>
struct Shared {
  unsigned char x[kStages][kM * kK];
  unsigned char weight[kStages][kN * kK];
  unsigned char out[2][2][kStore];  // [consumer][buffer]
  // Block scales of a stage, otherwise the scales of a tile.
  float of_row[blockwise ? kStages : 1][kM];
  float of_feature[blockwise ? kStages : 1][blockwise ? kN / kPart : kN];
  Out bias[kN];
  uint64_t full[kStages], empty[kStages], tile_full, tile_empty;
};

enum class Store { elements, pairs, tma };

struct Problem {
  LinearParams p;
  int cluster;                     // 1 or 2 blocks, with neighboring rows
  int tiles_m, tiles_n, k_blocks;  // tiles_m: pairs of tiles if cluster is 2
  ScaleAt x, weight;
  Store store;
};

struct Tile {
  int m, n;  // first row and feature
};
template <int kN>
LF_DEVICE Tile tile_at(const Problem& problem, int index) {
  const int most = kGroup / problem.cluster, per_group = most * problem.tiles_n;
  const int first = index / per_group * most;
  const int height = problem.tiles_m - first < most ? problem.tiles_m - first : most;
  const int within = index % per_group;
  const int m = (first + within % height) * problem.cluster + static_cast<int>(ptx::cluster_rank());
  return {m * kM, within / height * kN};
}

// Calls f with each of this block's tiles.
template <int kN, class F>
LF_DEVICE void for_tiles(const Problem& problem, F&& f) {
  const int tiles = problem.tiles_m * problem.tiles_n;
  const int step = static_cast<int>(gridDim.x) / problem.cluster;
  for (int t = static_cast<int>(blockIdx.x) / problem.cluster; t < tiles; t += step)
    f(tile_at<kN>(problem, t));
}

// Stage (of four) of the i-th load, and the parity of its barriers' phase.
struct Turn {
  int stage, parity;
};
LF_DEVICE Turn turn(uint32_t i) {
  return {static_cast<int>(i % kStages), static_cast<int>(i / kStages % 2)};
}

// The producer's threads: one loads x and the weight, all load a stage's block scales (a row each),
// and three warps load what a tile needs at its end.
template <class Out, int kN, bool blockwise>
LF_DEVICE void produce(const Problem& problem, const CUtensorMap& x_map,
                       const CUtensorMap& weight_map, Shared<Out, kN, blockwise>& shared) {
  const LinearParams& p = problem.p;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  uint32_t loads = 0, tiles = 0;
  for_tiles<kN>(problem, [&](const Tile& tile) {
    if (blockwise || thread == 0) {
      const int64_t m = tile.m + thread, n = tile.n + thread * kPart;
      const bool in_m = m < p.m, in_n = n < p.n;
      const float* of_row = problem.x(in_m ? m : 0);
      const float* of_part = problem.weight(in_n ? n : 0);
#pragma unroll 1  // unrolled, it spills
      for (int k = 0; k < problem.k_blocks; ++k, ++loads) {
        const auto [stage, parity] = turn(loads);
        uint64_t* const full = &shared.full[stage];
        ptx::mbarrier_wait(&shared.empty[stage], parity ^ 1);
        if (thread == 0) {
          ptx::mbarrier_arrive_expect(full, (kM + kN) * kK);
          ptx::tma_load_2d(shared.x[stage], &x_map, full, k * kK, tile.m);
          if (problem.cluster == 1) {
            ptx::tma_load_2d(shared.weight[stage], &weight_map, full, k * kK, tile.n);
          } else {  // this half goes to both blocks; the other block sends the other half
            const int half = static_cast<int>(ptx::cluster_rank()) * (kN / 2);
            ptx::tma_load_2d_multicast(shared.weight[stage] + half * kK, &weight_map, full, k * kK,
                                       tile.n + half, 3);
          }
        }
        if constexpr (blockwise) {
          ptx::cp_async_4(&shared.of_row[stage][thread], of_row, in_m ? 4 : 0);
          if (thread < kN / kPart)
            ptx::cp_async_4(&shared.of_feature[stage][thread], of_part, in_n ? 4 : 0);
          ptx::cp_async_arrive(full);
          of_row += problem.x.of_k;
          of_part += problem.weight.of_k;
        }
      }
    }
    if (thread < 32) return;
    ptx::mbarrier_wait(&shared.tile_empty, static_cast<int>(tiles++ % 2) ^ 1);
    for (int i = thread - 32; i < kN; i += 96) {
      const int64_t m = tile.m + i, n = tile.n + i;
      if constexpr (!blockwise) {
        if (i < kM) shared.of_row[0][i] = m < p.m ? *problem.x(m) : 0.0f;
        shared.of_feature[0][i] = n < p.n ? *problem.weight(n) : 0.0f;
      }
      shared.bias[i] =
          p.bias && n < p.n ? static_cast<const Out*>(p.bias)[n] : from_float<Out>(0.0f);
    }
    ptx::mbarrier_arrive(&shared.tile_full);
  });
}

// Stores two neighboring elements of a row, at a multiple of their size.
template <class Out>
LF_DEVICE void store_pair(Out* to, float a, float b) {
  struct alignas(2 * sizeof(Out)) {
    Out at[2];
  } const pair{{from_float<Out>(a), from_float<Out>(b)}};
  *reinterpret_cast<std::remove_const_t<decltype(pair)>*>(to) = pair;
}

// Stores a consumer's share of the output. A warp has 16 rows; this lane holds rows `group` and
// group + 8, features 8 j + 2 quarter + ... of each 8. They go through shared memory and TMA, 128
// bytes of a row at a time, or directly if N does not allow TMA.
template <class Out, int kN, bool blockwise>
LF_DEVICE void store_tile(const Problem& problem, const CUtensorMap& out_map,
                          Shared<Out, kN, blockwise>& shared, const float (&sum)[kN / kPart][64],
                          const Tile& tile, int consumer) {
  const LinearParams& p = problem.p;
  const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32;
  const int first = consumer * kRowsEach + thread / 32 * 16, column = lane % 4 * 2;
  float of_row[2] = {1, 1};
  if constexpr (!blockwise)
    for (int h = 0; h < 2; ++h) of_row[h] = shared.of_row[0][first + lane / 4 + h * 8];
  // Final values of features 8 j + column and the next, for both rows.
  const auto finished = [&](int j, float (&v)[2][2]) {
    const float (&s)[64] = sum[j / 16];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float bias = to_float(shared.bias[j * 8 + column + i]);
      float of_feature = 1;
      if constexpr (!blockwise) of_feature = shared.of_feature[0][j * 8 + column + i];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        v[h][i] = s[j % 16 * 4 + h * 2 + i];
        if constexpr (!blockwise) v[h][i] *= of_row[h] * of_feature;
        v[h][i] += bias;
      }
    }
  };
  if constexpr (sizeof(Out) == 2) {
    if (kN == 256 || problem.store == Store::tma) {
      const int row = first - consumer * kRowsEach + lane % 16, chunk = lane / 16;
#pragma unroll
      for (int box = 0; box < kN / 64; ++box) {
        unsigned char* buffer = shared.out[consumer][box % 2];
        if (thread == 0) ptx::tma_store_wait<1>();  // the buffer's previous store has read it
        ptx::named_barrier_sync(1 + consumer, 128);
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
          uint32_t words[4];  // rows `group` and group + 8 of j, then of j + 1
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float v[2][2];
            finished(box * 8 + j + i, v);
#pragma unroll
            for (int h = 0; h < 2; ++h)
              store_pair(reinterpret_cast<Out*>(&words[2 * i + h]), v[h][0], v[h][1]);
          }
          ptx::stmatrix_x4(buffer + row * 128 + (((j + chunk) ^ row % 8) << 4), words);
        }
        ptx::fence_proxy_async();
        ptx::named_barrier_sync(1 + consumer, 128);
        if (thread == 0) {
          ptx::tma_store_2d(&out_map, buffer, tile.n + box * 64, tile.m + consumer * kRowsEach);
          ptx::tma_store_commit();
        }
      }
      return;
    }
  }
  if constexpr (kN == 128) {
    const int64_t m = tile.m + first + lane / 4;
    const int left = static_cast<int>(p.n) - tile.n - column;  // features from this lane's first on
    Out* const out = static_cast<Out*>(p.out) + m * p.n + tile.n + column;
    const bool in_m[2] = {m < p.m, m + 8 < p.m};
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      float v[2][2];
      finished(j, v);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        Out* const to = out + h * 8 * p.n + j * 8;
        if (!in_m[h]) continue;
        if (problem.store == Store::pairs) {
          if (j * 8 < left) store_pair(to, v[h][0], v[h][1]);
        } else {
          if (j * 8 < left) to[0] = from_float<Out>(v[h][0]);
          if (j * 8 + 1 < left) to[1] = from_float<Out>(v[h][1]);
        }
      }
    }
  }
}

// A consumer processes 64 rows of each tile.
template <class Out, int kN, bool blockwise>
LF_DEVICE void consume(const Problem& problem, const CUtensorMap& out_map,
                       Shared<Out, kN, blockwise>& shared) {
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32;
  uint32_t loads = 0, tiles = 0;
  for_tiles<kN>(problem, [&](const Tile& tile) {
    float sum[kN / kPart][64] = {};
    for (int k = 0; k < problem.k_blocks; ++k, ++loads) {
      const auto [stage, parity] = turn(loads);
      ptx::mbarrier_wait(&shared.full[stage], parity);
      const unsigned char* x = shared.x[stage] + warpgroup * kRowsEach * kK;
      float of_row[2];
      if constexpr (blockwise)
        for (int h = 0; h < 2; ++h)
          of_row[h] =
              shared.of_row[stage][warpgroup * kRowsEach + thread / 32 * 16 + lane / 4 + h * 8];
#pragma unroll
      for (int half = 0; half < kN / kPart; ++half) {
        float part[64];
        const unsigned char* weight = shared.weight[stage] + half * kPart * kK;
        ptx::wgmma_fence();
#pragma unroll
        for (int i = 0; i < kK; i += 32)
          ptx::wgmma<__nv_fp8_e4m3, false>(part, ptx::wgmma_descriptor(x + i),
                                           ptx::wgmma_descriptor(weight + i), i > 0);
        ptx::wgmma_commit();
        float scale[2] = {1, 1};
        if constexpr (blockwise)
          for (int h = 0; h < 2; ++h) scale[h] = of_row[h] * shared.of_feature[stage][half];
        ptx::wgmma_wait<0>();
        if (half == kN / kPart - 1) {
          __syncwarp();  // all lanes have read their scales
          // A producer must wait for the readers in every block that it writes to.
          if (lane < problem.cluster)
            ptx::mbarrier_arrive_at(&shared.empty[stage], static_cast<unsigned>(lane));
        }
#pragma unroll
        for (int i = 0; i < 64; ++i)
          if constexpr (blockwise)
            sum[half][i] += part[i] * scale[i % 4 / 2];
          else
            sum[half][i] += part[i];
      }
    }
    ptx::mbarrier_wait(&shared.tile_full, static_cast<int>(tiles++ % 2));
    store_tile<Out, kN, blockwise>(problem, out_map, shared, sum, tile, warpgroup);
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&shared.tile_empty);
  });
  if (thread == 0) ptx::tma_store_wait<0>();  // shared memory must outlive the stores that read it
}

template <class Out, int kN, bool blockwise>
__global__ void __launch_bounds__(384, 1)
    many_rows_kernel(const Problem problem, const __grid_constant__ CUtensorMap x_map,
                     const __grid_constant__ CUtensorMap weight_map,
                     const __grid_constant__ CUtensorMap out_map) {
  LF_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<Shared<Out, kN, blockwise>*>(memory);
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&shared.full[i], blockwise ? 1 + 128 : 1);
      ptx::mbarrier_init(&shared.empty[i], 8 * problem.cluster);
    }
    ptx::mbarrier_init(&shared.tile_full, 96);
    ptx::mbarrier_init(&shared.tile_empty, 8);
    ptx::mbarrier_init_fence();
  }
  ptx::cluster_sync();

  if (warpgroup == 2) {
    ptx::registers_decrease<40>();
    produce(problem, x_map, weight_map, shared);
  } else {
    ptx::registers_increase<232>();
    consume(problem, out_map, shared);
  }
  __syncwarp();
  ptx::cluster_sync();  // the other block may still write and arrive here
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
void run(const LinearParams& p, const Where& where, Store store) {
  const int64_t rows = (p.m + kM - 1) / kM;
  const int multiprocessors = device_of(where).multiprocessors;
  // Two blocks share one read of a weight tile, unless one of them would often have no rows.
  const int cluster = multiprocessors > 1 && (rows % 2 == 0 || rows >= 8) ? 2 : 1;
  const Problem problem{p,
                        cluster,
                        static_cast<int>((rows + cluster - 1) / cluster),
                        static_cast<int>((p.n + kN - 1) / kN),
                        static_cast<int>((p.k + kK - 1) / kK),
                        scale_at(p.x_scale, p.x_granularity, p.k),
                        scale_at(p.weight_scale, p.weight_granularity, p.k, p.weight_block_rows),
                        store};
  const CUtensorMap x_map = bytes_map(p.x, p.m, p.k, p.x_stride, kM);
  const CUtensorMap weight_map = bytes_map(p.weight, p.n, p.k, p.weight_stride, kN / cluster);
  CUtensorMap out_map{};
  if (store == Store::tma)
    out_map = tensor_map({p.out,
                          p.out_dtype,
                          2,
                          {static_cast<uint64_t>(p.n), static_cast<uint64_t>(p.m)},
                          {1, static_cast<uint64_t>(p.n)},
                          {64, kRowsEach},
                          true},
                         "fp8_gemm");
  const int tiles = problem.tiles_m * problem.tiles_n;
  const int most = multiprocessors / cluster;
  launch(where,
         {"fp8_gemm",
          {p.m, p.n, p.k},
          dim3(static_cast<unsigned>((tiles < most ? tiles : most) * cluster)),
          dim3(384),
          sizeof(Shared<Out, kN, blockwise>),
          static_cast<unsigned>(cluster)},
         many_rows_kernel<Out, kN, blockwise>, problem, x_map, weight_map, out_map);
}

template <class Out, bool blockwise>
void run(const LinearParams& p, const Where& where) {
  constexpr uintptr_t pair = 2 * sizeof(Out);
  Store store = Store::elements;
  if (p.n % 2 == 0 && reinterpret_cast<uintptr_t>(p.out) % pair == 0) store = Store::pairs;
  if constexpr (sizeof(Out) == 2) {
    if (p.n % 8 == 0 && is_aligned(p.out)) store = Store::tma;
    // Wide tiles read less, unless they leave some multiprocessors idle.
    const int64_t wide = (p.m + kM - 1) / kM * ((p.n + 255) / 256);
    if (store == Store::tma && wide >= device_of(where).multiprocessors)
      return run<Out, 256, blockwise>(p, where, store);
  }
  run<Out, 128, blockwise>(p, where, store);
}

}  // namespace

// Returns false for arguments that the portable kernel must take: few rows, other types, row
// strides that TMA does not support, and block scales of single weight rows.
bool linear_sm90(const LinearParams& p, const Where& where) {
  constexpr int64_t kFew = 64;
  const bool by_rows = p.weight_granularity == Scale::row || p.weight_granularity == Scale::tensor;
  const bool blockwise = p.x_granularity == Scale::block || p.weight_granularity == Scale::block;
  if (device_of(where).sm != 90 || p.m <= kFew || p.x_dtype != DType::e4m3) return false;
  if (p.x_stride % 16 || p.weight_stride % 16 || !is_aligned(p.x) || !is_aligned(p.weight))
    return false;
  if (blockwise && (by_rows ? p.weight_granularity == Scale::row : p.weight_block_rows != 128))
    return false;
  with_dtype(p.out_dtype, "fp8_gemm", [&](auto t) {
    using Out = decltype(t);
    blockwise ? run<Out, true>(p, where) : run<Out, false>(p, where);
  });
  return true;
}

}  // namespace lf::cuda
