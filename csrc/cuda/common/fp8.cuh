// The rule of quantize_fp8, for every kernel that emits FP8:
//   scale = max(min(amax, scale_ub), tiny) / 448;  q = e4m3(clamp(x / scale, -448, 448))
// It divides: a product with the reciprocal differs in the last bit and so, at ties, in q.
#pragma once

#include "vector.cuh"

namespace lf::cuda {

LF_DEVICE float fp8_scale(float amax, float scale_ub) {
  constexpr float kTiny = 1.17549435e-38f;  // fp32's smallest normal number
  if (amax > scale_ub) amax = scale_ub;     // false for NaN, which stays
  if (amax < kTiny) amax = kTiny;
  return __fdiv_rn(amax, 448.0f);
}

// Saturates; NaN stays NaN.
LF_DEVICE uint8_t to_e4m3(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }

// `count` codes at a place of a row of n, 8 or 16 bytes at once where everything is aligned.
template <bool aligned, int count>
LF_DEVICE void store_e4m3(uint8_t* row, int64_t first, int64_t n, const uint8_t (&q)[count]) {
  if constexpr (aligned && (count == 4 || count == 8)) {
    using Word = std::conditional_t<count == 8, uint2, uint32_t>;
    if (first < n) *reinterpret_cast<Word*>(row + first) = *reinterpret_cast<const Word*>(q);
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i)
      if (first + i < n) row[first + i] = q[i];
  }
}

}  // namespace lf::cuda
