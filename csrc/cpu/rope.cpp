// apply_rope and apply_rope_and_append.
//
//   (a, b) -> (a cos - b sin, b cos + a sin)      (fp32, rounded to dtype once)
//
// with the pairs (i, i + D / 2), or (2i, 2i + 1) when interleaved. The products and the sum round
// one by one, without FMA, so that the result equals eager PyTorch's bit for bit.
//
// q and k are rotated in one pass, and k and v go straight to their place in the cache: 4 bytes per
// element in bf16. An FP8 cache gets what it would have got in dtype, divided by its scale and
// rounded as quantize_fp8 rounds. The token's cosines and sines stay in L1 for all of its heads.
#include "kernels.h"
#include "parallel.h"
#include "quantize_row.h"
#include "simd.h"

namespace lf::LF_ISA {
namespace {

constexpr int kStep = 2 * kLanes;

// cos and sin are in the order of arrange<T>.
template <class T>
void rotate_halves(T* out, const T* x, const float* cos, const float* sin, int64_t half) {
  int64_t i = 0;
  for (; i + kStep <= half; i += kStep) {
    const Pair a = load2(x + i), b = load2(x + half + i), c = load2(cos + i), s = load2(sin + i);
    store2(out + i, a * c - b * s);
    store2(out + half + i, b * c + a * s);
  }
  for (; i < half; i += kLanes) {
    const int m = lanes_left(half - i);
    const Vec a = load_n(x + i, m), b = load_n(x + half + i, m);
    const Vec c = load_n(cos + i, m), s = load_n(sin + i, m);
    store_n(out + i, a * c - b * s, m);
    store_n(out + half + i, b * c + a * s, m);
  }
}

// cos = c0 c0 c1 c1 ..., sin = -s0 s0 -s1 s1 ...: a c + b (-s) is a c - b s exactly.
template <class T>
void rotate_pairs(T* out, const T* x, const float* cos, const float* sin, int64_t d) {
  int64_t i = 0;
  for (; i + kStep <= d; i += kStep) {
    const Pair v = load2(x + i), swapped = swap_neighbors<T>(v);
    store2(out + i, v * load2(cos + i) + swapped * load2(sin + i));
  }
  for (; i < d; i += kLanes) {
    const int m = lanes_left(d - i);
    const Vec v = load_n(x + i, m);
    store_n(out + i, v * load_n(cos + i, m) + swap_pairs(v) * load_n(sin + i, m), m);
  }
}

int64_t index_at(const void* indices, bool is_64bit, int64_t i) {
  return is_64bit ? static_cast<const int64_t*>(indices)[i]
                  : static_cast<const int32_t*>(indices)[i];
}

// Where a token's kv heads go in a cache of elements C.
template <class C>
C* at_slot(void* cache, const int64_t (&stride)[3], const RopeParams& p, int64_t slot) {
  return static_cast<C*>(cache) + slot / p.block_size * stride[0] + slot % p.block_size * stride[1];
}

template <class T>
void store_fp8(e4m3* to, int64_t to_stride, const T* x, int64_t stride, const RopeParams& p,
               const float* scale, bool per_head) {
  for (int64_t h = 0; h < p.kv_heads; ++h) {
    const T* row = x + h * stride;
    scale_to_fp8(to + h * to_stride, row, p.head_dim, scale[per_head ? h : 0],
                 amax(row, p.head_dim));
  }
}

// scratch [4 * D]: a token's cosines and sines, reordered once for all of its heads; then, with an
// FP8 cache, its rotated keys.
template <class T>
void run_token(const RopeParams& p, int64_t token, float* scratch) {
  const int64_t d = p.head_dim, half = d / 2, width = p.interleaved ? d : half;
  const float* row = p.table + index_at(p.positions, p.positions_are_64bit, token) * p.table_stride;
  float *cos = scratch, *sin = scratch + d, *spread = scratch + 2 * d;
  if (p.interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      spread[2 * i] = spread[2 * i + 1] = row[i];
      spread[d + 2 * i] = -row[half + i];
      spread[d + 2 * i + 1] = row[half + i];
    }
    row = spread;
  }
  arrange<T>(cos, row, width);
  arrange<T>(sin, row + width, width);
  const auto rotate = [&](T* out, int64_t out_stride, const T* x, int64_t stride, int64_t heads) {
    for (int64_t h = 0; h < heads; ++h) {
      if (p.interleaved)
        rotate_pairs(out + h * out_stride, x + h * stride, cos, sin, d);
      else
        rotate_halves(out + h * out_stride, x + h * stride, cos, sin, half);
    }
  };
  rotate(static_cast<T*>(p.q_out) + token * p.heads * d, d,
         static_cast<const T*>(p.q) + token * p.q_stride[0], p.q_stride[1], p.heads);
  const T* k = static_cast<const T*>(p.k) + token * p.k_stride[0];
  if (!p.k_cache) {
    rotate(static_cast<T*>(p.k_out) + token * p.kv_heads * d, d, k, p.k_stride[1], p.kv_heads);
    return;
  }
  const int64_t slot = index_at(p.slots, p.slots_are_64bit, token);
  if (slot < 0) return;
  const T* v = static_cast<const T*>(p.v) + token * p.v_stride[0];
  if (p.k_scale) {
    T* rotated = reinterpret_cast<T*>(scratch + 4 * d);
    rotate(rotated, d, k, p.k_stride[1], p.kv_heads);
    store_fp8(at_slot<e4m3>(p.k_cache, p.k_cache_stride, p, slot), p.k_cache_stride[2], rotated, d,
              p, p.k_scale, p.k_scale_per_head);
    store_fp8(at_slot<e4m3>(p.v_cache, p.v_cache_stride, p, slot), p.v_cache_stride[2], v,
              p.v_stride[1], p, p.v_scale, p.v_scale_per_head);
    return;
  }
  rotate(at_slot<T>(p.k_cache, p.k_cache_stride, p, slot), p.k_cache_stride[2], k, p.k_stride[1],
         p.kv_heads);
  T* v_out = at_slot<T>(p.v_cache, p.v_cache_stride, p, slot);
  for (int64_t h = 0; h < p.kv_heads; ++h)
    std::memcpy(v_out + h * p.v_cache_stride[2], v + h * p.v_stride[1],
                static_cast<size_t>(d) * sizeof(T));
}

}  // namespace

void rope(const RopeParams& p, int threads) {
  const int64_t grain = 16384 / ((p.heads + p.kv_heads) * p.head_dim + 1);
  parallel_chunks(p.tokens, grain, threads, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    float* token =
        scratch.get<float>(static_cast<size_t>((4 + (p.k_scale ? p.kv_heads : 0)) * p.head_dim));
    with_dtype(p.dtype, [&](auto* t) {
      for (int64_t i = begin; i < end; ++i)
        run_token<std::remove_pointer_t<decltype(t)>>(p, i, token);
    });
  });
}

}  // namespace lf::LF_ISA
