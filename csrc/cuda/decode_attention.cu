// attention_with_kvcache: a few queries over a KV cache, contiguous or paged, 16-bit or FP8.
//   s_j = q . k_j * softmax_scale * log2(e)
//   out = sum_j 2^(s_j - max s) v_j / sum_j 2^(s_j - max s)
//
// One query over L keys reads 2 L Hkv D elements and multiplies each by G = H / Hkv heads. Memory
// is the limit, so the kernel is built around the stream of keys and values. Row r of a key/value
// head's Sq G rows is query r / G, head r % G. 16 or 32 rows share a block, and with it each key
// read. A sequence's keys are split over blocks (flash-decoding), and a block's keys over its four
// warps, each of which streams its own tiles without waiting for the others:
//
//   warp 0   keys  0-15  64-79  128-143 ...     three stages of 8 KB (keys and values), cp.async
//   warp 1   keys 16-31  80-95  144-159 ...     copy t + 2 | t + 1 in flight | products of t
//   warp 2   ...                                block ids are looked up a tile ahead of the copy
//   warp 3   ...                                mma.sync m16n8k16, online softmax, __syncwarp only
//   then (max, sum, acc) of the warps in order, through shared memory -> out, or the workspace
//   then, if a sequence is split, a second kernel adds the splits in order
//
// FP8: ldmatrix gives each lane four neighboring codes of a key. The order of terms in the sum over
// head_dim is free, so q is loaded in the order of the codes. Values come through ldmatrix.trans in
// pairs of columns, which a byte permute separates. Codes become fp16, exactly. bf16 queries become
// fp16 times a power of two per row; k_scale multiplies the scores, v_scale the sums.
//
// Cost: 2 L Hkv D elements per sequence. A warp issues some 200 instructions for each 8 KB, 50
// cycles of an SM's four schedulers; an SM's share of 4.3 TB/s takes 440 for them. Two blocks keep
// 128 KB in flight, and 33 KB would suffice. Partial results are 4 (D + 2) G bytes, written and
// read for each split of 512 keys: 1.6 % of the traffic (3.2 % for FP8).
//
// The split of a sequence depends on its length, the heads and the chip, never on the batch, so
// neither do the result's bits. Lengths and block ids live on the device: a length is clamped to
// [0, capacity], and keys of a block that does not exist are not seen. Nothing past a length is
// read. A NaN in v reaches every row of its tile, as in the eager twin. fp32: one warp per row and
// split, plain FMAs. Source: Dao et al., Flash-Decoding (2023); Kwon et al., PagedAttention,
// arXiv:2309.06180.
#include "common/attention_fp32.cuh"
#include "common/decode_mma.cuh"
#include "common/decode_splits.cuh"
#include "common/decode_tile.cuh"

