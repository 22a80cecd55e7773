// attention, prefill: FlashAttention-2 with grouped-query heads, batched or packed.
//   s = q k^T * softmax_scale * log2(e);  p = 2^(s - max_j s);  out = p v / sum_j p
//
// Fused because the scores are Sq x Sk: here they never leave the registers. A block holds 128
// queries of one head (64 when head_dim > 128) and walks the keys in tiles of 64 (32). Each of its
// four warps has 32 (16) rows:
//
//   copies    K0 | V0 ......... | K1 ..... | V1 ......... | K2 ..... |      cp.async, one tile each
//   products     | Q K0 softmax |    P0 V0 | Q K1 softmax |    P1 V1 |      mma.sync m16n8k16
//              ^ K0 landed      ^ V0 landed, all warps have read K0 (a barrier each)
//
// Q stays in shared memory. Scores become P's operand fragments, which take half the registers,
// before the copy of K1 needs registers. Only tiles on the diagonal or at the end are masked. A
// warp skips the tiles that none of its rows sees.
//
// Cost: 4 Sq Sk D FLOPs per head, half of that when causal. For every 64 keys at D = 128 a warp
// reads 40 KB of shared memory, 320 cycles of an SM, against 390 cycles of mma.sync on sm_90, and
// its 64 x 32 exponentials take 128. With two blocks on an SM, the softmax of one overlaps
// the products of the other. A block needs 64 KB of shared memory, so an SM of sm_89 holds one.
//
// The blocks with the most keys start first. Heads that share keys run side by side, in sections of
// as many key/value heads as fit in L2. Keys are taken in order from the first, in tiles that
// depend on head_dim alone, and masked keys add exact zeros: a row gives the same bits in any
// batch, packing or chunk. A NaN in v reaches every row of its tile, masked rows included, as in
// the eager twin, but never another sequence.
//
// fp32: one warp per query and plain FMAs, for accuracy rather than speed. Source: Dao,
// FlashAttention-2, arXiv:2307.08691.
#include "common/attention_fp32.cuh"

