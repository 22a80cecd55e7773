// attention on Hopper: out = softmax(q k^T * softmax_scale) v, batched, head_dim 64 or 128, 16-bit.
//
// A persistent block per multiprocessor takes 128 queries of one head at a time. Three warpgroups,
// arranged as in FlashAttention-3:
//
//   producer   | q k3 | v3 k2 | v2 k1 | ...                                 TMA, two stages each
//   consumer 0 | q k3'| softmax 3 | q k2', p3 v3 | softmax 2 | ...          queries 0 .. 63
//   consumer 1 |      | q k3'     | softmax 3    | q k2', p3 v3 | ...       queries 64 .. 127
//
// Named barriers hand the tensor cores from one consumer to the other (ping-pong), so that the
// exponentials of one overlap the products of the other. Within a consumer, p v of one tile
// overlaps the softmax of the next. Probabilities stay in registers: the fragments of a product's
// result have the layout of a left operand.
//
// Keys are walked from the last tile to the first. The tiles that need a mask (the diagonal and the
// sequence's end) come first, in a loop of their own. The order depends on the query's own tile
// alone, so a result does not depend on the batch. The longest walks start first. Heads of one
// group run side by side and find keys and values in L2. While one consumer finishes and stores its
// rows, the next queries, keys and values arrive and the other consumer works.
//
// Cost per score, by the SASS: 4 * D FLOPs, one exponential, and 6 other instructions (8 under a
// mask); causal needs half the scores. A 128 x 128 tile with D = 128 takes 2,048 cycles of wgmma
// and 1,024 of exponentials, which overlap.
//
// Source: Shah et al., FlashAttention-3, arXiv:2407.08608.
#include "common/tensor_map.h"
#include "common/vector.cuh"

