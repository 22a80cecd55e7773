// quantize_fp8: the rule is in common/fp8.cuh. amax over a row, 128 columns of a row, a 128 x 128
// block, or the whole tensor.
//
// Cost from bf16: 3 bytes per element, since the second pass finds a row in registers or L2. Per
// tensor 5, since all of it is read before anything is written. Memory-bound.
#include "common/fp8.cuh"

namespace lf::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlock = 128;  // columns that share a scale

template <class T>
LF_DEVICE const T* row_of(const QuantizeParams& p, int64_t row) {
  return static_cast<const T*>(p.x) + row * p.x_stride;
}
LF_DEVICE uint8_t* codes_of(const QuantizeParams& p, int64_t row) {
  return static_cast<uint8_t*>(p.q) + row * p.cols;
}

// Each block takes one row.
template <class T, bool aligned, int held>
__global__ void __launch_bounds__(kMostThreads, 1) by_row_kernel(const QuantizeParams p) {
  LF_DYNAMIC_SHARED(memory);
  const int64_t row = blockIdx.x;
  const T* x = row_of<T>(p, row);
  const auto load = [&](int64_t at) { return load_vector<aligned>(x, at, p.cols); };
  quantize_row<aligned, held>(load, p.cols, p.scale_ub, p.scale + row, codes_of(p, row), memory);
}

// 128 columns of a row are 16 bytes per lane of half a warp, or of a whole warp in fp32.
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads)
    by_block_kernel(const QuantizeParams p, Divider<uint64_t> blocks) {
  constexpr int size = Vector<T>::size, lanes = kBlock / size;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
  uint64_t block;
  const int64_t row = static_cast<int64_t>(blocks.divide(item, block));
  const int64_t at = static_cast<int64_t>(block) * kBlock + threadIdx.x % lanes * size;
  const int64_t end = row < p.rows ? p.cols : 0;  // past the last row, only the shuffles run
  const Vector<T> v = load_vector<aligned>(row_of<T>(p, row), at, end);
  const float amax = reduce_lanes<lanes>(largest(v.at), MaxMagnitude{});
  const float scale = fp8_scale(amax, p.scale_ub);
  if (threadIdx.x % lanes == 0 && at < end) p.scale[item] = scale;
  store_e4m3<aligned>(codes_of(p, row), at, end, v.at, Fp8Divisor(scale, amax));
}

// Each block takes 128 x 128 elements and reads them twice, the second time from L1 or L2.
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads)
    by_square_kernel(const QuantizeParams p, Divider<uint32_t> blocks) {
  LF_DYNAMIC_SHARED(memory);
  constexpr int size = Vector<T>::size, across = kBlock / size, down = kThreads / across;
  uint32_t block;
  const int64_t row0 = static_cast<int64_t>(blocks.divide(blockIdx.x, block)) * kBlock;
  const int64_t column0 = static_cast<int64_t>(block) * kBlock;
  const int64_t at = column0 + static_cast<int64_t>(threadIdx.x % across) * size;
  const int64_t row1 = row0 + kBlock < p.rows ? row0 + kBlock : p.rows;
  const int64_t column1 = column0 + kBlock < p.cols ? column0 + kBlock : p.cols;
  float amax = 0;
  for (int64_t row = row0 + threadIdx.x / across; row < row1; row += down)
    amax = MaxMagnitude{}(amax, largest(load_vector<aligned>(row_of<T>(p, row), at, column1).at));
  amax = reduce_block(amax, reinterpret_cast<float*>(memory), MaxMagnitude{});
  const float scale = fp8_scale(amax, p.scale_ub);
  const Fp8Divisor by(scale, amax);
  if (threadIdx.x == 0) p.scale[blockIdx.x] = scale;
  for (int64_t row = row0 + threadIdx.x / across; row < row1; row += down)
    store_e4m3<aligned>(codes_of(p, row), at, column1,
                        load_vector<aligned>(row_of<T>(p, row), at, column1).at, by);
}