namespace lf::cuda {
namespace {

// C: operand type of the products. Cache: C, or uint8_t for e4m3. A warp holds row_tiles x 16 rows.
template <class C, class Cache, int D, int row_tiles>
__global__ void __launch_bounds__(32 * DecodeShape<Cache, D, row_tiles>::warps, 2)
    decode_kernel(const DecodeAttentionParams p, const DecodePlan plan) {
  using S = DecodeShape<Cache, D, row_tiles>;
  constexpr bool fp8 = sizeof(Cache) == 1;
  constexpr int keys = S::keys;
  constexpr int pitch = D + 8;  // floats per merged row; eight rows fall on different banks
  static_assert(16 * row_tiles * (pitch + 2) * 4 <= S::warp_bytes);
  LF_DYNAMIC_SHARED(memory);
  ptx::griddepcontrol_launch_dependents();
  const Part w = part_of(p, plan, blockIdx.x, blockIdx.y);
  if (w.split >= w.splits) return;
  auto& shared = S::kept(memory);
  const Part& kept = shared.part;
  if (threadIdx.x == 0) shared.part = w;
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = lane_id();
  const int rows = static_cast<int>(p.seqlen_q) * plan.group;
  const int first_row = w.row_tile * 16 * row_tiles;
  const auto limit_of = [&](int r) {  // last key that a row sees
    if (!p.causal) return static_cast<int>(kept.length) - 1;
    return static_cast<int>(Row(plan, 0, r).query + kept.length - p.seqlen_q);
  };

  KeyStream<Cache, D, row_tiles> stream(p, plan, memory, warp);
  int first_key = w.first_tile * plan.tile_keys + warp * keys;  // of the current tile
  const int count = w.last_tile - w.first_tile;
  stream.look_up(first_key);
#pragma unroll
  for (int t = 0; t < S::stages - 1; ++t) {
    if (t < count) {
      stream.copy(t);
      stream.look_up(first_key + (t + 1) * plan.tile_keys);
    }
    ptx::cp_async_commit();
  }

  uint32_t q[row_tiles][D / 16][4];
  float acc[row_tiles][D / 8][4] = {};
  float top[row_tiles][2], total[row_tiles][2];
  const float k_scale = fp8 ? p.k_scale[p.k_scale_per_head ? w.kv_head : 0] : 1.0f;
#pragma unroll
  for (int m = 0; m < row_tiles; ++m) {
    float scale[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[m][h] = kMinusInfinity, total[m][h] = 0;
      scale[h] = p.softmax_scale * kLog2e * k_scale;
    }
    load_queries<C, fp8, D>(p, plan, w, first_row + 16 * m, rows, q[m], scale);
    if (fp8 && lane % 4 == 0)
      for (int h = 0; h < 2; ++h) shared.scale[warp][16 * m + lane / 4 + 8 * h] = scale[h];
  }
  const auto scale_of = [&](int m, int h) {
    return fp8 ? shared.scale[warp][16 * m + lane / 4 + 8 * h] : p.softmax_scale * kLog2e;
  };
  const int all_see = limit_of(first_row);  // last key that every row sees

  int stage = 0;
#pragma unroll 1
  for (int left = count; left > 0; --left) {
    ptx::cp_async_wait<S::stages - 2>();
    __syncwarp();  // the tile has landed; every lane is done with the previous one
    if (left >= S::stages) {
      stream.copy(stage == 0 ? S::stages - 1 : stage - 1);
      stream.look_up(first_key + S::stages * plan.tile_keys);
    }
    ptx::cp_async_commit();

    float s[row_tiles][keys / 8][4] = {};
    scores<C, fp8, D, keys, row_tiles>(s, q, stream.keys_at(stage),
                                       keys_offset<S::chunks>(ptx::opaque(lane)));
    const unsigned seen = stream.seen(stage);
    if (seen != 0xffffffffu || first_key + keys - 1 > all_see) {
#pragma unroll
      for (int m = 0; m < row_tiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int limit =
              limit_of(kept.row_tile * 16 * row_tiles + 16 * m + lane / 4 + 8 * h) - first_key;
#pragma unroll
          for (int n = 0; n < keys / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int key = 8 * n + lane % 4 * 2 + e;
              if (!(seen >> key & 1) || key > limit) s[m][n][2 * h + e] = kMinusInfinity;
            }
        }
    }
    uint32_t probability[row_tiles][keys / 16][4];
#pragma unroll
    for (int m = 0; m < row_tiles; ++m) {
      softmax_step(s[m], top[m], total[m], acc[m], scale_of(m, 0), scale_of(m, 1));
#pragma unroll
      for (int n = 0; n < keys / 16; ++n)
        probabilities<C>(probability[m][n], s[m][2 * n], s[m][2 * n + 1]);
    }
    add_values<C, fp8, D, keys, row_tiles>(acc, probability, stream.values_at(stage),
                                           rows_offset<S::chunks>(ptx::opaque(lane)));
    stage = stage + 1 == S::stages ? 0 : stage + 1;
    first_key += plan.tile_keys;
  }

  // Each warp writes its sums to its own stages, then the block adds them in order.
  ptx::cp_async_wait<0>();
  __syncwarp();
  float* mine = reinterpret_cast<float*>(memory + warp * S::warp_bytes);
  float* stats = mine + 16 * row_tiles * pitch;  // [rows, 2]: maximum, total
#pragma unroll
  for (int m = 0; m < row_tiles; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = 16 * m + lane / 4 + 8 * h, i = lane % 4;
      const float sum = quad_sum(total[m][h]);
      if (i == 0) stats[2 * r] = top[m][h], stats[2 * r + 1] = sum;
#pragma unroll
      for (int n = 0; n < D / 8; n += 2) {
        const float *even = &acc[m][n][2 * h], *odd = &acc[m][n + 1][2 * h];
        float* to = mine + r * pitch + 8 * n;
        if constexpr (fp8) {
          *reinterpret_cast<float4*>(to + 4 * i) = float4{even[0], odd[0], even[1], odd[1]};
        } else {
          *reinterpret_cast<float2*>(to + 2 * i) = float2{even[0], even[1]};
          *reinterpret_cast<float2*>(to + 8 + 2 * i) = float2{odd[0], odd[1]};
        }
      }
    }
  __syncthreads();
  const int kept_row = kept.row_tile * 16 * row_tiles;
  const int rows_left = static_cast<int>(p.seqlen_q) * plan.group - kept_row;
  const float v_scale = fp8 ? p.v_scale[p.v_scale_per_head ? kept.kv_head : 0] : 1.0f;
  for (int at = static_cast<int>(threadIdx.x); at < 16 * row_tiles * (D / 4); at += 32 * S::warps) {
    const int r = at / (D / 4), column = at % (D / 4) * 4;
    if (r >= rows_left || column >= p.head_dim) continue;
    const auto of = [&](int i) { return reinterpret_cast<float*>(memory + i * S::warp_bytes); };
    const auto stats_of = [&](int i) { return of(i) + 16 * row_tiles * pitch + 2 * r; };
    float highest = kMinusInfinity;
#pragma unroll
    for (int i = 0; i < S::warps; ++i) highest = fmaxf(highest, stats_of(i)[0]);
    float sum = 0, x[4] = {};
#pragma unroll
    for (int i = 0; i < S::warps; ++i) {
      const float weight = ptx::exp2_approx(stats_of(i)[0] - base_of(highest));
      const float4 y = *reinterpret_cast<const float4*>(of(i) + r * pitch + column);
      sum = fmaf(weight, stats_of(i)[1], sum);
      x[0] = fmaf(weight, y.x, x[0]), x[1] = fmaf(weight, y.y, x[1]);
      x[2] = fmaf(weight, y.z, x[2]), x[3] = fmaf(weight, y.w, x[3]);
    }
    const Row row(plan, kept.kv_head, kept_row + r);
    const bool sees = limit_of(kept_row + r) >= 0;
    const float factor = kept.splits > 1 ? v_scale : v_scale * inverse_of(sum, sees);
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] *= factor;
    if (kept.splits == 1) {
      store_io(p, row.in(p.out_stride, kept.b) + column, x, plan.q_aligned);
      continue;
    }
    const int64_t index = row.index(p, kept.b);
    *reinterpret_cast<float4*>(partial_sums(p, plan, index, kept.split) + column) =
        float4{x[0], x[1], x[2], x[3]};
    if (column == 0)
      *reinterpret_cast<float2*>(partial_stats(p, plan, index, kept.split)) = float2{highest, sum};
  }
}

// out = sum_s 2^(top_s - top) acc_s / sum_s 2^(top_s - top) total_s, one row per block. A warp adds
// every fourth split in order, then the warps' sums are added in order. The launch overlaps the end
// of decode_kernel.
__global__ void __launch_bounds__(128)
    combine_kernel(const DecodeAttentionParams p, const DecodePlan plan) {
  LF_DYNAMIC_SHARED(memory);
  float* sums = reinterpret_cast<float*>(memory);  // [4, 256 + 1]
  const unsigned row = blockIdx.x, heads = static_cast<unsigned>(p.heads);
  const unsigned queries = static_cast<unsigned>(p.seqlen_q), head = row % heads;
  const unsigned b = row / heads / queries, query = queries == 1 ? 0 : row / heads % queries;
  const unsigned r = query * plan.group + head % plan.group;
  const int row_tile = static_cast<int>(r) / plan.tile_rows;
  ptx::griddepcontrol_wait();
  const int length = length_of(p, plan, b);
  const int splits = splits_of(plan, keys_of(p, plan, length, row_tile));
  if (splits == 1) return;  // out is already written
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = lane_id();
  float top = kMinusInfinity;
  for (int s = lane; s < splits; s += 32) top = fmaxf(top, partial_stats(p, plan, row, s)[0]);
  const float base = base_of(reduce_warp(top, [](float x, float y) { return fmaxf(x, y); }));
  float total = 0, x[2][4] = {};
#pragma unroll 4
  for (int s = warp; s < splits; s += 4) {
    const float2 stats = *reinterpret_cast<const float2*>(partial_stats(p, plan, row, s));
    const float weight = ptx::exp2_approx(stats.x - base);
    total = fmaf(weight, stats.y, total);
    const float* from = partial_sums(p, plan, row, s);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = 128 * c + 4 * lane;
      if (column >= p.head_dim) continue;
      const float4 y = *reinterpret_cast<const float4*>(from + column);
      x[c][0] = fmaf(weight, y.x, x[c][0]), x[c][1] = fmaf(weight, y.y, x[c][1]);
      x[c][2] = fmaf(weight, y.z, x[c][2]), x[c][3] = fmaf(weight, y.w, x[c][3]);
    }
  }
  float* mine = sums + warp * 260;
#pragma unroll
  for (int c = 0; c < 2; ++c)
    *reinterpret_cast<float4*>(mine + 128 * c + 4 * lane) =
        float4{x[c][0], x[c][1], x[c][2], x[c][3]};
  if (lane == 0) mine[256] = total;
  __syncthreads();
  const int column = 4 * static_cast<int>(threadIdx.x);
  if (column >= p.head_dim) return;
  const bool sees = !p.causal || length + query >= queries;
  const float inverse = inverse_of(sums[256] + sums[516] + sums[776] + sums[1036], sees);
  float y[4];
#pragma unroll
  for (int e = 0; e < 4; ++e)
    y[e] = (sums[column + e] + sums[260 + column + e] + sums[520 + column + e] +
            sums[780 + column + e]) *
           inverse;
  const int64_t at = b * p.out_stride[0] + query * p.out_stride[1] + head * p.out_stride[2];
  store_io(p, at + column, y, plan.q_aligned);
}