namespace lf::cuda {

// In attention_sm90.cu. Returns false if it does not support these arguments.
bool attention_sm90(const AttentionParams& p, const Where& where);

namespace {

constexpr int kThreads = 128;
constexpr int64_t kL2Bytes = 24 << 20;  // keys and values per section of heads

template <int D>
struct Shape {
  static constexpr int row_tiles = D > 128 ? 1 : 2;  // tiles of 16 rows per warp
  static constexpr int warp_rows = 16 * row_tiles, rows = 4 * warp_rows;
  static constexpr int keys = D > 128 ? 32 : 64;
  static constexpr int chunks = D / 8;  // 16-byte chunks per row
  static constexpr int q_bytes = rows * D * 2, kv_bytes = keys * D * 2;
};

struct Plan {
  unsigned tiles;    // of queries: per sequence, or in all when packed
  unsigned pairs;    // sequences x key/value heads; key/value heads when packed
  unsigned section;  // pairs that share the L2 cache
};

template <class T>
struct Output {
  T* out;  // the block's first output row
  int last_row;
};

// One block's work.
struct Work {
  int64_t q_first, k_first;  // where the sequence begins in the packed tensors
  int64_t batch;             // 0 when packed
  int64_t seqlen_q, seqlen_k, first_row;
  int64_t head, kv_head;
};

// Locates a packed sequence. Invalid offsets are clamped to the tensors.
LF_DEVICE void packed_sequence(const AttentionParams& p, int64_t s, Work& w) {
  const auto clamp = [](int64_t x, int64_t low, int64_t high) {
    return x < low ? low : x > high ? high : x;
  };
  w.q_first = clamp(p.cu_seqlens_q[s], 0, p.seqlen_q);
  w.seqlen_q = clamp(p.cu_seqlens_q[s + 1], w.q_first, p.seqlen_q) - w.q_first;
  w.k_first = clamp(p.cu_seqlens_k[s], 0, p.seqlen_k);
  w.seqlen_k = clamp(p.cu_seqlens_k[s + 1], w.k_first, p.seqlen_k) - w.k_first;
}

// Returns the last s in [0, batch) with start(s) <= x, for a rising start with start(0) <= x.
template <class Start>
LF_DEVICE int64_t last_not_above(int64_t x, int64_t batch, Start start) {
  int64_t low = 0, high = batch;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (start(middle) <= x ? low : high) = middle;
  }
  return low;
}

template <int rows>
LF_DEVICE Work work_of(const AttentionParams& p, const Plan& plan) {
  const unsigned group = static_cast<unsigned>(p.heads / p.kv_heads);
  const unsigned of_section = plan.section * group * plan.tiles;
  const unsigned first_pair = blockIdx.x / of_section * plan.section;
  const unsigned left = plan.pairs - first_pair;
  const unsigned pairs = left < plan.section ? left : plan.section;
  const unsigned rest = blockIdx.x % of_section;
  const unsigned tile = plan.tiles - 1 - rest / (pairs * group);
  const unsigned pair = first_pair + rest % (pairs * group) / group;
  Work w{};
  w.kv_head = pair % static_cast<unsigned>(p.kv_heads);
  w.head = w.kv_head * group + rest % group;
  if (!p.cu_seqlens_q) {
    w.batch = pair / static_cast<unsigned>(p.kv_heads);
    w.seqlen_q = p.seqlen_q;
    w.seqlen_k = p.seqlen_k;
    w.first_row = static_cast<int64_t>(tile) * rows;
    return w;
  }
  // Sequence s owns the tiles from cu_seqlens_q[s] / rows + s on. That is enough tiles wherever the
  // sequence begins, and needs no sum over the lengths. Some tiles have no rows.
  const auto start = [&](int64_t s) { return p.cu_seqlens_q[s] / rows + s; };
  const int64_t s = last_not_above(tile, p.batch, start);
  packed_sequence(p, s, w);
  w.first_row = (tile - (w.q_first / rows + s)) * rows;
  return w;
}

// Copies `rows` rows into a swizzled tile. Rows past `count` and columns past head_dim become zero.
// from: this thread's part of the first row.
template <bool aligned, class T, int rows, int chunks>
LF_DEVICE void load_tile(unsigned char* tile, const T* from, int64_t stride, int count,
                         int head_dim) {
  constexpr int step = kThreads / chunks;
  const int thread = static_cast<int>(threadIdx.x), chunk = thread % chunks;
  const int first = thread / chunks;
  const int limit = chunk * 8 < head_dim ? count : 0;
  // If unaligned, the addresses of all rows would fill registers that the sums need.
#pragma unroll(aligned ? rows / step : 1)
  for (int i = 0; i < rows / step; ++i) {
    const bool inside = first + i * step < limit;
    unsigned char* to = tile + swizzled<chunks>(first + i * step, chunk);
    const T* at = inside ? from + i * (step * stride) : from;
    if constexpr (aligned) {
      ptx::cp_async_16(to, at, inside ? 16 : 0);
    } else {
#pragma unroll 1
      for (int e = 0; e < 8; ++e)
        reinterpret_cast<T*>(to)[e] = inside ? at[e] : from_float<T>(0.0f);
    }
  }
}

template <class T, int D, bool aligned>
__global__ void __launch_bounds__(kThreads, 2)
    attention_kernel(const AttentionParams p, const Plan plan) {
  using S = Shape<D>;
  constexpr int row_tiles = S::row_tiles, chunks = S::chunks, keys = S::keys;
  LF_DYNAMIC_SHARED(memory);
  unsigned char *q_tile = memory, *k_tile = q_tile + S::q_bytes, *v_tile = k_tile + S::kv_bytes;
  const Work w = work_of<S::rows>(p, plan);
  const int64_t rows = w.seqlen_q - w.first_row;  // rows left for this block
  if (rows <= 0 || w.first_row < 0) return;

  const int head_dim = static_cast<int>(p.head_dim);
  // This thread's 16 bytes in the first row of each tile.
  const int64_t chunk = threadIdx.x % chunks * 8, first = threadIdx.x / chunks;
  const T* q = static_cast<const T*>(p.q) + w.batch * p.q_stride[0] + w.head * p.q_stride[2] +
               (w.q_first + w.first_row + first) * p.q_stride[1] + chunk;
  const T* k = static_cast<const T*>(p.k) + w.batch * p.k_stride[0] + w.kv_head * p.k_stride[2] +
               (w.k_first + first) * p.k_stride[1] + chunk;
  const T* v = static_cast<const T*>(p.v) + w.batch * p.v_stride[0] + w.kv_head * p.v_stride[2] +
               (w.k_first + first) * p.v_stride[1] + chunk;

  const int last_row = static_cast<int>(rows < S::rows ? rows : S::rows) - 1;
  // Kept in shared memory: the loop needs the registers.
  auto& shared = *reinterpret_cast<Output<T>*>(v_tile + S::kv_bytes);
  if (threadIdx.x == 0)
    shared = {static_cast<T*>(p.out) + w.batch * p.out_stride[0] + w.head * p.out_stride[2] +
                  (w.q_first + w.first_row) * p.out_stride[1],
              last_row};

  // Row r of the block sees the keys up to `limit + r` when causal, up to `end` otherwise.
  const int end = static_cast<int>(w.seqlen_k) - 1;
  const int limit = static_cast<int>(w.first_row + w.seqlen_k - w.seqlen_q);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = lane_id();
  const int warp_first = warp * S::warp_rows;
  const auto last_key = [&](int row) { return p.causal && limit + row < end ? limit + row : end; };
  const int tiles = (last_key(last_row) + keys) / keys;  // 0 if no row sees a key
  // Last keys that the warp's first and last rows see; none for a warp without rows.
  const int all_see = last_key(warp_first);
  const int some_see = warp_first > last_row ? -1 : last_key(warp_first + S::warp_rows - 1);
  const float scale = p.softmax_scale * kLog2e;
  const int rows_lane = rows_offset<chunks>(lane), keys_lane = keys_offset<chunks>(lane);
  const unsigned char* warp_q = q_tile + warp_first * chunks * 16;

  float acc[row_tiles][D / 8][4] = {};
  float top[row_tiles][2], total[row_tiles][2];
#pragma unroll
  for (int m = 0; m < row_tiles; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) top[m][h] = kMinusInfinity, total[m][h] = 0;

  if (tiles > 0) {
    load_tile<aligned, T, S::rows, chunks>(q_tile, q, p.q_stride[1], last_row + 1, head_dim);
    load_tile<aligned, T, keys, chunks>(k_tile, k, p.k_stride[1], end + 1, head_dim);
    ptx::cp_async_commit();
  }
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int first_key = tile * keys;
    const int rows_at = ptx::opaque(rows_lane), keys_at = ptx::opaque(keys_lane);
    const bool works = first_key <= some_see;
    ptx::cp_async_wait<0>();
    __syncthreads();  // K has landed; all threads are done with V
    load_tile<aligned, T, keys, chunks>(v_tile, v, p.v_stride[1], end + 1 - first_key, head_dim);
    v += keys * p.v_stride[1];
    ptx::cp_async_commit();

    uint32_t probability[row_tiles][keys / 16][4];
    if (works) {
      float s[row_tiles][keys / 8][4] = {};
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        uint32_t a[row_tiles][4];
#pragma unroll
        for (int m = 0; m < row_tiles; ++m) load_a<chunks>(a[m], warp_q, rows_at, 16 * m, d);
#pragma unroll
        for (int n = 0; n < keys / 16; ++n) {
          uint32_t b[4];
          load_keys<chunks>(b, k_tile, keys_at, 16 * n, d);
#pragma unroll
          for (int m = 0; m < row_tiles; ++m) {
            ptx::mma_16816(s[m][2 * n], a[m], b[0], b[1], T{});
            ptx::mma_16816(s[m][2 * n + 1], a[m], b[2], b[3], T{});
          }
        }
      }
      if (first_key + keys - 1 > all_see) {
#pragma unroll
        for (int m = 0; m < row_tiles; ++m)
#pragma unroll
          for (int n = 0; n < keys / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int row = warp_first + 16 * m + lane / 4 + e / 2 * 8;
              if (first_key + 8 * n + lane % 4 * 2 + e % 2 > last_key(row))
                s[m][n][e] = kMinusInfinity;
            }
      }
#pragma unroll
      for (int m = 0; m < row_tiles; ++m) {
        softmax_step(s[m], top[m], total[m], acc[m], scale, scale);
#pragma unroll
        for (int n = 0; n < keys / 16; ++n)
          probabilities<T>(probability[m][n], s[m][2 * n], s[m][2 * n + 1]);
      }
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // V has landed; all threads are done with K
    if (tile + 1 < tiles) {
      k += keys * p.k_stride[1];
      load_tile<aligned, T, keys, chunks>(k_tile, k, p.k_stride[1], end + 1 - first_key - keys,
                                          head_dim);
      ptx::cp_async_commit();
    }
    if (works) {
#pragma unroll
      for (int n = 0; n < keys / 16; ++n) {
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
          uint32_t b[4];
          load_values<chunks>(b, v_tile, rows_at, 16 * n, d);
#pragma unroll
          for (int m = 0; m < row_tiles; ++m) {
            ptx::mma_16816(acc[m][2 * d], probability[m][n], b[0], b[1], T{});
            ptx::mma_16816(acc[m][2 * d + 1], probability[m][n], b[2], b[3], T{});
          }
        }
      }
    }
  }

  // Staged through this warp's rows of Q's tile, so that each lane stores 16 bytes.