// Per tensor: p.scale holds the bits of the largest magnitude until the last kernel.
__global__ void clear_kernel(const QuantizeParams p) { p.scale[0] = 0.0f; }

template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads)
    tensor_amax_kernel(const QuantizeParams p, Divider<uint32_t> pieces) {
  LF_DYNAMIC_SHARED(memory);
  uint32_t piece;
  const int64_t row = pieces.divide(blockIdx.x, piece);
  const int64_t at = (static_cast<int64_t>(piece) * kThreads + threadIdx.x) * Vector<T>::size;
  float amax = largest(load_vector<aligned>(row_of<T>(p, row), at, p.cols).at);
  amax = reduce_block(amax, reinterpret_cast<float*>(memory), MaxMagnitude{});
  // A maximum does not depend on order: the atomic is as deterministic as a tree.
  if (threadIdx.x == 0) atomicMax(reinterpret_cast<unsigned*>(p.scale), __float_as_uint(amax));
}
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads)
    tensor_quantize_kernel(const QuantizeParams p, Divider<uint32_t> pieces) {
  uint32_t piece;
  const int64_t row = pieces.divide(blockIdx.x, piece);
  const int64_t at = (static_cast<int64_t>(piece) * kThreads + threadIdx.x) * Vector<T>::size;
  const float amax = p.scale[0];
  store_e4m3<aligned>(codes_of(p, row), at, p.cols,
                      load_vector<aligned>(row_of<T>(p, row), at, p.cols).at,
                      Fp8Divisor(fp8_scale(amax, p.scale_ub), amax));
}
__global__ void tensor_scale_kernel(const QuantizeParams p) {
  p.scale[0] = fp8_scale(p.scale[0], p.scale_ub);
}

template <class T, bool aligned>
void run(const QuantizeParams& p, const Where& where) {
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
    const RowShape row(all, 4);
    const LaunchShape s = shape(p.rows, row.threads, scratch);
    if (row.held == 2) return launch(where, s, by_row_kernel<T, aligned, 2>, p);
    if (row.held == 4) return launch(where, s, by_row_kernel<T, aligned, 4>, p);
    return launch(where, s, by_row_kernel<T, aligned, 0>, p);
  }
  const int64_t blocks = (p.cols + kBlock - 1) / kBlock;
  if (p.granularity == Scale::block && p.block_rows == 1) {
    constexpr int64_t items = kThreads * Vector<T>::size / kBlock;
    return launch(where, shape((p.rows * blocks + items - 1) / items, kThreads),
                  by_block_kernel<T, aligned>, p, Divider<uint64_t>(blocks));
  }
  if (p.granularity == Scale::block)
    return launch(where, shape((p.rows + kBlock - 1) / kBlock * blocks, kThreads, scratch),
                  by_square_kernel<T, aligned>, p, Divider<uint32_t>(blocks));
  const int64_t pieces = (all + kThreads - 1) / kThreads;
  launch(where, shape(1, 1), clear_kernel, p);
  const Divider<uint32_t> by(pieces);
  launch(where, shape(p.rows * pieces, kThreads, scratch), tensor_amax_kernel<T, aligned>, p, by);
  launch(where, shape(p.rows * pieces, kThreads), tensor_quantize_kernel<T, aligned>, p, by);
  launch(where, shape(1, 1), tensor_scale_kernel, p);
}

}  // namespace

void quantize(const QuantizeParams& p, const Where& where) {
  with_dtype(p.dtype, "quantize_fp8", [&](auto t) {
    using T = decltype(t);
    constexpr int64_t size = Vector<T>::size;
    const bool aligned =
        p.cols % size == 0 && p.x_stride % size == 0 && is_aligned(p.x) && is_aligned(p.q);
    return aligned ? run<T, true>(p, where) : run<T, false>(p, where);
  });
}

}  // namespace lf::cuda