template <class Cache>
__global__ void __launch_bounds__(32 * kFp32Warps, 4)
    decode_fp32_kernel(const DecodeAttentionParams p, const DecodePlan plan, int64_t parts) {
  LF_DYNAMIC_SHARED(memory);
  ptx::griddepcontrol_launch_dependents();
  const int64_t part = static_cast<int64_t>(blockIdx.x) * kFp32Warps + threadIdx.x / 32;
  if (part >= parts) return;
  const Part w = part_of(p, plan, static_cast<unsigned>(part), blockIdx.y);
  if (w.split >= w.splits) return;
  const Row row(plan, w.kv_head, w.row_tile);
  const auto at = [&](int64_t key, const Cache*& k, const Cache*& v) {
    int64_t block = w.b, inside = key;
    if (p.block_table) {
      block = p.block_table[w.b * p.table_stride + key / p.block_size];
      inside = key % p.block_size;
      if (block < 0 || block >= p.num_blocks) return false;
    }
    k = static_cast<const Cache*>(p.k_cache) + block * p.k_cache_stride[0] +
        inside * p.k_cache_stride[1] + w.kv_head * p.k_cache_stride[2];
    v = static_cast<const Cache*>(p.v_cache) + block * p.v_cache_stride[0] +
        inside * p.v_cache_stride[1] + w.kv_head * p.v_cache_stride[2];
    return true;
  };
  const int head_dim = static_cast<int>(p.head_dim), lane = lane_id();
  const int64_t first = static_cast<int64_t>(w.first_tile) * plan.tile_keys;
  int64_t last = static_cast<int64_t>(w.last_tile) * plan.tile_keys;
  if (last > w.keys) last = w.keys;
  const float k_scale = p.k_scale ? p.k_scale[p.k_scale_per_head ? w.kv_head : 0] : 1.0f;
  const float v_scale = p.v_scale ? p.v_scale[p.v_scale_per_head ? w.kv_head : 0] : 1.0f;
  const float* q = static_cast<const float*>(p.q) + row.in(p.q_stride, w.b);
  const Fp32Row r = attend_fp32<Cache>(q, head_dim, first, last, p.softmax_scale * kLog2e * k_scale,
                                       reinterpret_cast<float*>(memory), at);
  const int64_t index = row.index(p, w.b);
  const bool whole = w.splits == 1;
  float* to = whole ? static_cast<float*>(p.out) + row.in(p.out_stride, w.b)
                    : partial_sums(p, plan, index, w.split);
  const float factor = whole ? v_scale * inverse_of(r.total, w.keys > 0) : v_scale;
#pragma unroll
  for (int c = 0; c < kFp32Columns; ++c)
    if (lane + 32 * c < head_dim) to[lane + 32 * c] = r.acc[c] * factor;
  if (!whole && lane == 0) {
    partial_stats(p, plan, index, w.split)[0] = r.top;
    partial_stats(p, plan, index, w.split)[1] = r.total;
  }
}