#pragma unroll
  for (int m = 0; m < row_tiles; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp_first + 16 * m + lane / 4 + 8 * h;
      const float inverse = inverse_of(quad_sum(total[m][h]), last_key(row) >= 0);
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        *reinterpret_cast<uint32_t*>(q_tile + swizzled<chunks>(row, n) + lane % 4 * 4) =
            pack<T>(acc[m][n][2 * h] * inverse, acc[m][n][2 * h + 1] * inverse);
    }
  __syncthreads();
#pragma unroll 4
  for (int at = lane; at < S::warp_rows * chunks; at += 32) {
    const int row = warp_first + at / chunks, chunk = at % chunks;
    if (row > shared.last_row) continue;
    const auto& vector = *reinterpret_cast<const Vector<T>*>(q_tile + swizzled<chunks>(row, chunk));
    T* to = shared.out + row * p.out_stride[1];
    store_vector<aligned>(to, chunk * 8, head_dim, vector);
  }
}

__global__ void __launch_bounds__(32 * kFp32Warps)
    attention_fp32_kernel(const AttentionParams p, int64_t rows) {
  LF_DYNAMIC_SHARED(memory);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kFp32Warps + threadIdx.x / 32;
  const int64_t token = index / p.heads, head = index % p.heads;
  if (token >= rows) return;
  Work w{};
  if (p.cu_seqlens_q) {
    const auto start = [&](int64_t s) { return static_cast<int64_t>(p.cu_seqlens_q[s]); };
    packed_sequence(p, last_not_above(token, p.batch, start), w);
    w.first_row = token - w.q_first;
  } else {
    w.batch = token / p.seqlen_q;
    w.seqlen_q = p.seqlen_q;
    w.seqlen_k = p.seqlen_k;
    w.first_row = token % p.seqlen_q;
  }
  if (w.first_row >= w.seqlen_q) return;
  const int64_t limit = w.first_row + w.seqlen_k - w.seqlen_q + 1;
  const int64_t keys = p.causal && limit < w.seqlen_k ? limit : w.seqlen_k;
  const int64_t kv_head = head / (p.heads / p.kv_heads);
  const float* q = static_cast<const float*>(p.q) + w.batch * p.q_stride[0] +
                   (w.q_first + w.first_row) * p.q_stride[1] + head * p.q_stride[2];
  const auto at = [&](int64_t key, const float*& k, const float*& v) {
    k = static_cast<const float*>(p.k) + w.batch * p.k_stride[0] +
        (w.k_first + key) * p.k_stride[1] + kv_head * p.k_stride[2];
    v = static_cast<const float*>(p.v) + w.batch * p.v_stride[0] +
        (w.k_first + key) * p.v_stride[1] + kv_head * p.v_stride[2];
    return true;
  };
  const int head_dim = static_cast<int>(p.head_dim);
  const Fp32Row r = attend_fp32<float>(q, head_dim, 0, keys, p.softmax_scale * kLog2e,
                                       reinterpret_cast<float*>(memory), at);
  float* out = static_cast<float*>(p.out) + w.batch * p.out_stride[0] +
               (w.q_first + w.first_row) * p.out_stride[1] + head * p.out_stride[2];
  const float inverse = inverse_of(r.total, keys > 0);
#pragma unroll
  for (int c = 0; c < kFp32Columns; ++c)
    if (lane_id() + 32 * c < head_dim) out[lane_id() + 32 * c] = r.acc[c] * inverse;
}

