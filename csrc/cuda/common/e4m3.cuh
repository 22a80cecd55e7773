// e4m3 weights as 16-bit operands of mma.sync, four at a time.
#pragma once

#include "vector.cuh"

namespace lf::cuda {

LF_DEVICE uint32_t bits_of(__nv_bfloat162 x) { return *reinterpret_cast<uint32_t*>(&x); }
LF_DEVICE uint32_t bits_of(__half2 x) { return *reinterpret_cast<uint32_t*>(&x); }

// Codes 0 and 1, 2 and 3 of a word as pairs. seeeemmm has its exponent and mantissa four places
// below bf16's (seven below fp16's, one above when shifted by a byte), so a shift and an exact
// product with a power of two, which also makes subnormals right, is the whole conversion. The
// codes of NaN come out as 480: saw_nan says so.
template <class T>
LF_DEVICE void decode(uint32_t word, uint32_t (&pair)[2]) {
  // Byte 0 to the high byte of the low half, byte 1 to that of the high half; then bytes 2 and 3.
  const uint32_t low = (word & 0xff) << 8 | (word & 0xff00) << 16;
  const uint32_t high = (word >> 16 & 0xff) << 8 | (word & 0xff000000);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 up = __float2bfloat162_rn(1.329227995784916e36f);  // 2^120
    const uint32_t raw[2] = {(low & 0x80008000u) | (low & 0x7f007f00u) >> 4,
                             (high & 0x80008000u) | (high & 0x7f007f00u) >> 4};
    pair[0] = bits_of(__hmul2(*reinterpret_cast<const __nv_bfloat162*>(&raw[0]), up));
    pair[1] = bits_of(__hmul2(*reinterpret_cast<const __nv_bfloat162*>(&raw[1]), up));
  } else {
    const __half2 up = __float2half2_rn(256.0f);  // 2^8
    const uint32_t raw[2] = {(low & 0x80008000u) | (low & 0x7f007f00u) >> 1,
                             (high & 0x80008000u) | (high & 0x7f007f00u) >> 1};
    pair[0] = bits_of(__hmul2(*reinterpret_cast<const __half2*>(&raw[0]), up));
    pair[1] = bits_of(__hmul2(*reinterpret_cast<const __half2*>(&raw[1]), up));
  }
}

// Nonzero when one of the four codes is NaN (0x7f or 0xff): only they carry into the top bit.
LF_DEVICE uint32_t saw_nan(uint32_t word) {
  return ((word & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
}

LF_DEVICE float e4m3_to_float(uint8_t code) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3)));
}

}  // namespace lf::cuda