namespace lf::cuda {
namespace {

constexpr int kQueries = 128, kEach = 64, kKeys = 128, kStages = 2;
constexpr int kBox =
    64;  // elements in 128 bytes; a row of D is D / 64 such blocks, one after another

template <int D>
struct Shared {
  unsigned char q[D / kBox][kQueries * 128];
  unsigned char out[D / kBox][kQueries * 128];
  unsigned char k[kStages][D / kBox][kKeys * 128];
  unsigned char v[kStages][D / kBox][kKeys * 128];
  uint64_t q_full, q_empty, k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

struct Turn {
  int stage, parity;
};
LF_DEVICE Turn turn(int i) { return {i % kStages, i / kStages % 2}; }

// A block's work: one tile of queries of one head and sequence. The longest walks come first.
struct Place {
  int first, head, kv_head, batch, tiles;  // first: first query; tiles: number of key tiles to walk
};
LF_DEVICE Place place(const AttentionParams& p, int index) {
  const int heads = static_cast<int>(p.heads), batch = static_cast<int>(p.batch);
  const int query_tiles = static_cast<int>((p.seqlen_q + kQueries - 1) / kQueries);
  const int head = index % heads;
  Place at{(query_tiles - 1 - index / (heads * batch)) * kQueries, head,
           head / (heads / static_cast<int>(p.kv_heads)), index / heads % batch, 0};
  int64_t keys = p.seqlen_k;
  if (p.causal) {
    const int64_t last = at.first + kQueries - 1 + p.seqlen_k - p.seqlen_q;  // key it sees
    keys = last + 1 < keys ? last + 1 : keys;
  }
  at.tiles = keys > 0 ? static_cast<int>((keys + kKeys - 1) / kKeys) : 0;
  return at;
}

constexpr int place_count(const AttentionParams& p) {
  return static_cast<int>((p.seqlen_q + kQueries - 1) / kQueries * p.heads * p.batch);
}

template <class T>
LF_DEVICE uint32_t pack(float low, float high) {
  T two[2] = {from_float<T>(low), from_float<T>(high)};
  return *reinterpret_cast<const uint32_t*>(two);
}

// One consumer's rows of a tile: rows `group` and group + 8 of each warp's 16.
struct Rows {
  float largest[2], sum[2];
};

// Turns scores into probabilities. Returns, per row, the factor by which earlier sums shrink.
LF_DEVICE float2 softmax(float (&s)[kKeys / 2], Rows& rows, float scale) {
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = rows.largest[half];
#pragma unroll
    for (int j = half * 2; j < kKeys / 2; j += 4) largest = fmaxf(largest, fmaxf(s[j], s[j + 1]));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    // For a row that has seen no key yet, any finite offset works.
    const float offset = largest == -INFINITY ? 0.0f : largest * scale;
    factor[half] = ptx::exp2_approx(__fmul_rn(rows.largest[half], scale) - offset);
    rows.largest[half] = largest;
    // As in attention_tile.cuh: one FMA per score, unless a maximum is so large that the rounded
    // product and the FMA, which rounds once, would differ too much.
    float multiplier = scale;
    if (__any_sync(0xffffffffu, fabsf(offset) > 0x1p20f)) {
#pragma unroll
      for (int j = half * 2; j < kKeys / 2; j += 4)
#pragma unroll
        for (int i = 0; i < 2; ++i) s[j + i] = __fmul_rn(s[j + i], scale);
      multiplier = 1.0f;
    }
    float sum = 0;
#pragma unroll
    for (int j = half * 2; j < kKeys / 2; j += 4)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        s[j + i] = ptx::exp2_approx(fmaf(s[j + i], multiplier, -offset));
        sum += s[j + i];
      }
    rows.sum[half] = rows.sum[half] * factor[half] + sum;
  }
  return {factor[0], factor[1]};
}

template <class T, int D>
__global__ void __launch_bounds__(384, 1)
    attention_kernel(const AttentionParams p, const __grid_constant__ CUtensorMap q_map,
                     const __grid_constant__ CUtensorMap k_map,
                     const __grid_constant__ CUtensorMap v_map,
                     const __grid_constant__ CUtensorMap out_map) {
  LF_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<Shared<D>*>(memory);
  constexpr int kTileBytes = kKeys * D * 2;
  // Broadcast from lane 0, so that nvcc knows the value is uniform in a warp and keeps loop
  // counters in uniform registers.
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  // Each block takes every gridDim.x-th place, so all blocks have walks of about the same length.
  const int places = place_count(p), stride = static_cast<int>(gridDim.x);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&shared.q_full, 1);
    ptx::mbarrier_init(&shared.q_empty, 8);  // the consumers' warps
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&shared.k_full[i], 1);
      ptx::mbarrier_init(&shared.v_full[i], 1);
      ptx::mbarrier_init(&shared.k_empty[i], 8);
      ptx::mbarrier_init(&shared.v_empty[i], 8);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();

  if (warpgroup == 2) {
    ptx::registers_decrease<24>();  // 24 + 2 x 240 = 504 = 3 x 168
    if (threadIdx.x % 128 != 0) return;
    int tile = 0;  // key tiles so far, over all places
    for (int index = static_cast<int>(blockIdx.x), n = 0; index < places; index += stride, ++n) {
      const Place at = place(p, index);
      if (at.tiles == 0) break;  // later places have no tiles either
      ptx::mbarrier_wait(&shared.q_empty, n % 2 ^ 1);
      ptx::mbarrier_arrive_expect(&shared.q_full, kQueries * D * 2);
      for (int d = 0; d < D / kBox; ++d)
        ptx::tma_load_4d(shared.q[d], &q_map, &shared.q_full, d * kBox, at.head, at.first,
                         at.batch);
      for (int key = (at.tiles - 1) * kKeys; key >= 0; key -= kKeys, ++tile) {
        const auto [stage, parity] = turn(tile);
        ptx::mbarrier_wait(&shared.k_empty[stage], parity ^ 1);
        ptx::mbarrier_arrive_expect(&shared.k_full[stage], kTileBytes);
        for (int d = 0; d < D / kBox; ++d)
          ptx::tma_load_4d(shared.k[stage][d], &k_map, &shared.k_full[stage], d * kBox, at.kv_head,
                           key, at.batch);
        ptx::mbarrier_wait(&shared.v_empty[stage], parity ^ 1);
        ptx::mbarrier_arrive_expect(&shared.v_full[stage], kTileBytes);
        for (int d = 0; d < D / kBox; ++d)
          ptx::tma_load_4d(shared.v[stage][d], &v_map, &shared.v_full[stage], d * kBox, at.kv_head,
                           key, at.batch);
      }
    }
    return;
  }

  ptx::registers_increase<240>();
  const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
  const int mine = 2 + warpgroup, other = 3 - warpgroup;  // named barriers of the ping-pong
  const float scale = p.softmax_scale * 1.4426950408889634f;
  const auto release = [&](uint64_t* empty) {
    if (lane == 0) ptx::mbarrier_arrive(empty);
  };
  // Moving by `bytes` in shared memory adds bytes / 16 to a descriptor.
  const uint64_t q_tile = ptx::wgmma_descriptor(shared.q[0] + warpgroup * kEach * 128);
  const uint64_t k_tile = ptx::wgmma_descriptor(shared.k[0][0]);
  const uint64_t v_tile = ptx::wgmma_descriptor(shared.v[0][0], 1024, kKeys * 128);
  const auto multiply_qk = [&](float (&s)[kKeys / 2], int stage) {
    const uint64_t k_stage = k_tile + stage * (kTileBytes / 16);
#pragma unroll
    for (int k = 0; k < D; k += 16) {
      const int inside = k % kBox * 2, box = k / kBox * 128;
      ptx::wgmma<T, false>(s, q_tile + (box * kQueries + inside) / 16,
                           k_stage + (box * kKeys + inside) / 16, k > 0);
    }
    ptx::wgmma_commit();
  };
  const int last_key = static_cast<int>(p.seqlen_k) - 1;
  const auto sees = [&](int query) {  // last key that this query sees
    const int diagonal = query + static_cast<int>(p.seqlen_k - p.seqlen_q);
    return p.causal && diagonal < last_key ? diagonal : last_key;
  };
  const auto to_operand = [&](const float (&s)[kKeys / 2], uint32_t (&prob)[kKeys / 16][4]) {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) prob[k][i] = pack<T>(s[k * 8 + i * 2], s[k * 8 + i * 2 + 1]);
  };

  int tile = 0;  // key tiles so far, over all places
  if (warpgroup == 1 && place(p, static_cast<int>(blockIdx.x)).tiles > 0)
    ptx::named_barrier_arrive(other, 256);  // consumer 0 begins
