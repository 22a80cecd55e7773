// Fast conversions of e4m3 codes to operands of fp32 and bf16 products.
//
// With a code in the high byte of a 16-bit lane, an arithmetic shift and a mask give the bits of a
// 16-bit float. A shift by 4 gives bf16, the value times 2^-120; a shift by 1 gives fp16, the value
// times 2^-8. kWeightShift is that exponent. Codes 0x7f and 0xff would decode as 480: NanSearch
// looks for them, and the exact forms handle NaN.
#pragma once
#include "simd.h"

namespace lf::LF_ISA {

#if defined(LF_AVX512)

inline constexpr int kWeightShift = 8;  // fp16: no denormal operands, which cost Intel 150 cycles

// Looks for NaN codes: twice 0x7f or 0xff is the largest byte. kInMemory: holds no register.
struct NanSearch {
  __m512i most = _mm512_setzero_si512();
  template <bool kInMemory = false>
  void see(const e4m3* p) {
    const __m512i c = _mm512_loadu_si512(p);
    most = _mm512_max_epu8(most, _mm512_add_epi8(c, c));
  }
  bool found() const { return _mm512_cmpeq_epi8_mask(most, _mm512_set1_epi8(-2)) != 0; }
};

#elif defined(LF_AVX2)

inline constexpr int kWeightShift = 120;  // bf16: half the instructions of fp16

// In memory: GCC 12 would keep constants in registers and spill a sum for each.
struct alignas(32) E4m3Masks {
  uint32_t bf16_bits[8], high_half[8];
};
inline constexpr E4m3Masks kMasks = {{0x87f087f0, 0x87f087f0, 0x87f087f0, 0x87f087f0, 0x87f087f0,
                                      0x87f087f0, 0x87f087f0, 0x87f087f0},
                                     {0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000,
                                      0xffff0000, 0xffff0000, 0xffff0000}};
inline __m256i and_memory(__m256i a, const uint32_t (&mask)[8]) {
  __m256i r;
  asm("vpand %2, %1, %0" : "=x"(r) : "x"(a), "m"(mask));
  return r;
}
inline Vec half_lanes(__m256i c, int odd) {  // bf16
  return {_mm256_castsi256_ps(odd ? and_memory(c, kMasks.high_half) : _mm256_slli_epi32(c, 16))};
}
inline __m256i load_bits(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

struct NanSearch {
  __m256i most = _mm256_setzero_si256();
  template <bool kInMemory = false>
  void see(const void* p) {
    const __m256i c = load_bits(p);
    most = _mm256_max_epu8(most, _mm256_add_epi8(c, c));
    if constexpr (kInMemory) asm volatile("" : "+m"(most));
  }
  bool found() const {
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(most, _mm256_set1_epi8(-2))) != 0;
  }
};

#else

inline constexpr int kWeightShift = 0;  // decoded exactly from the start

struct NanSearch {
  template <bool kInMemory = false>
  void see(const e4m3*) {}
  bool found() const { return false; }
};

#endif

#if defined(LF_AVX512_BF16)

// e4m3 -> bf16 by two lookups in a 128-entry table, one for each byte of the result.
struct E4m3Table {
  alignas(64) uint8_t high[128], low[128];
  constexpr E4m3Table() : high(), low() {
    for (int code = 0; code < 128; ++code) {
      int exponent = code >> 3, mantissa = code & 7;
      if (exponent == 0 && mantissa != 0) {  // subnormal: normalize
        exponent = 1;
        for (; mantissa < 8; mantissa *= 2) --exponent;
        mantissa &= 7;
      }
      int bits = (exponent + 120) << 7 | mantissa << 4;
      if (code == 0) bits = 0;
      if (code == 127) bits = 0x7fc0;
      high[code] = static_cast<uint8_t>(bits >> 8);
      low[code] = static_cast<uint8_t>(bits);
    }
  }
};
inline constexpr E4m3Table kE4m3Table;

// Unpacking works within 128 bits: a has the first 8 codes of every 16, and b the others.
inline void decode_e4m3(__m512i codes, __m512i& a, __m512i& b) {
  const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(kE4m3Table.low), codes,
                                               _mm512_load_si512(kE4m3Table.low + 64));
  __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(kE4m3Table.high), codes,
                                          _mm512_load_si512(kE4m3Table.high + 64));
  high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(-128), 0xf8);  // a | (b & c)
  a = _mm512_unpacklo_epi8(low, high);
  b = _mm512_unpackhi_epi8(low, high);
}

#endif

}  // namespace lf::LF_ISA
