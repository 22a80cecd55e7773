// The rule of quantize_fp8, for every kernel that emits FP8:
//   scale = max(min(amax, scale_ub), tiny) / 448;  q = e4m3(clamp(x / scale, -448, 448))
// x / scale rounds as IEEE division does. x times 1 / scale would differ in the last bit and so, at
// ties, in q.
#pragma once

#include "divide.cuh"

namespace lf::cuda {

// The largest magnitude, by bits: NaN orders above infinity.
template <class T, int count>
LF_DEVICE float largest(const T (&x)[count]) {
  if constexpr (sizeof(T) == 2) {
    const auto* pairs = reinterpret_cast<const uint32_t*>(x);
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < count / 2; ++i) most = __vmaxu2(most, pairs[i] & 0x7fff7fffu);
    most = __vmaxu2(most, most >> 16);
    return to_float(reinterpret_cast<const T*>(&most)[0]);
  } else {
    float most = 0;
#pragma unroll
    for (int i = 0; i < count; ++i) most = MaxMagnitude{}(most, fabsf(x[i]));
    return most;
  }
}

LF_DEVICE float fp8_scale(float amax, float scale_ub) {
  constexpr float kTiny = 448 * FLT_MIN;  // its scale is normal, which flush-to-zero leaves
  if (amax > scale_ub) amax = scale_ub;   // false for NaN, which stays
  if (amax < kTiny) amax = kTiny;
  return quotient<false>(amax, 448.0f, 1.0f / 448.0f);
}

// Two codes, a's in the low byte. Saturates; NaN stays NaN. One instruction from sm_89 on.
LF_DEVICE uint32_t to_e4m3x2(float a, float b) {
#if !defined(LF_CUDA_EMULATOR) && __CUDA_ARCH__ >= 890
  return __nv_cvt_float2_to_fp8x2(float2{a, b}, __NV_SATFINITE, __NV_E4M3);
#else
  const auto code = [](float x) {
    const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
    // Rounds to nearest even: adds half an ulp less one, plus one if the kept part is odd.
    const uint32_t normal = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
    // Below 2^-6 e4m3 steps by 2^-9, which is fp32's ulp at 2^14.
    const uint32_t counted = __float_as_uint(__fadd_rn(fabsf(x), 0x1p14f)) - 0x46800000u;
    uint32_t q = magnitude < 0x3c800000u ? counted : normal;
    q = q < 0x7e ? q : 0x7e;
    if (magnitude > 0x7f800000u) q = 0x7f;
    return q | (bits >> 24 & 0x80);
  };
  return code(a) | code(b) << 8;
#endif
}

// Divides by one scale. If the scale is ordinary and no x is far beyond 448 times it, a quotient is
// a product and two FMAs. Otherwise x and the scale are moved to where nothing underflows, and
// quotients beyond 448 are clamped before they overflow. Threads that share a scale do not diverge.
class Fp8Divisor {
 public:
  LF_DEVICE explicit Fp8Divisor(float scale) {
    const float size = fabsf(scale);
    factor_ = size < 0x1p-60f ? 0x1p64f : size > 0x1p64f ? 0x1p-64f : 1.0f;
    scale_ = scale * factor_;
    if (size > FLT_MAX) factor_ = 0, scale_ = 1;  // x / Inf is 0, or NaN for Inf
    reciprocal_ = reciprocal(scale_);
  }
  // amax: an upper bound of |x|.
  LF_DEVICE Fp8Divisor(float scale, float amax) : Fp8Divisor(scale) {
    ordinary_ = factor_ == 1.0f && amax * reciprocal_ < 0x1p64f;
  }

  // Codes of x / scale, four per word, the first in the lowest byte.
  template <class T, int count>
  LF_DEVICE void encode(const T (&x)[count], uint32_t (&words)[(count + 3) / 4]) const {
    constexpr int step = count < 4 ? count : 4;  // one word at a time, to save registers
#pragma unroll
    for (int k = 0; k < count; k += step) {
      float y[step];
      to_floats(reinterpret_cast<const T(&)[step]>(x[k]), y);
      if (ordinary_) {
#pragma unroll
        for (int i = 0; i < step; ++i) y[i] = quotient<true>(y[i], scale_, reciprocal_);
      } else {
#pragma unroll
        for (int i = 0; i < step; ++i) {
          const float lifted = y[i] * factor_;
          const float cut = fmaxf(fminf(lifted * reciprocal_, 512.0f), -512.0f);
          y[i] = fmaf(fmaf(cut, scale_, -lifted), -reciprocal_, cut);
        }
      }
      words[k / 4] = to_e4m3x2(y[0], step > 1 ? y[1] : 0.0f);
      if constexpr (step == 4) words[k / 4] |= to_e4m3x2(y[2], y[3]) << 16;
    }
  }

