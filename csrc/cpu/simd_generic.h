// simd.h for any little-endian CPU: pairs of 4 lanes, which GCC and Clang keep in registers.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simd_scalar.h"

namespace lf::LF_ISA {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the kernels need a little-endian CPU");
inline constexpr int kLanes = 8;
using Floats = float __attribute__((vector_size(16)));
using Words = uint32_t __attribute__((vector_size(16)));
using Shorts = uint16_t __attribute__((vector_size(8)));
using Bytes = uint8_t __attribute__((vector_size(4)));
struct Vec {
  Floats lo, hi;
};
template <class F>
inline Vec each(F&& f, Vec a) {
  return {f(a.lo), f(a.hi)};
}
template <class F>
inline Vec each(F&& f, Vec a, Vec b) {
  return {f(a.lo, b.lo), f(a.hi, b.hi)};
}
inline Vec broadcast(float x) { return {Floats{x, x, x, x}, Floats{x, x, x, x}}; }
inline Vec zeros() { return broadcast(0.0f); }
inline Vec operator+(Vec a, Vec b) { return {a.lo + b.lo, a.hi + b.hi}; }
inline Vec operator-(Vec a, Vec b) { return {a.lo - b.lo, a.hi - b.hi}; }
inline Vec operator*(Vec a, Vec b) { return {a.lo * b.lo, a.hi * b.hi}; }
inline Vec operator/(Vec a, Vec b) { return {a.lo / b.lo, a.hi / b.hi}; }
// Rounds twice: without the instruction, a true FMA is a library call.
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline void add_product(Vec& sum, Vec a, Vec b) { sum = fma(a, b, sum); }
inline Floats select(Words mask, Floats a, Floats b) {
  return (Floats)(((Words)a & mask) | ((Words)b & ~mask));
}
inline Vec abs(Vec a) {
  return each([](Floats x) { return (Floats)((Words)x & 0x7fffffffu); }, a);
}
inline Vec max(Vec a, Vec b) {
  return each([](Floats x, Floats y) { return select((Words)(x > y), x, y); }, a, b);
}
inline Vec min(Vec a, Vec b) {
  return each([](Floats x, Floats y) { return select((Words)(x < y), x, y); }, a, b);
}
inline Vec bits_shifted_left_23(Vec a) {
  return each([](Floats x) { return (Floats)((Words)x << 23); }, a);
}
inline float reduce_add(Vec a) {
  const Floats sum = a.lo + a.hi;
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}
inline float reduce_max(Vec a) {
  const Floats most = max(a, {a.hi, a.hi}).lo;
  float r = most[0];
  for (int i = 1; i < 4; ++i) r = r > most[i] ? r : most[i];
  return r;
}

// Lanes of a, which count from 0, and of b, from 4.
template <int i, int j, int k, int l>
inline Floats pick(Floats a, Floats b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, i, j, k, l);
#else
  return __builtin_shuffle(a, b, Words{i, j, k, l});
#endif
}

