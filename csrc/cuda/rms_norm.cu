// rms_norm, add_rms_norm and their FP8 forms:
//   s = x + residual                  rounded to dtype; s = x without residual
//   n = s * rsqrt(mean(s^2) + eps)    fp32, then rounded to dtype
//   out = n * weight                  rounded to dtype; quantized by row when scale is set
//
// Fused because each step alone is a pass over memory. A row is read once and stays in registers: a
// block holds up to 16,384 elements of 16 bits, and a cluster of up to eight blocks (sm_90) shares
// a row of more than 8,192. For still wider rows the second pass reads the row again, from L2: at
// 1,024 threads, a second pair of vectors per thread would spill.
//
// Cost in bf16: 4 bytes per element, 8 with residual, 1 less with FP8 output; memory-bound. The
// number of threads, and with it the order of the sum, depends on the row's width alone.
#include "common/fp8.cuh"
#include "common/hopper.cuh"

namespace lf::cuda {
namespace {

constexpr int kMostThreads = 1024;
constexpr int64_t kClusterWidth = 8192;  // elements per block of a cluster

// x += y, rounded to T. 16-bit types add two at once, rounded from the exact sum. Rounding to fp32
// first would change nothing: a sum that fp32 cannot hold is nowhere near halfway between two
// values of T.
template <bool aligned, class T>
LF_DEVICE void add(Vector<T>& x, const Vector<T>& y) {
  if constexpr (aligned && sizeof(T) == 2) {
    using Pair = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, __nv_bfloat162, __half2>;
#pragma unroll
    for (int i = 0; i < Vector<T>::size / 2; ++i) {
      auto& pair = reinterpret_cast<Pair*>(x.at)[i];
      pair = __hadd2_rn(pair, reinterpret_cast<const Pair*>(y.at)[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Vector<T>::size; ++i)
      x.at[i] = from_float<T>(to_float(x.at[i]) + to_float(y.at[i]));
  }
}

// Sums over the cluster's blocks, in order of rank.
template <class Combine>
LF_DEVICE float reduce_cluster(float value, float* scratch, unsigned blocks, Combine combine) {
#if defined(LF_CUDA_EMULATOR) || __CUDA_ARCH__ >= 900
  if (blocks == 1) return value;
  float* mine = scratch + 32;
  if (threadIdx.x == 0) *mine = value;
  ptx::cluster_sync();
  float total = ptx::cluster_load(mine, 0);
  for (unsigned rank = 1; rank < blocks; ++rank)
    total = combine(total, ptx::cluster_load(mine, rank));
  ptx::cluster_sync();  // no block exits or writes again while others read
  return total;
#else
  return value;
#endif
}

// A block normalizes its part of a row: `width` elements from its cluster rank times width on.
// vectors: how many a thread keeps in registers; 0: none, each pass reads memory.
template <class T, bool aligned, int vectors, bool fp8>
__global__ void __launch_bounds__(kMostThreads, 1)
    rms_norm_kernel(const RmsNormParams p, int64_t width, Divider<uint32_t> cluster) {
  LF_DYNAMIC_SHARED(memory);
  auto* scratch = reinterpret_cast<float*>(memory);
  constexpr int size = Vector<T>::size, held = vectors ? vectors : 1;
  const uint32_t blocks = cluster.divisor;
  uint32_t rank;
  const int64_t row = cluster.divide(blockIdx.x, rank), begin = rank * width;
  const int64_t end = begin + width < p.hidden ? begin + width : p.hidden;
  const int64_t step = static_cast<int64_t>(blockDim.x) * size;
  const int64_t first = begin + static_cast<int64_t>(threadIdx.x) * size;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* residual =
      p.residual ? static_cast<const T*>(p.residual) + row * p.residual_stride : nullptr;
  T* residual_out = p.residual_out ? static_cast<T*>(p.residual_out) + row * p.hidden : nullptr;
  const T* weight = static_cast<const T*>(p.weight);

  const auto load = [&](int64_t at) {
    Vector<T> v = load_vector<aligned>(x, at, end);
    if (residual) {
      add<aligned>(v, load_vector<aligned>(residual, at, end));
    }
    return v;
  };

  Vector<T> s[held];
  float sum = 0;
  const auto square = [&](const Vector<T>& v) {
#pragma unroll
    for (int i = 0; i < size; ++i) sum += to_float(v.at[i]) * to_float(v.at[i]);
  };
  if constexpr (vectors > 0) {
#pragma unroll
    for (int k = 0; k < vectors; ++k) s[k] = load(first + k * step);
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      if (residual_out) store_vector<aligned>(residual_out, first + k * step, end, s[k]);
      square(s[k]);
    }
  } else {
    for (int64_t at = first; at < end; at += step) {
      const Vector<T> v = load(at);
      if (residual_out) store_vector<aligned>(residual_out, at, end, v);
      square(v);
    }
  }
  sum = reduce_cluster(reduce_block(sum, scratch, Sum{}), scratch, blocks, Sum{});
  const float hidden = static_cast<float>(p.hidden);
  const float rstd = rsqrtf(quotient<false>(sum, hidden, reciprocal(hidden)) + p.eps);

  const auto normed = [&](const Vector<T>& v, int64_t at) {
    const Vector<T> w = load_vector<aligned>(weight, at, end);
    Vector<T> out;
    constexpr int few = aligned ? size : 1;  // unaligned: one by one, as loaded, to save registers
#pragma unroll
    for (int k = 0; k < size; k += few) {
      float a[few], b[few];
      to_floats(reinterpret_cast<const T(&)[few]>(v.at[k]), a);
#pragma unroll
      for (int i = 0; i < few; ++i) a[i] *= rstd;
      round_to<T>(a);
      to_floats(reinterpret_cast<const T(&)[few]>(w.at[k]), b);
#pragma unroll
      for (int i = 0; i < few; ++i) out.at[k + i] = from_float<T>(a[i] * b[i]);
    }
    return out;
  };
  const auto again = [&](int k, int64_t at) {  // a vector of the sum, from registers or memory
    if constexpr (vectors > 0)
      return s[k];
    else
      return load(at);
  };
  // Recomputed, so that each element's place in its row takes no registers during the reduction.
  const int64_t start = begin + int64_t{ptx::opaque(static_cast<int>(threadIdx.x))} * size;
  const auto each = [&](auto&& body) {
    if constexpr (vectors > 0) {
#pragma unroll
      for (int k = 0; k < vectors; ++k) body(k, start + k * step);
    } else {
      for (int64_t at = first; at < end; at += step) body(0, at);
    }
  };
  if constexpr (!fp8) {
    T* out = static_cast<T*>(p.out) + row * p.hidden;
    each([&](int k, int64_t at) { store_vector<aligned>(out, at, end, normed(again(k, at), at)); });
  } else {
    float amax = 0;
    each([&](int k, int64_t at) {
      const Vector<T> v = normed(again(k, at), at);
      if constexpr (vectors > 0) s[k] = v;
      if constexpr (aligned) {
        if (at < end) amax = MaxMagnitude{}(amax, largest(v.at));
      } else {
#pragma unroll
        for (int i = 0; i < size; ++i)
          if (at + i < end) amax = MaxMagnitude{}(amax, fabsf(to_float(v.at[i])));
      }
    });
    amax = reduce_block(amax, scratch, MaxMagnitude{});
    amax = reduce_cluster(amax, scratch, blocks, MaxMagnitude{});
    const float scale = fp8_scale(amax, p.scale_ub);
    if (begin == 0 && threadIdx.x == 0) p.scale[row] = scale;
    uint8_t* out = static_cast<uint8_t*>(p.out) + row * p.hidden;
    const Fp8Divisor by(scale, amax);
    each([&](int k, int64_t at) {
      Vector<T> v = again(k, at);
      if constexpr (vectors == 0) v = normed(v, at);
      store_e4m3<aligned>(out, at, end, v.at, by);
    });
  }
}

template <class T, bool aligned, bool fp8>
void run(const RmsNormParams& p, const Where& where) {
  constexpr int64_t size = Vector<T>::size;
  const bool clusters = device_of(where).sm >= 90;
  const int64_t parts = clusters ? (p.hidden + kClusterWidth - 1) / kClusterWidth : 1;
  const unsigned blocks = parts <= 1 ? 1 : parts <= 2 ? 2 : parts <= 4 ? 4 : 8;
  const int64_t width = ((p.hidden + blocks - 1) / blocks + size - 1) / size * size;
  const int64_t all = (width + size - 1) / size;  // vectors per block
  // Two per thread: enough bytes in flight, and several rows on a multiprocessor.
  const int64_t most = kMostThreads;
  const bool held = all <= 2 * most;
  const int64_t wanted = held ? (all + 1) / 2 : most;
  const unsigned threads = static_cast<unsigned>((wanted + 31) / 32 * 32);
  const LaunchShape shape{fp8 ? "rms_norm_fp8" : "rms_norm",
                          {p.rows, p.hidden},
                          dim3(static_cast<unsigned>(p.rows * blocks)),
                          dim3(threads),
                          33 * sizeof(float),
                          blocks};
  const auto go = [&](auto vectors) {
    launch(where, shape, rms_norm_kernel<T, aligned, decltype(vectors)::value, fp8>, p, width,
           Divider<uint32_t>(blocks));
  };
  if (held) return go(std::integral_constant<int, 2>{});
  go(std::integral_constant<int, 0>{});
}

}  // namespace

void rms_norm(const RmsNormParams& p, const Where& where) {
  with_dtype(p.dtype, "rms_norm", [&](auto t) {
    using T = decltype(t);
    constexpr int64_t size = Vector<T>::size;
    const bool aligned = p.hidden % size == 0 && p.x_stride % size == 0 &&
                         p.residual_stride % size == 0 && is_aligned(p.x) &&
                         is_aligned(p.residual) && is_aligned(p.weight) && is_aligned(p.out) &&
                         is_aligned(p.residual_out);
    const bool fp8 = p.scale != nullptr;
    if (aligned) return fp8 ? run<T, true, true>(p, where) : run<T, true, false>(p, where);
    return fp8 ? run<T, false, true>(p, where) : run<T, false, false>(p, where);
  });
}

}  // namespace lf::cuda
