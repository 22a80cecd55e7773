// quantize_fp8: the rule is in common/fp8.cuh. amax over a row, 128 columns of a row, a 128 x 128
// block, or the whole tensor.
//
// Cost from bf16: 3 bytes an element, the second pass finding a row in registers or L2; per tensor
// 5, since all of it is read before anything is written. Bound by memory.
#include "common/fp8.cuh"

namespace lf::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostThreads = 1024;
constexpr int kBlock = 128;  // columns that share a scale

template <class T>
LF_DEVICE float magnitude(const Vector<T>& v) {  // past a row's end are zeros
  float amax = 0;
#pragma unroll
  for (int i = 0; i < Vector<T>::size; ++i) amax = MaxMagnitude{}(amax, fabsf(to_float(v.at[i])));
  return amax;
}

template <class T, bool aligned>
LF_DEVICE void quantise(uint8_t* out, int64_t at, int64_t n, const Vector<T>& v, float scale) {
  uint8_t q[Vector<T>::size];
#pragma unroll
  for (int i = 0; i < Vector<T>::size; ++i) q[i] = to_e4m3(__fdiv_rn(to_float(v.at[i]), scale));
  store_e4m3<aligned>(out, at, n, q);
}

template <class T>
LF_DEVICE const T* row_of(const QuantizeFp8Params& p, int64_t row) {
  return static_cast<const T*>(p.x) + row * p.x_stride;
}
LF_DEVICE uint8_t* codes_of(const QuantizeFp8Params& p, int64_t row) {
  return static_cast<uint8_t*>(p.q) + row * p.cols;
}

// A block takes a row. vectors: what a thread holds; 0: the second pass reads the row again.
template <class T, bool aligned, int vectors>
__global__ void __launch_bounds__(kMostThreads) by_row_kernel(const QuantizeFp8Params p) {
  LF_DYNAMIC_SHARED(memory);
  constexpr int size = Vector<T>::size, held = vectors ? vectors : 1;
  const int64_t row = blockIdx.x, step = static_cast<int64_t>(blockDim.x) * size;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * size;
  const T* x = row_of<T>(p, row);
  float amax = 0;
  Vector<T> v[held];
  if constexpr (vectors > 0) {
#pragma unroll
    for (int k = 0; k < vectors; ++k) v[k] = load_vector<aligned>(x, first + k * step, p.cols);
#pragma unroll
    for (int k = 0; k < vectors; ++k) amax = MaxMagnitude{}(amax, magnitude(v[k]));
  } else {
    for (int64_t at = first; at < p.cols; at += step)
      amax = MaxMagnitude{}(amax, magnitude(load_vector<aligned>(x, at, p.cols)));
  }
  amax = reduce_block(amax, reinterpret_cast<float*>(memory), MaxMagnitude{});
  const float scale = fp8_scale(amax, p.scale_ub);
  if (threadIdx.x == 0) p.scale[row] = scale;
  if constexpr (vectors > 0) {
#pragma unroll
    for (int k = 0; k < vectors; ++k)
      quantise<T, aligned>(codes_of(p, row), first + k * step, p.cols, v[k], scale);
  } else {
    for (int64_t at = first; at < p.cols; at += step)
      quantise<T, aligned>(codes_of(p, row), at, p.cols, load_vector<aligned>(x, at, p.cols),
                           scale);
  }
}

// A warp takes 128 columns of a row: four or eight elements a lane.
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads) by_block_kernel(const QuantizeFp8Params p) {
  constexpr int size = kBlock / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t blocks = (p.cols + kBlock - 1) / kBlock;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (item >= p.rows * blocks) return;
  const int64_t row = item / blocks, at = item % blocks * kBlock + lane * size;
  const T* x = row_of<T>(p, row);
  alignas(16) T v[size];
  if constexpr (aligned && sizeof(T) == 2) {
    // cols is a multiple of 8, so of a lane's four: all inside or all outside
    if (at < p.cols) *reinterpret_cast<uint2*>(v) = *reinterpret_cast<const uint2*>(x + at);
  } else if constexpr (aligned) {
    if (at < p.cols) *reinterpret_cast<uint4*>(v) = *reinterpret_cast<const uint4*>(x + at);
  }
  float amax = 0;
#pragma unroll
  for (int i = 0; i < size; ++i) {
    if constexpr (!aligned) v[i] = at + i < p.cols ? x[at + i] : from_float<T>(0.0f);
    if (at + i >= p.cols) v[i] = from_float<T>(0.0f);
    amax = MaxMagnitude{}(amax, fabsf(to_float(v[i])));
  }
  amax = reduce_warp(amax, MaxMagnitude{});
  const float scale = fp8_scale(amax, p.scale_ub);
  if (lane == 0) p.scale[item] = scale;
  uint8_t q[size];
#pragma unroll
  for (int i = 0; i < size; ++i) q[i] = to_e4m3(__fdiv_rn(to_float(v[i]), scale));
  store_e4m3<aligned>(codes_of(p, row), at, p.cols, q);
}