// Whether every row starts at a multiple of 16 bytes. Dimensions of size 1 never use their stride.
bool rows_aligned(const void* base, const int64_t (&stride)[3], int64_t batch, int64_t heads) {
  return is_aligned(base) && (batch == 1 || stride[0] % 8 == 0) && stride[1] % 8 == 0 &&
         (heads == 1 || stride[2] % 8 == 0);
}

template <class T, int D, bool aligned>
void run(const AttentionParams& p, const Where& where) {
  using S = Shape<D>;
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t tiles =
      packed ? p.seqlen_q / S::rows + p.batch : (p.seqlen_q + S::rows - 1) / S::rows;
  const int64_t pairs = packed ? p.kv_heads : p.batch * p.kv_heads;
  const int64_t pair_bytes = 4 * p.seqlen_k * p.head_dim + 1;
  const int64_t section = kL2Bytes / pair_bytes < 1 ? 1 : kL2Bytes / pair_bytes;
  const Plan plan{static_cast<unsigned>(tiles), static_cast<unsigned>(pairs),
                  static_cast<unsigned>(section < pairs ? section : pairs)};
  const int64_t blocks = tiles * pairs * (p.heads / p.kv_heads);
  launch(where,
         {"attention",
          {p.batch, p.seqlen_q, p.seqlen_k, p.heads, p.kv_heads, p.head_dim},
          dim3(static_cast<unsigned>(blocks)),
          dim3(kThreads),
          S::q_bytes + 2 * S::kv_bytes + sizeof(Output<T>)},
         attention_kernel<T, D, aligned>, p, plan);
}

}  // namespace

