// apply_rope and apply_rope_and_append:
//   (a, b) -> (a cos - b sin, b cos + a sin)      fp32, rounded to dtype once
// for the pairs (i, i + D/2), or (2i, 2i + 1) when interleaved. One launch rotates q and k;
// appending writes k, and v unchanged, straight to their slots of the cache. Without FMA, so that
// the result equals eager PyTorch's.
//
// Cost in bf16: 4 bytes per element of q and k (and of v when appending); memory-bound. A thread
// takes `step` neighboring pairs of a head, 16 bytes at a time, and as much of the table. Pieces of
// a head, heads and tokens are the x, y and z of a block, so no index is divided. Within a token
// indices fit in 32 bits; offsets take 64.
//
// The host cannot read positions and slots: a position outside the table gives NaN, and a slot
// outside the cache (or -1) is not written.
// outside the cache (or -1) is not written.
#include <algorithm>

#include "common/fp8.cuh"

namespace lf::cuda {
namespace {

constexpr int kThreads = 256;

LF_DEVICE int64_t index_at(const void* p, bool is_64bit, int64_t i) {
  return is_64bit ? static_cast<const int64_t*>(p)[i] : static_cast<const int32_t*>(p)[i];
}

// `step` consecutive elements: 16 bytes, or one element.
template <int step, class T>
LF_DEVICE void load_run(const T* from, float (&x)[step]) {
  if constexpr (step == 1) {
    x[0] = to_float(*from);
  } else {
    static_assert(step % Vector<T>::size == 0);
#pragma unroll
    for (int k = 0; k < step; k += Vector<T>::size) {
      const Vector<T> v = load_vector<true>(from + k, 0, 1);
      float y[Vector<T>::size];
      to_floats(v.at, y);
#pragma unroll
      for (int i = 0; i < Vector<T>::size; ++i) x[k + i] = y[i];
    }
  }
}

template <class T, int step>
LF_DEVICE void store_run(T* to, const float (&x)[step]) {
  Vector<T> v;
#pragma unroll
  for (int i = 0; i < step; ++i) v.at[i] = from_float<T>(x[i]);
  if constexpr (step == 1)
    *to = v.at[0];
  else
    store_vector<true>(to, 0, 1, v);
}

// A thread takes `step` pairs of one head of one token. Heads are numbered q's first, then k's,
// then, when appending, v's. Cache: the type that k and v are appended as, T or e4m3; void: nothing
// is appended.
template <class T, class Cache, int step, bool interleaved>
__global__ void __launch_bounds__(kThreads)
    rope_kernel(const RopeParams p, Divider<uint64_t> block_size) {
  constexpr bool append = !std::is_void_v<Cache>;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
  const int row = static_cast<int>(blockIdx.y * blockDim.y + threadIdx.y);
  const int pair = static_cast<int>(blockIdx.z * blockDim.x + threadIdx.x) * step;
  const int heads = static_cast<int>(p.heads), kv_heads = static_cast<int>(p.kv_heads);
  const int half = static_cast<int>(p.head_dim) / 2;
  if (token >= p.tokens || row >= heads + kv_heads * (append ? 2 : 1) || pair >= half) return;
  const bool is_q = row < heads, is_v = append && row >= heads + kv_heads;
  const int head = is_q ? row : is_v ? row - heads - kv_heads : row - heads;
  // A head's two runs: first and second members of the pairs or, interleaved, two groups of pairs.
  const int low = interleaved ? 2 * pair : pair, high = interleaved ? low + step : half + pair;

  const int64_t position = index_at(p.positions, p.positions_are_64bit, token);
  int64_t slot = 0;
  if constexpr (append) slot = index_at(p.slots, p.slots_are_64bit, token);
  const int64_t* stride = is_q ? p.q_stride : is_v ? p.v_stride : p.k_stride;
  const T* from = static_cast<const T*>(is_q   ? p.q
                                        : is_v ? p.v
                                               : p.k) +
                  token * stride[0] + head * stride[1];
  float x[2][step];
  load_run<step>(from + low, x[0]);
  load_run<step>(from + high, x[1]);
  if (!is_v) {
    const bool known = position >= 0 && position < p.max_positions;
    const float* cosines = p.table + (known ? position : 0) * p.table_stride + pair;
    float c[step], s[step];
    load_run<step>(cosines, c);
    load_run<step>(cosines + half, s);
#pragma unroll
    for (int i = 0; i < step; ++i) {
      float& a = interleaved ? x[2 * i / step][2 * i % step] : x[0][i];
      float& b = interleaved ? x[(2 * i + 1) / step][(2 * i + 1) % step] : x[1][i];
      const float was = a;
      if (!known) b = __int_as_float(0x7fffffff);
      a = __fsub_rn(__fmul_rn(was, c[i]), __fmul_rn(b, s[i]));
      b = __fadd_rn(__fmul_rn(b, c[i]), __fmul_rn(was, s[i]));
    }
  }
  if (!append || is_q) {
    T* to = static_cast<T*>(is_q ? p.q_out : p.k_out) +
            (token * (is_q ? heads : kv_heads) + head) * p.head_dim;
    store_run(to + low, x[0]);
    return store_run(to + high, x[1]);
  }
  if constexpr (append) {
    if (slot < 0 || slot >= p.num_slots) return;
    uint64_t offset;
    const auto block = static_cast<int64_t>(block_size.divide(slot, offset));
    const int64_t* out_stride = is_v ? p.v_cache_stride : p.k_cache_stride;
    Cache* to = static_cast<Cache*>(is_v ? p.v_cache : p.k_cache) + block * out_stride[0] +
                static_cast<int64_t>(offset) * out_stride[1] + head * out_stride[2];
    if constexpr (std::is_same_v<Cache, T>) {
      store_run(to + low, x[0]);
      store_run(to + high, x[1]);
    } else {  // rounded to T first, as a 16-bit cache would hold it
      const bool per_head = is_v ? p.v_scale_per_head : p.k_scale_per_head;
      const Fp8Divisor by((is_v ? p.v_scale : p.k_scale)[per_head ? head : 0]);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        round_to<T>(x[k]);
        store_e4m3<true>(to + (k ? high : low), 0, 1, x[k], by);
      }
    }
  }
}

template <class T, class Cache, int step>
void run(const RopeParams& p, const Where& where) {
  const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t pieces = up(p.head_dim / 2, step);
  const int64_t rows = p.heads + p.kv_heads * (std::is_void_v<Cache> ? 1 : 2);
  if (pieces * rows == 0) return;
  // Pieces fill a block's x first, then heads its y in blocks of equal size, then tokens its z.
  const int64_t x = std::min<int64_t>(pieces, kThreads), y = up(rows, up(rows, kThreads / x));
  const int64_t z = std::min<int64_t>(kThreads / (x * y), 64);
  const auto size = [](int64_t a, int64_t b, int64_t c) {
    return dim3(static_cast<unsigned>(a), static_cast<unsigned>(b), static_cast<unsigned>(c));
  };
  const LaunchShape shape{p.k_cache ? "apply_rope_and_append" : "apply_rope",
                          {p.tokens, p.heads, p.head_dim},
                          size(up(p.tokens, z), up(rows, y), up(pieces, x)),
                          size(x, y, z)};
  const auto kernel =
      p.interleaved ? rope_kernel<T, Cache, step, true> : rope_kernel<T, Cache, step, false>;
  launch(where, shape, kernel, p, Divider<uint64_t>(p.block_size));
}

template <class T, int step>
void run(const RopeParams& p, const Where& where) {
  if (!p.k_cache) return run<T, void, step>(p, where);
  if (p.k_scale) return run<T, uint8_t, step>(p, where);
  run<T, T, step>(p, where);
}

}  // namespace

void rope(const RopeParams& p, const Where& where) {
  with_dtype(p.dtype, "apply_rope", [&](auto t) {
    using T = decltype(t);
    constexpr int size = Vector<T>::size;
    bool aligned = p.head_dim / 2 % size == 0 && p.table_stride % 4 == 0;
    for (const void* base :
         {p.q, p.k, p.v, static_cast<const void*>(p.q_out), static_cast<const void*>(p.k_out),
          static_cast<const void*>(p.k_cache), static_cast<const void*>(p.v_cache),
          static_cast<const void*>(p.table)})
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