// ---- the host ----

template <class Kernel>
void launch_parts(const DecodeAttentionParams& p, const Where& where, DecodePlan plan,
                  int parts_per_block, int threads, size_t shared_bytes, Kernel kernel) {
  const int64_t size = p.cache_dtype == DType::e4m3 ? 16 : p.cache_dtype == DType::f32 ? 4 : 8;
  plan.q_aligned = rows_aligned(p.q, p.q_stride, 8) && rows_aligned(p.out, p.out_stride, 8);
  plan.cache_aligned = rows_aligned(p.k_cache, p.k_cache_stride, size) &&
                       rows_aligned(p.v_cache, p.v_cache_stride, size);
  if (!p.workspace) plan.most = 1;
  if (plan.most > p.workspace_splits) plan.most = static_cast<int>(p.workspace_splits);
  const int64_t parts = p.batch * p.kv_heads * plan.row_tiles;
  LaunchShape shape{"attention_with_kvcache",
                    {p.batch, p.seqlen_q, p.heads, p.kv_heads, p.head_dim},
                    dim3(static_cast<unsigned>((parts + parts_per_block - 1) / parts_per_block),
                         static_cast<unsigned>(plan.most)),
                    dim3(static_cast<unsigned>(threads)),
                    shared_bytes};
  kernel(shape, plan, parts);
  if (plan.most == 1) return;
  shape.grid = dim3(static_cast<unsigned>(p.batch * p.seqlen_q * p.heads));
  shape.block = dim3(128);
  shape.shared_bytes = 4 * 260 * sizeof(float);
  shape.programmatic = true;
  launch(where, shape, combine_kernel, p, plan);
}

