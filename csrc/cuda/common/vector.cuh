// Memory in 16-byte pieces, fp32 in registers, and block sums in a fixed order.
#pragma once

#include <type_traits>

#include "launch.cuh"

#if !defined(LF_CUDA_EMULATOR)
#define LF_DEVICE __device__ __forceinline__
#else
#define LF_DEVICE inline
#endif

namespace lf::cuda {

LF_DEVICE float to_float(float x) { return x; }
LF_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
LF_DEVICE float to_float(__half x) { return __half2float(x); }

template <class T>
LF_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else
    return x;
}

// Converts an even count of bf16 by words: one shift or mask each, where splitting takes two.
template <class T, int count>
LF_DEVICE void to_floats(const T (&x)[count], float (&y)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<T, __nv_bfloat16> && count % 2 == 0) {
      const uint32_t pair = reinterpret_cast<const uint32_t*>(x)[i / 2];
      y[i] = __uint_as_float(i % 2 ? pair & 0xffff0000u : pair << 16);
    } else {
      y[i] = to_float(x[i]);
    }
  }
}

// Rounds to T and back, as eager PyTorch does when it stores an intermediate result. Two values at
// once cost half an instruction each; a single one uses the slow unit of the exponentials.
template <class T, int count>
LF_DEVICE void round_to(float (&x)[count]) {
  alignas(4) T y[count];
#pragma unroll
  for (int i = 0; i < count; ++i) y[i] = from_float<T>(x[i]);
  to_floats(y, x);
}

// 16 bytes of a row.
template <class T>
struct alignas(16) Vector {
  static constexpr int size = 16 / sizeof(T);
  T at[size];
};

// Loads elements [first, first + size) of a row of n. Elements past the end become zero and are not
// read. aligned: the row starts at a multiple of 16 bytes and n is a multiple of size.
template <bool aligned, class T>
LF_DEVICE Vector<T> load_vector(const T* row, int64_t first, int64_t n) {
  Vector<T> v;
  if constexpr (aligned) {
    if (first < n)
      *reinterpret_cast<uint4*>(&v) = *reinterpret_cast<const uint4*>(row + first);
    else
      *reinterpret_cast<uint4*>(&v) = uint4{0, 0, 0, 0};
  } else {
#pragma unroll
    for (int i = 0; i < Vector<T>::size; ++i)
      v.at[i] = first + i < n ? row[first + i] : from_float<T>(0.0f);
  }
  return v;
}

template <bool aligned, class T>
LF_DEVICE void store_vector(T* row, int64_t first, int64_t n, const Vector<T>& v) {
  if constexpr (aligned) {
    if (first < n) ptx::store_16(row + first, *reinterpret_cast<const uint4*>(&v));
  } else {
#pragma unroll
    for (int i = 0; i < Vector<T>::size; ++i)
      if (first + i < n) row[first + i] = v.at[i];
  }
}

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// ---- over a block: combine(a, b) of every thread's value; scratch holds 32 floats ----

struct Sum {
  LF_DEVICE float operator()(float a, float b) const { return a + b; }
};
// For magnitudes, as bits: they order like their values, with NaN above infinity.
struct MaxMagnitude {
  LF_DEVICE float operator()(float a, float b) const {
    return __float_as_uint(a) > __float_as_uint(b) ? a : b;
  }
};

// Reduces over each `lanes` neighboring lanes of a warp. All lanes of the warp must take part.
template <int lanes, class Combine>
LF_DEVICE float reduce_lanes(float value, Combine combine) {
#pragma unroll
  for (int mask = lanes / 2; mask > 0; mask /= 2)
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, mask));
  return value;
}

template <class Combine>
LF_DEVICE float reduce_warp(float value, Combine combine) {
  return reduce_lanes<32>(value, combine);
}

// All threads get the result. The thread count is a multiple of 32. A barrier at both ends lets the
// scratch be reused.
template <class Combine>
LF_DEVICE float reduce_block(float value, float* scratch, Combine combine) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  value = reduce_warp(value, combine);
  if (warps == 1) return value;
  __syncthreads();
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  // Zero is the identity for sums and for magnitudes.
  return reduce_warp(lane < warps ? scratch[lane] : 0.0f, combine);
}

// Calls f with a value of the dtype's C++ type.
template <class F>
void with_dtype(DType dtype, const char* op, F&& f) {
  switch (dtype) {
    case DType::bf16:
      return f(__nv_bfloat16{});
    case DType::f16:
      return f(__half{});
    case DType::f32:
      return f(float{});
    default:
      throw std::runtime_error(std::string(op) + ": no kernel for this dtype");
  }
}

}  // namespace lf::cuda
