// simd.h for any C++17 compiler: loops over 8 lanes, with scalar conversions.
#pragma once
#include <cmath>
#include <cstdint>

#include "simd_scalar.h"

namespace lf::LF_ISA {

inline constexpr int kLanes = 8;
struct Vec {
  float v[kLanes];
};
#define LF_EACH for (int i = 0; i < kLanes; ++i)
inline Vec broadcast(float x) {
  Vec r;
  LF_EACH r.v[i] = x;
  return r;
}
inline Vec zeros() { return broadcast(0.0f); }
inline Vec operator+(Vec a, Vec b) {
  LF_EACH a.v[i] += b.v[i];
  return a;
}
inline Vec operator-(Vec a, Vec b) {
  LF_EACH a.v[i] -= b.v[i];
  return a;
}
inline Vec operator*(Vec a, Vec b) {
  LF_EACH a.v[i] *= b.v[i];
  return a;
}
inline Vec operator/(Vec a, Vec b) {
  LF_EACH a.v[i] /= b.v[i];
  return a;
}
// Rounds twice: without the instruction, a true FMA is a library call.
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline void add_product(Vec& sum, Vec a, Vec b) { sum = fma(a, b, sum); }
inline Vec abs(Vec a) {
  LF_EACH a.v[i] = bits_float(float_bits(a.v[i]) & 0x7fffffffu);
  return a;
}
inline Vec max(Vec a, Vec b) {
  LF_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline Vec min(Vec a, Vec b) {
  LF_EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline float reduce_add(Vec a) {
  for (int step = kLanes / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) a.v[i] += a.v[i + step];
  return a.v[0];
}
inline float reduce_max(Vec a) {
  for (int i = 1; i < kLanes; ++i) a.v[0] = a.v[0] > a.v[i] ? a.v[0] : a.v[i];
  return a.v[0];
}
template <class T>
inline Vec load(const T* p) {
  Vec r;
  LF_EACH r.v[i] = to_float(p[i]);
  return r;
}
template <class T>
inline Vec load_n(const T* p, int n) {
  Vec r = zeros();
  for (int i = 0; i < n; ++i) r.v[i] = to_float(p[i]);
  return r;
}
template <class T>
inline void store(T* p, Vec a) {
  LF_EACH p[i] = from_float<T>(a.v[i]);
}
template <class T>
inline void store_n(T* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) p[i] = from_float<T>(a.v[i]);
}
template <class T>
inline Vec round_to(Vec a) {
  LF_EACH a.v[i] = to_float(from_float<T>(a.v[i]));
  return a;
}
inline bool any_nan(Vec a) {
  bool nan = false;
  LF_EACH nan |= a.v[i] != a.v[i];
  return nan;
}
inline Vec bits_shifted_left_23(Vec a) {
  LF_EACH a.v[i] = bits_float(float_bits(a.v[i]) << 23);
  return a;
}
inline Vec swap_pairs(Vec a) {
  Vec r;
  LF_EACH r.v[i] = a.v[i ^ 1];
  return r;
}
#undef LF_EACH

}  // namespace lf::LF_ISA