// Calls f with the plan and the launch.
template <class C, class Cache, int D, class F>
auto with_tile(const DecodeAttentionParams& p, const Where& where, F&& f) {
  const auto go = [&](auto row_tiles) {
    constexpr int count = decltype(row_tiles)::value;
    using S = DecodeShape<Cache, D, count>;
    static_assert(S::warps * S::keys <= 128);  // splits_of relies on it
    const DecodePlan plan =
        plan_of(p, device_of(where), 16 * count, S::warps * S::keys, S::shared_bytes, 1);
    return f(plan, 1, 32 * S::warps, S::shared_bytes,
             [&](const LaunchShape& s, const DecodePlan& x, int64_t) {
               launch(where, s, decode_kernel<C, Cache, D, count>, p, x);
             });
  };
  if constexpr (D <= 128)
    if (p.seqlen_q * (p.heads / p.kv_heads) > 16) return go(std::integral_constant<int, 2>{});
  return go(std::integral_constant<int, 1>{});
}

template <class Cache, class F>
auto with_fp32(const DecodeAttentionParams& p, const Where& where, F&& f) {
  const DecodePlan plan = plan_of(p, device_of(where), 1, 32, kFp32SharedBytes, 8 * kFp32Warps);
  return f(plan, kFp32Warps, 32 * kFp32Warps, kFp32SharedBytes,
           [&](const LaunchShape& s, const DecodePlan& x, int64_t parts) {
             launch(where, s, decode_fp32_kernel<Cache>, p, x, parts);
           });
}

template <class C, class Cache, class F>
auto with_head_dim(const DecodeAttentionParams& p, const Where& where, F&& f) {
  if (p.head_dim <= 64) return with_tile<C, Cache, 64>(p, where, f);
  if (p.head_dim <= 128) return with_tile<C, Cache, 128>(p, where, f);
  return with_tile<C, Cache, 256>(p, where, f);
}

template <class F>
auto with_kernel(const DecodeAttentionParams& p, const Where& where, F&& f) {
  const bool fp8 = p.cache_dtype == DType::e4m3;
  if (p.dtype == DType::f32)
    return fp8 ? with_fp32<uint8_t>(p, where, f) : with_fp32<float>(p, where, f);
  if (fp8) return with_head_dim<__half, uint8_t>(p, where, f);
  if (p.dtype == DType::f16) return with_head_dim<__half, __half>(p, where, f);
  return with_head_dim<__nv_bfloat16, __nv_bfloat16>(p, where, f);
}

}  // namespace

int64_t decode_attention_splits(const DecodeAttentionParams& p, const Where& where) {
  if (p.seqlen_q == 0 || p.heads == 0) return 1;
  return with_kernel(p, where,
                     [](const DecodePlan& plan, auto&&...) -> int64_t { return plan.most; });
}

void decode_attention(const DecodeAttentionParams& p, const Where& where) {
  if (p.cache_dtype == DType::e4m3 && !(p.k_scale && p.v_scale))
    throw std::runtime_error("attention_with_kvcache: an FP8 cache needs k_scale and v_scale");
  if (p.head_dim % 8)
    throw std::runtime_error("attention_with_kvcache: cuda wants head_dim a multiple of 8");
  with_kernel(
      p, where,
      [&](const DecodePlan& plan, int per_block, int threads, size_t shared, auto&& kernel) {
        launch_parts(p, where, plan, per_block, threads, shared, kernel);
        return 0;
      });
}

}  // namespace lf::cuda