void attention(const AttentionParams& p, const Where& where) {
  if (p.batch == 0) return;  // packed tokens that belong to no sequence
  if (p.head_dim % 8) throw std::runtime_error("attention: cuda wants head_dim a multiple of 8");
  if (attention_sm90(p, where)) return;
  with_dtype(p.dtype, "attention", [&](auto t) {
    using T = decltype(t);
    if constexpr (std::is_same_v<T, float>) {
      const int64_t rows = p.cu_seqlens_q ? p.seqlen_q : p.batch * p.seqlen_q;
      const int64_t blocks = (rows * p.heads + kFp32Warps - 1) / kFp32Warps;
      launch(where,
             {"attention",
              {p.batch, p.seqlen_q, p.seqlen_k, p.heads, p.kv_heads, p.head_dim},
              dim3(static_cast<unsigned>(blocks)),
              dim3(32 * kFp32Warps),
              kFp32SharedBytes},
             attention_fp32_kernel, p, rows);
    } else {
      const int64_t batch = p.cu_seqlens_q ? 1 : p.batch;
      const bool aligned = rows_aligned(p.q, p.q_stride, batch, p.heads) &&
                           rows_aligned(p.k, p.k_stride, batch, p.kv_heads) &&
                           rows_aligned(p.v, p.v_stride, batch, p.kv_heads) &&
                           rows_aligned(p.out, p.out_stride, batch, p.heads);
      // Columns of zeros change no bit, so a rare case needs no instance of its own.
      if (!aligned)
        return p.head_dim <= 128 ? run<T, 128, false>(p, where) : run<T, 256, false>(p, where);
      if (p.head_dim <= 64) return run<T, 64, true>(p, where);
      if (p.head_dim <= 128) return run<T, 128, true>(p, where);
      run<T, 256, true>(p, where);
    }
  });
}

}  // namespace lf::cuda
