// silu_and_mul and its FP8 form, the middle of SwiGLU:
//   s = gate / (1 + e^-gate)          fp32, then rounded to dtype
//   out = s * up                      rounded to dtype; quantized by row when scale is set
//
// Cost in bf16: 6 bytes per output element (5 with FP8 output), one exponential and one division:
// memory-bound. Without FP8 a row is cut into pieces, because each element is independent. With FP8
// a block keeps the row's products in registers, up to 32,768 of bf16 and 16,384 of fp16; for wider
// rows it computes them again from L2.
#include "common/fp8.cuh"

namespace lf::cuda {
namespace {

constexpr int kThreads = 256;

// e^-g. For 16-bit types 2^(-g log2(e)): rounding that exponent costs up to 100 ulp of fp32 near g
// = -88, which changes a bf16 or fp16 result only at a rare tie.
template <class T>
LF_DEVICE float exp_of_minus(float g) {
  if constexpr (std::is_same_v<T, float>)
    return expf(-g);
  else
    return ptx::exp2_approx(g * -1.44269504f);
}

template <class T>
LF_DEVICE Vector<T> multiply(const Vector<T>& gate, const Vector<T>& up) {
  constexpr int few = 4;  // more than four at a time would spill registers
  Vector<T> out;
#pragma unroll
  for (int k = 0; k < Vector<T>::size; k += few) {
    float g[few], u[few];
    to_floats(reinterpret_cast<const T(&)[few]>(gate.at[k]), g);
#pragma unroll
    for (int i = 0; i < few; ++i) {
      // Scaling both sides by 1/4, exact for 16-bit types, makes the reciprocal of every finite
      // divisor a normal number. For an infinite divisor g * 0 remains.
      const float part = sizeof(T) == 2 || g[i] < -80.0f ? 0.25f : 1.0f;
      const float d = fmaf(exp_of_minus<T>(g[i]), part, part);
      g[i] = quotient<false>(__fmul_rn(g[i], part), d, reciprocal(d));
    }
    round_to<T>(g);
    to_floats(reinterpret_cast<const T(&)[few]>(up.at[k]), u);
#pragma unroll
    for (int i = 0; i < few; ++i) out.at[k + i] = from_float<T>(g[i] * u[i]);
  }
  return out;
}

template <class T, bool aligned>
LF_DEVICE Vector<T> product(const T* gate, int64_t at, int64_t width) {
  return multiply(load_vector<aligned>(gate, at, width),
                  load_vector<aligned>(gate + width, at, width));
}

// Each thread computes one vector of the output.
template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads)
    silu_and_mul_kernel(const ActivationParams p, Divider<uint32_t> pieces) {
  uint32_t piece;
  const int64_t row = pieces.divide(blockIdx.x, piece);
  const int64_t at = (static_cast<int64_t>(piece) * kThreads + threadIdx.x) * Vector<T>::size;
  if (at >= p.width) return;
  const T* gate = static_cast<const T*>(p.gate_up) + row * p.gate_up_stride;
  T* out = static_cast<T*>(p.out) + row * p.width;
  store_vector<aligned>(out, at, p.width, product<T, aligned>(gate, at, p.width));
}

// Each block takes one row.
template <class T, bool aligned, int held>
__global__ void __launch_bounds__(kMostThreads, 1)
    silu_and_mul_fp8_kernel(const ActivationParams p) {
  LF_DYNAMIC_SHARED(memory);
  const int64_t row = blockIdx.x;
  const T* gate = static_cast<const T*>(p.gate_up) + row * p.gate_up_stride;
  const auto load = [&](int64_t at) { return product<T, aligned>(gate, at, p.width); };
  quantize_row<aligned, held>(load, p.width, p.scale_ub, p.scale + row,
                              static_cast<uint8_t*>(p.out) + row * p.width, memory);
}

template <class T, bool aligned>
void run(const ActivationParams& p, const Where& where) {
  const int64_t all = (p.width + Vector<T>::size - 1) / Vector<T>::size;
  if (!p.scale) {
    const int64_t pieces = (all + kThreads - 1) / kThreads;
    const dim3 grid(static_cast<unsigned>(p.rows * pieces));
    return launch(where, {"silu_and_mul", {p.rows, 2 * p.width}, grid, dim3(kThreads)},
                  silu_and_mul_kernel<T, aligned>, p, Divider<uint32_t>(pieces));
  }
  constexpr int most = std::is_same_v<T, __half> ? 2 : 4;  // four would spill on sm_89
  const RowShape row(all, most);
  const LaunchShape shape{"silu_and_mul_fp8",
                          {p.rows, 2 * p.width},
                          dim3(static_cast<unsigned>(p.rows)),
                          dim3(static_cast<unsigned>(row.threads)),
                          32 * sizeof(float)};
  if (row.held == 2) return launch(where, shape, silu_and_mul_fp8_kernel<T, aligned, 2>, p);
  if constexpr (most == 4)
    if (row.held == 4) return launch(where, shape, silu_and_mul_fp8_kernel<T, aligned, 4>, p);
  launch(where, shape, silu_and_mul_fp8_kernel<T, aligned, 0>, p);
}

}  // namespace

void activation(const ActivationParams& p, const Where& where) {
  with_dtype(p.dtype, "silu_and_mul", [&](auto t) {
    using T = decltype(t);
    constexpr int64_t size = Vector<T>::size;
    const bool aligned = p.width % size == 0 && p.gate_up_stride % size == 0 &&
                         is_aligned(p.gate_up) && is_aligned(p.out);
    return aligned ? run<T, true>(p, where) : run<T, false>(p, where);
  });
}

}  // namespace lf::cuda