#pragma unroll 1
  for (int index = static_cast<int>(blockIdx.x), n = 0; index < places; index += stride, ++n) {
    const Place at = place(p, index);
    const bool more = index + stride < places && place(p, index + stride).tiles > 0;
    Rows rows{{-INFINITY, -INFINITY}, {0, 0}};
    float out[D / 2];
#pragma unroll
    for (float& o : out) o = 0;
    const auto multiply_pv = [&](const uint32_t (&prob)[kKeys / 16][4], int stage) {
      const uint64_t v_stage = v_tile + stage * (kTileBytes / 16);
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k)
        ptx::wgmma<T, true>(out, prob[k], v_stage + k * (16 * 128 / 16), true);
      ptx::wgmma_commit();
    };
    // Every row sees the tiles from `masked` on in full; the loop over those has no mask.
    const int first_row = at.first + warpgroup * kEach;
    const int whole = (sees(first_row) + 1) / kKeys;
    const int masked = at.tiles - (whole > 0 ? whole : 0);
    const auto mask = [&](float (&s)[kKeys / 2], int key) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int limit = sees(first_row + row + half * 8) - key - column;
#pragma unroll
        for (int j = half * 2; j < kKeys / 2; j += 4)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if (j / 4 * 8 + i > limit) s[j + i] = -INFINITY;
      }
    };
    if (at.tiles > 0) {
      float s[kKeys / 2];
      uint32_t prob[kKeys / 16][4];
      ptx::mbarrier_wait(&shared.q_full, n % 2);
      const auto [first, first_parity] = turn(tile);
      ptx::mbarrier_wait(&shared.k_full[first], first_parity);
      ptx::named_barrier_sync(mine, 256);
      ptx::wgmma_fence();
      multiply_qk(s, first);
      if (warpgroup == 0 || at.tiles > 1 || more) ptx::named_barrier_arrive(other, 256);
      ptx::wgmma_wait<0>();
      release(&shared.k_empty[first]);
      mask(s, (at.tiles - 1) * kKeys);
      softmax(s, rows, scale);
      to_operand(s, prob);
      const auto step = [&](int i, auto with_mask) {
        const auto [stage, parity] = turn(tile + i);
        const auto [before, v_parity] = turn(tile + i - 1);
        ptx::mbarrier_wait(&shared.v_full[before], v_parity);  // requested before this tile's keys
        ptx::mbarrier_wait(&shared.k_full[stage], parity);
        ptx::named_barrier_sync(mine, 256);
        ptx::wgmma_fence();
        multiply_qk(s, stage);
        multiply_pv(prob, before);
        if (warpgroup == 0 || i + 1 < at.tiles || more) ptx::named_barrier_arrive(other, 256);
        ptx::wgmma_wait<1>();
        release(&shared.k_empty[stage]);
        if constexpr (with_mask) mask(s, (at.tiles - 1 - i) * kKeys);
        const float2 factor = softmax(s, rows, scale);
        ptx::wgmma_wait<0>();
        release(&shared.v_empty[before]);
#pragma unroll
        for (int j = 0; j < D / 2; ++j) out[j] *= j % 4 / 2 ? factor.y : factor.x;
        to_operand(s, prob);
      };
      int i = 1;
#pragma unroll 1
      for (; i < masked; ++i) step(i, std::true_type{});
#pragma unroll 1
      for (; i < at.tiles; ++i) step(i, std::false_type{});
      release(&shared.q_empty);
      const auto [last, v_parity] = turn(tile + at.tiles - 1);
      ptx::mbarrier_wait(&shared.v_full[last], v_parity);
      ptx::wgmma_fence();
      multiply_pv(prob, last);
      ptx::wgmma_wait<0>();
      release(&shared.v_empty[last]);
      tile += at.tiles;
    }

    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = rows.sum[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      // Zero if the row sees no key; NaN (0 / 0) if all its scores are -inf.
      inverse[half] = sees(first_row + row + half * 8) >= 0 ? __fdiv_rn(1.0f, sum) : 0.0f;
    }
    // Written to the consumer's own half, once the previous place has been stored from it.
    if (thread == 0) ptx::tma_store_wait<0>();
    ptx::named_barrier_sync(4 + warpgroup, 128);
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = warpgroup * kEach + row + half * 8;
        unsigned char* to = shared.out[j / 8] + r * 128 + ((j % 8 ^ r % 8) << 4) + column * 2;
        *reinterpret_cast<uint32_t*>(to) = pack<T>(out[j * 4 + half * 2] * inverse[half],
                                                   out[j * 4 + half * 2 + 1] * inverse[half]);
      }
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(4 + warpgroup, 128);
    if (thread == 0) {
      for (int d = 0; d < D / kBox; ++d)
        ptx::tma_store_4d(&out_map, shared.out[d] + warpgroup * kEach * 128, d * kBox, at.head,
                          at.first + warpgroup * kEach, at.batch);
      ptx::tma_store_commit();
    }
  }
  if (thread == 0) ptx::tma_store_wait<0>();
}

