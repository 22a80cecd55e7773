// Conversions of the dtypes in memory, one value at a time. The vector forms of simd_avx512.h,
// simd_avx2.h and simd_generic.h must match them bit for bit.
#pragma once
#include <cstdint>
#include <cstring>

namespace lf::LF_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct e4m3 {
  uint8_t bits;
};

inline uint32_t float_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
inline float bits_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// x, with the lower bits of a NaN cleared.
inline float plain_nan(float x) { return x == x ? x : bits_float(0x7fc00000u); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return bits_float(sign | ((magnitude << 13) + (112u << 23)));
  const float tiny = static_cast<float>(magnitude) * 0x1p-24f;
  return sign ? -tiny : tiny;
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
  const uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude >= 0x38800000u)
    return {static_cast<uint16_t>(
        sign | ((magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13))};
  // Subnormal: adding 0.5 leaves the rounded value in the low bits of the mantissa.
  const uint32_t rounded = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  return {static_cast<uint16_t>(sign | rounded)};
}
template <>
inline e4m3 from_float<e4m3>(float x) {
  const uint32_t u = float_bits(x), sign = (u >> 24) & 0x80u, magnitude = u & 0x7fffffffu;
  if (magnitude >= 0x43e80001u) return {static_cast<uint8_t>(sign | 0x7fu)};  // > 464, Inf, NaN
  if (magnitude >= 0x3c800000u)                                               // >= 2^-6
    return {static_cast<uint8_t>(
        sign | ((magnitude - (120u << 23) + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20))};
  const uint32_t rounded = float_bits(bits_float(magnitude) + 0x1p14f) - 0x46800000u;
  return {static_cast<uint8_t>(sign | rounded)};
}

}  // namespace lf::LF_ISA
