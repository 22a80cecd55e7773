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

// Two codes, exactly, as a __half2's bits. In hardware from sm_89 on; before, the code's bits are
// put where fp16 has them, 2^8 too small, subnormals included, and NaN is put back.
LF_DEVICE uint32_t from_e4m3x2(uint32_t codes) {
#if defined(LF_CUDA_EMULATOR) || __CUDA_ARCH__ >= 890
  const __half2_raw pair =
      __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes), __NV_E4M3);
  return pair.x | static_cast<uint32_t>(pair.y) << 16;
#else
  const uint32_t spread = __byte_perm(codes, 0, 0x1404);  // each in a high byte
  const uint32_t magnitude = (spread & 0x7f007f00u) >> 1;
  const uint32_t small = (spread & 0x80008000u) | magnitude, two_to_8 = 0x5c005c00u;
  const auto half2 = [](const uint32_t& bits) { return *reinterpret_cast<const __half2*>(&bits); };
  const __half2 exact = __hmul2(half2(small), half2(two_to_8));
  const uint32_t nan = __heq2_mask(half2(magnitude), half2(0x3f803f80u));
  return *reinterpret_cast<const uint32_t*>(&exact) | (nan & 0x7fff7fffu);
#endif
}

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