inline Vec load(const float* p) {
  Floats lo, hi;  // a copy of the pair would go through memory
  std::memcpy(&lo, p, sizeof lo), std::memcpy(&hi, p + 4, sizeof hi);
  return {lo, hi};
}
// Loads values of 8 or 16 bits; f turns the bits of four into floats.
template <class T, class F>
inline Vec load_bits(const T* p, F&& f) {
  std::conditional_t<sizeof(T) == 1, Bytes, Shorts> lo, hi;
  std::memcpy(&lo, p, sizeof lo), std::memcpy(&hi, p + 4, sizeof hi);
  return {f(__builtin_convertvector(lo, Words)), f(__builtin_convertvector(hi, Words))};
}
// The value of integers below 2^31, times `unit`.
inline Floats multiple(Words n, float unit) {
  using Integers = int32_t __attribute__((vector_size(16)));
  return __builtin_convertvector((Integers)n, Floats) * unit;
}
inline Vec load(const bf16* p) {
  Words pairs;
  std::memcpy(&pairs, p, sizeof pairs);
  const Floats even = (Floats)(pairs << 16), odd = (Floats)(pairs & 0xffff0000u);
  return {pick<0, 4, 1, 5>(even, odd), pick<2, 6, 3, 7>(even, odd)};
}
inline Vec load(const f16* p) {
  return load_bits(p, [](Words x) {
    const Words magnitude = x & 0x7fffu;
    const Words special = (Words)(magnitude >= 0x7c00u) & (112u << 23);  // Inf and NaN
    const Words normal = (magnitude << 13) + (112u << 23) + special;
    const Words tiny = (Words)(magnitude < 0x400u);
    const Floats r = select(tiny, multiple(magnitude, 0x1p-24f), (Floats)normal);
    return (Floats)((Words)r | (x & 0x8000u) << 16);
  });
}
inline Vec load(const e4m3* p) {
  return load_bits(p, [](Words x) {
    const Words magnitude = x & 0x7fu, nan = (Words)(magnitude == 0x7fu);
    const Words normal = (((magnitude << 20) + (120u << 23)) & ~nan) | (nan & 0x7fc00000u);
    const Floats r = select((Words)(magnitude < 8u), multiple(magnitude, 0x1p-9f), (Floats)normal);
    return (Floats)((Words)r | (x & 0x80u) << 24);
  });
}
template <class T>
inline Vec load_n(const T* p, int n) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load(lanes);
}
inline void store(float* p, Vec a) {
  std::memcpy(p, &a.lo, sizeof a.lo), std::memcpy(p + 4, &a.hi, sizeof a.hi);
}
template <class T>
inline void store_n(T* p, Vec a, int n) {
  float lanes[kLanes];
  store(lanes, a);
  for (int i = 0; i < n; ++i) p[i] = from_float<T>(lanes[i]);
}
template <class T>
inline void store(T* p, Vec a) {
  store_n(p, a, kLanes);
}
// Stores values of 8 or 16 bits; f turns four floats into their bits.
template <class T, class F>
inline void store_bits(T* p, Vec a, F&& f) {
  using Stored = std::conditional_t<sizeof(T) == 1, Bytes, Shorts>;
  const Stored lo = __builtin_convertvector(f(a.lo), Stored);
  const Stored hi = __builtin_convertvector(f(a.hi), Stored);
  std::memcpy(p, &lo, sizeof lo), std::memcpy(p + 4, &hi, sizeof hi);
}
inline void store(bf16* p, Vec a) {
  store_bits(p, a, [](Floats x) {
    const Words u = (Words)x, nan = (Words)(x != x);
    const Words rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return (rounded & ~nan) | (nan & 0x7fc0u);
  });
}
inline void store(e4m3* p, Vec a) {
  store_bits(p, a, [](Floats x) {
    const Words u = (Words)x, magnitude = u & 0x7fffffffu, odd = (magnitude >> 20) & 1u;
    const Words normal = (magnitude - (120u << 23) + 0x7ffffu + odd) >> 20;
    const Words tiny = (Words)((Floats)magnitude + 0x1p14f) - 0x46800000u;  // below 2^-6
    const Words small = (Words)(magnitude < 0x3c800000u), nan = (Words)(magnitude > 0x43e80000u);
    return (small & tiny) | (~small & ~nan & normal) | (nan & 0x7fu) | ((u >> 24) & 0x80u);
  });
}
template <class T>
inline Vec round_to(Vec a) {
  T lanes[kLanes];
  store(lanes, a);
  return load(lanes);
}
inline Vec swap_pairs(Vec a) {
  return {pick<1, 0, 3, 2>(a.lo, a.lo), pick<1, 0, 3, 2>(a.hi, a.hi)};
}
inline bool any_nan(Vec a) {
  const Words nan = (Words)(a.lo != a.lo) | (Words)(a.hi != a.hi);
  return (nan[0] | nan[1] | nan[2] | nan[3]) != 0;
}

}  // namespace lf::LF_ISA