// [B, S, heads, D] in TMA's order: D, heads, S, B.
CUtensorMap map_of(const AttentionParams& p, const void* data, int64_t tokens, int64_t heads,
                   const int64_t (&stride)[3], int box_rows) {
  const auto step = [&](int64_t size, int64_t s) {  // a dimension of size 1 may have any stride
    return static_cast<uint64_t>(size == 1 ? p.head_dim : s);
  };
  return tensor_map({data,
                     p.dtype,
                     4,
                     {static_cast<uint64_t>(p.head_dim), static_cast<uint64_t>(heads),
                      static_cast<uint64_t>(tokens), static_cast<uint64_t>(p.batch)},
                     {1, step(heads, stride[2]), step(tokens, stride[1]), step(p.batch, stride[0])},
                     {kBox, 1, static_cast<uint32_t>(box_rows), 1},
                     true},
                    "attention");
}

template <class T, int D>
void run(const AttentionParams& p, const Where& where) {
  const int places = place_count(p), chip = device_of(where).multiprocessors;
  launch(where,
         {"attention",
          {p.batch, p.seqlen_q, p.heads, p.head_dim},
          dim3(static_cast<unsigned>(places < chip ? places : chip)),
          dim3(384),
          sizeof(Shared<D>)},
         attention_kernel<T, D>, p, map_of(p, p.q, p.seqlen_q, p.heads, p.q_stride, kQueries),
         map_of(p, p.k, p.seqlen_k, p.kv_heads, p.k_stride, kKeys),
         map_of(p, p.v, p.seqlen_k, p.kv_heads, p.v_stride, kKeys),
         map_of(p, p.out, p.seqlen_q, p.heads, p.out_stride, kEach));
}

// TMA needs strides that are multiples of 16 bytes.
bool steppable(const void* data, const int64_t (&stride)[3], int64_t batch, int64_t tokens,
               int64_t heads) {
  const int64_t size[3] = {batch, tokens, heads};
  bool ok = is_aligned(data);
  for (int i = 0; i < 3; ++i) ok = ok && (size[i] == 1 || (stride[i] > 0 && stride[i] % 8 == 0));
  return ok;
}

}  // namespace

// Returns false for arguments that the portable kernel must take: packed sequences (a tile would
// load another sequence's keys), other head_dims and dtypes, and strides that TMA does not support.
bool attention_sm90(const AttentionParams& p, const Where& where) {
  if (device_of(where).sm != 90 || p.cu_seqlens_q || p.seqlen_k == 0) return false;
  if ((p.head_dim != 64 && p.head_dim != 128) || p.dtype == DType::f32) return false;
  if (!steppable(p.q, p.q_stride, p.batch, p.seqlen_q, p.heads) ||
      !steppable(p.k, p.k_stride, p.batch, p.seqlen_k, p.kv_heads) ||
      !steppable(p.v, p.v_stride, p.batch, p.seqlen_k, p.kv_heads))
    return false;
  if (p.dtype == DType::bf16)
    p.head_dim == 64 ? run<__nv_bfloat16, 64>(p, where) : run<__nv_bfloat16, 128>(p, where);
  else
    p.head_dim == 64 ? run<__half, 64>(p, where) : run<__half, 128>(p, where);
  return true;
}

}  // namespace lf::cuda