// A block takes 128 x 128 elements, twice: the second time from L1 or L2.
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads) by_square_kernel(const QuantizeFp8Params p) {
  LF_DYNAMIC_SHARED(memory);
  constexpr int size = Vector<T>::size, across = kBlock / size, down = kThreads / across;
  const int64_t blocks = (p.cols + kBlock - 1) / kBlock;
  const int64_t row0 = blockIdx.x / blocks * kBlock, column0 = blockIdx.x % blocks * kBlock;
  const int64_t at = column0 + static_cast<int64_t>(threadIdx.x % across) * size;
  const int64_t row1 = row0 + kBlock < p.rows ? row0 + kBlock : p.rows;
  const int64_t column1 = column0 + kBlock < p.cols ? column0 + kBlock : p.cols;
  float amax = 0;
  for (int64_t row = row0 + threadIdx.x / across; row < row1; row += down)
    amax = MaxMagnitude{}(amax, magnitude(load_vector<aligned>(row_of<T>(p, row), at, column1)));
  amax = reduce_block(amax, reinterpret_cast<float*>(memory), MaxMagnitude{});
  const float scale = fp8_scale(amax, p.scale_ub);
  if (threadIdx.x == 0) p.scale[blockIdx.x] = scale;
  for (int64_t row = row0 + threadIdx.x / across; row < row1; row += down)
    quantise<T, aligned>(codes_of(p, row), at, column1,
                         load_vector<aligned>(row_of<T>(p, row), at, column1), scale);
}

// Per tensor: p.scale holds the largest magnitude's bits until the last kernel.
__global__ void clear_kernel(const QuantizeFp8Params p) { p.scale[0] = 0.0f; }

template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads)
    tensor_amax_kernel(const QuantizeFp8Params p, int64_t pieces) {
  LF_DYNAMIC_SHARED(memory);
  const int64_t row = blockIdx.x / pieces, piece = blockIdx.x % pieces;
  const int64_t at = (piece * kThreads + threadIdx.x) * Vector<T>::size;
  float amax = magnitude(load_vector<aligned>(row_of<T>(p, row), at, p.cols));
  amax = reduce_block(amax, reinterpret_cast<float*>(memory), MaxMagnitude{});
  // A maximum does not depend on the order: the atomic is as deterministic as a tree.
  if (threadIdx.x == 0) atomicMax(reinterpret_cast<unsigned*>(p.scale), __float_as_uint(amax));
}
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads)
    tensor_quantise_kernel(const QuantizeFp8Params p, int64_t pieces) {
  const int64_t row = blockIdx.x / pieces, piece = blockIdx.x % pieces;
  const int64_t at = (piece * kThreads + threadIdx.x) * Vector<T>::size;
  quantise<T, aligned>(codes_of(p, row), at, p.cols,
                       load_vector<aligned>(row_of<T>(p, row), at, p.cols),
                       fp8_scale(p.scale[0], p.scale_ub));
}
__global__ void tensor_scale_kernel(const QuantizeFp8Params p) {
  p.scale[0] = fp8_scale(p.scale[0], p.scale_ub);
}

template <class T, bool aligned>
void run(const QuantizeFp8Params& p, const Where& where) {
  constexpr size_t scratch = 32 * sizeof(float);
  const int64_t all = (p.cols + Vector<T>::size - 1) / Vector<T>::size;
  const auto shape = [&](int64_t blocks, int64_t threads, size_t shared = 0) {
    return LaunchShape{"quantize_fp8",
                       {p.rows, p.cols},
                       dim3(static_cast<unsigned>(blocks)),
                       dim3(static_cast<unsigned>(threads)),
                       shared};
  };
  if (p.granularity == Scale::row) {
    const int64_t per_thread = all <= 2 * kMostThreads ? 2 : all <= 4 * kMostThreads ? 4 : 0;
    const int64_t wanted = per_thread ? (all + per_thread - 1) / per_thread : kMostThreads;
    const LaunchShape s = shape(p.rows, (wanted + 31) / 32 * 32, scratch);
    if (per_thread == 2) return launch(where, s, by_row_kernel<T, aligned, 2>, p);
    if (per_thread == 4) return launch(where, s, by_row_kernel<T, aligned, 4>, p);
    return launch(where, s, by_row_kernel<T, aligned, 0>, p);
  }
  const int64_t blocks = (p.cols + kBlock - 1) / kBlock;
  if (p.granularity == Scale::block && p.block_rows == 1) {
    constexpr int64_t warps = kThreads / 32;
    return launch(where, shape((p.rows * blocks + warps - 1) / warps, kThreads),
                  by_block_kernel<T, aligned>, p);
  }
  if (p.granularity == Scale::block)
    return launch(where, shape((p.rows + kBlock - 1) / kBlock * blocks, kThreads, scratch),
                  by_square_kernel<T, aligned>, p);
  const int64_t pieces = (all + kThreads - 1) / kThreads;
  launch(where, shape(1, 1), clear_kernel, p);
  launch(where, shape(p.rows * pieces, kThreads, scratch), tensor_amax_kernel<T, aligned>, p,
         pieces);
  launch(where, shape(p.rows * pieces, kThreads), tensor_quantise_kernel<T, aligned>, p, pieces);
  launch(where, shape(1, 1), tensor_scale_kernel, p);
}

}  // namespace

void quantize_fp8(const QuantizeFp8Params& p, const Where& where) {
  with_dtype(p.dtype, "quantize_fp8", [&](auto t) {
    using T = decltype(t);
    constexpr int64_t size = Vector<T>::size;
    const bool aligned =
        p.cols % size == 0 && p.x_stride % size == 0 && is_aligned(p.x) && is_aligned(p.q);
    return aligned ? run<T, true>(p, where) : run<T, false>(p, where);
  });
}

}  // namespace lf::cuda