 private:
  float scale_, reciprocal_, factor_;
  bool ordinary_ = false;
};

// Two codes, exactly, as the bits of a __half2. One instruction from sm_89 on; before, a code's
// bits move to their places in fp16 (2^-8 of the value, also for subnormals) and NaN is restored.
LF_DEVICE uint32_t from_e4m3x2(uint32_t codes) {
#if defined(LF_CUDA_EMULATOR) || __CUDA_ARCH__ >= 890
  const __half2_raw pair =
      __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes), __NV_E4M3);
  return pair.x | static_cast<uint32_t>(pair.y) << 16;
#else
  const uint32_t spread = __byte_perm(codes, 0, 0x1404);  // each code in a high byte
  const uint32_t magnitude = (spread & 0x7f007f00u) >> 1;
  const uint32_t small = (spread & 0x80008000u) | magnitude, two_to_8 = 0x5c005c00u;
  const auto half2 = [](const uint32_t& bits) { return *reinterpret_cast<const __half2*>(&bits); };
  const __half2 exact = __hmul2(half2(small), half2(two_to_8));
  const uint32_t nan = __heq2_mask(half2(magnitude), half2(0x3f803f80u));
  return *reinterpret_cast<const uint32_t*>(&exact) | (nan & 0x7fff7fffu);
#endif
}

// Stores x / scale as e4m3 in a row of n: 4, 8 or 16 bytes at once if everything is aligned.
template <bool aligned, class T, int count>
LF_DEVICE void store_e4m3(uint8_t* row, int64_t first, int64_t n, const T (&x)[count],
                          const Fp8Divisor& by) {
  uint32_t words[(count + 3) / 4];
  by.encode(x, words);
  if constexpr (aligned && count % 4 == 0) {
    using Word =
        std::conditional_t<count == 16, uint4, std::conditional_t<count == 8, uint2, uint32_t>>;
    if (first < n) *reinterpret_cast<Word*>(row + first) = *reinterpret_cast<const Word*>(words);
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i)
      if (first + i < n) row[first + i] = static_cast<uint8_t>(words[i / 4] >> i % 4 * 8);
  }
}

// Most threads of a block that quantizes a row.
constexpr int kMostThreads = 1024;

// Threads for a row of `all` vectors, and how many of these a thread keeps in registers, at most
// `most` (2 or 4); 0: none.
struct RowShape {
  int64_t held, threads;
  RowShape(int64_t all, int64_t most)
      : held(all <= 2 * kMostThreads      ? 2
             : all <= most * kMostThreads ? most
                                          : 0),
        threads(held ? ((all + held - 1) / held + 31) / 32 * 32 : kMostThreads) {}
};

// Quantizes a row of n by the whole block. load(at) gives a thread's vector from column `at` on,
// with zeros past the end. held: how many it keeps; 0: none, each is loaded twice.
template <bool aligned, int held, class Load>
LF_DEVICE void quantize_row(const Load& load, int64_t n, float scale_ub, float* scale, uint8_t* q,
                            unsigned char* scratch) {
  using Loaded = decltype(load(int64_t{0}));
  constexpr int size = Loaded::size;
  const int64_t step = static_cast<int64_t>(blockDim.x) * size;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * size;
  float amax = 0;
  Loaded v[held ? held : 1];
  if constexpr (held > 0) {
#pragma unroll
    for (int k = 0; k < held; ++k) v[k] = load(first + k * step);
#pragma unroll
    for (int k = 0; k < held; ++k) amax = MaxMagnitude{}(amax, largest(v[k].at));
  } else {
    for (int64_t at = first; at < n; at += step) amax = MaxMagnitude{}(amax, largest(load(at).at));
  }
  amax = reduce_block(amax, reinterpret_cast<float*>(scratch), MaxMagnitude{});
  const float s = fp8_scale(amax, scale_ub);
  if (threadIdx.x == 0) *scale = s;
  const Fp8Divisor by(s, amax);
  if constexpr (held > 0) {
    // Recomputed, so that a vector's place takes no registers during the reduction.
    const int64_t again = int64_t{ptx::opaque(static_cast<int>(threadIdx.x))} * size;
#pragma unroll
    for (int k = 0; k < held; ++k) store_e4m3<aligned>(q, again + k * step, n, v[k].at, by);
  } else {
    for (int64_t at = first; at < n; at += step) store_e4m3<aligned>(q, at, n, load(at).at, by);
  }
}

}  // namespace lf::cuda
