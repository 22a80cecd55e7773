// apply_rope and apply_rope_and_append:
//   (a, b) -> (a cos - b sin, b cos + a sin)      fp32, rounded to dtype once
// for the pairs (i, i + D/2), or (2i, 2i + 1) when interleaved. One launch rotates q and k;
// appending writes k, and v as it is, straight to their slots of the cache. No fma: the result
// equals eager PyTorch's.
//
// Cost in bf16: 4 bytes an element of q and k (and of v when appending); bound by memory. A thread
// takes `step` neighbouring pairs of a head, so that with D = 128 it moves 16 bytes at a time.
//
// The host cannot look at positions and slots: a position outside the table gives NaN, a slot
// outside the cache (or -1) is not written.
#include "common/fp8.cuh"

namespace lf::cuda {
namespace {

constexpr int kThreads = 256;

template <class Index>
LF_DEVICE int64_t index_at(const void* p, int64_t i) {
  return static_cast<const Index*>(p)[i];
}

// Two runs of `step` elements: the first and the second members of the pairs from `pair` on.
template <class T, int step, bool interleaved>
LF_DEVICE void load_pairs(const T* head, int64_t pair, int64_t half, float (&a)[step],
                          float (&b)[step]) {
  constexpr bool wide = step == Vector<T>::size;
  if constexpr (wide && !interleaved) {
    const Vector<T> low = load_vector<true>(head, pair, half);
    const Vector<T> high = load_vector<true>(head + half, pair, half);
#pragma unroll
    for (int i = 0; i < step; ++i) {
      a[i] = to_float(low.at[i]);
      b[i] = to_float(high.at[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < step; ++i) {
      const int64_t at = pair + i;
      const bool inside = at < half;
      a[i] = inside ? to_float(head[interleaved ? 2 * at : at]) : 0.0f;
      b[i] = inside ? to_float(head[interleaved ? 2 * at + 1 : at + half]) : 0.0f;
    }
  }
}

template <class T, int step, bool interleaved>
LF_DEVICE void store_pairs(T* head, int64_t pair, int64_t half, const float (&a)[step],
                           const float (&b)[step]) {
  constexpr bool wide = step == Vector<T>::size;
  if constexpr (wide && !interleaved) {
    Vector<T> low, high;
#pragma unroll
    for (int i = 0; i < step; ++i) {
      low.at[i] = from_float<T>(a[i]);
      high.at[i] = from_float<T>(b[i]);
    }
    store_vector<true>(head, pair, half, low);
    store_vector<true>(head + half, pair, half, high);
  } else {
#pragma unroll
    for (int i = 0; i < step; ++i) {
      const int64_t at = pair + i;
      if (at >= half) continue;
      head[interleaved ? 2 * at : at] = from_float<T>(a[i]);
      head[interleaved ? 2 * at + 1 : at + half] = from_float<T>(b[i]);
    }
  }
}

// Into an FP8 cache: rounded to T first, as what a 16-bit cache holds.
template <class T, int step, bool interleaved>
LF_DEVICE void store_pairs(uint8_t* head, int64_t pair, int64_t half, const float (&a)[step],
                           const float (&b)[step], float scale) {
#pragma unroll
  for (int i = 0; i < step; ++i) {
    const int64_t at = pair + i;
    if (at >= half) continue;
    head[interleaved ? 2 * at : at] = to_e4m3(__fdiv_rn(round_to<T>(a[i]), scale));
    head[interleaved ? 2 * at + 1 : at + half] = to_e4m3(__fdiv_rn(round_to<T>(b[i]), scale));
  }
}

// A thread: `step` pairs of one head of one token. Heads count q's, then k's, then, appending, v's.
template <class T, int step, bool interleaved>
__global__ void __launch_bounds__(kThreads)
    rope_kernel(const RopeParams p, int64_t pieces, int64_t all_heads) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= p.tokens * all_heads * pieces) return;
  const int64_t pair = item % pieces * step, head = item / pieces % all_heads;
  const int64_t token = item / pieces / all_heads, half = p.head_dim / 2;
  const bool is_q = head < p.heads, is_v = head >= p.heads + p.kv_heads;
  const int64_t kv_head = (head - p.heads) % p.kv_heads;

  T* to = nullptr;
  uint8_t* to_fp8 = nullptr;
  if (is_q) {
    to = static_cast<T*>(p.q_out) + (token * p.heads + head) * p.head_dim;
  } else if (!p.k_cache) {
    to = static_cast<T*>(p.k_out) + (token * p.kv_heads + kv_head) * p.head_dim;
  } else {
    const int64_t slot =
        p.slots_are_64bit ? index_at<int64_t>(p.slots, token) : index_at<int32_t>(p.slots, token);
    if (slot < 0 || slot >= p.num_slots) return;
    const int64_t* stride = is_v ? p.v_cache_stride : p.k_cache_stride;
    void* cache = is_v ? p.v_cache : p.k_cache;
    const int64_t at =
        slot / p.block_size * stride[0] + slot % p.block_size * stride[1] + kv_head * stride[2];
    to = static_cast<T*>(cache) + at;
    if (p.k_scale) to_fp8 = static_cast<uint8_t*>(cache) + at;
  }
  const int64_t* stride = is_q ? p.q_stride : is_v ? p.v_stride : p.k_stride;
  const T* from = static_cast<const T*>(is_q   ? p.q
                                        : is_v ? p.v
                                               : p.k) +
                  token * stride[0] + (is_q ? head : kv_head) * stride[1];
  float a[step], b[step];
  load_pairs<T, step, interleaved>(from, pair, half, a, b);
  if (!is_v) {
    const int64_t position = p.positions_are_64bit ? index_at<int64_t>(p.positions, token)
                                                   : index_at<int32_t>(p.positions, token);
    const bool known = position >= 0 && position < p.max_positions;
    const float* cosines = p.table + (known ? position : 0) * p.table_stride;
#pragma unroll
    for (int i = 0; i < step; ++i) {
      if (pair + i >= half) continue;
      const float nan = __int_as_float(0x7fffffff);
      const float c = known ? cosines[pair + i] : nan, s = known ? cosines[half + pair + i] : nan;
      const float x = a[i], y = b[i];
      a[i] = __fsub_rn(__fmul_rn(x, c), __fmul_rn(y, s));
      b[i] = __fadd_rn(__fmul_rn(y, c), __fmul_rn(x, s));
    }
  }
  if (to_fp8) {
    const bool per_head = is_v ? p.v_scale_per_head : p.k_scale_per_head;
    const float scale = (is_v ? p.v_scale : p.k_scale)[per_head ? kv_head : 0];
    return store_pairs<T, step, interleaved>(to_fp8, pair, half, a, b, scale);
  }
  store_pairs<T, step, interleaved>(to, pair, half, a, b);
}

template <class T, int step>
void run(const RopeParams& p, const Where& where) {
  const int64_t pieces = (p.head_dim / 2 + step - 1) / step;
  const int64_t all_heads = p.heads + p.kv_heads * (p.k_cache ? 2 : 1);
  const int64_t items = p.tokens * all_heads * pieces;
  const LaunchShape shape{p.k_cache ? "apply_rope_and_append" : "apply_rope",
                          {p.tokens, p.heads, p.head_dim},
                          dim3(static_cast<unsigned>((items + kThreads - 1) / kThreads)),
                          dim3(kThreads)};
  if (p.interleaved)
    launch(where, shape, rope_kernel<T, step, true>, p, pieces, all_heads);
  else
    launch(where, shape, rope_kernel<T, step, false>, p, pieces, all_heads);
}

}  // namespace

void rope(const RopeParams& p, const Where& where) {
  with_dtype(p.dtype, "apply_rope", [&](auto t) {
    using T = decltype(t);
    constexpr int size = Vector<T>::size;
    bool aligned = p.head_dim / 2 % size == 0;
    for (const void* base :
         {p.q, p.k, p.v, static_cast<const void*>(p.q_out), static_cast<const void*>(p.k_out),
          static_cast<const void*>(p.k_cache), static_cast<const void*>(p.v_cache)})
      aligned = aligned && is_aligned(base);
    for (int i = 0; i < 3; ++i) {
      aligned = aligned && p.k_cache_stride[i] % size == 0 && p.v_cache_stride[i] % size == 0;
      if (i < 2)
        aligned = aligned && p.q_stride[i] % size == 0 && p.k_stride[i] % size == 0 &&
                  p.v_stride[i] % size == 0;
    }
    return aligned ? run<T, size>(p, where) : run<T, 1>(p, where);
  });
}

}  // namespace lf::cuda
