// Shared by the attention kernels: swizzled tiles of shared memory, the fragments of mma.sync
// m16n8k16, and one step of the online softmax. Lane 4 g + i of a warp holds rows g and g + 8 of a
// 16 x 16 operand, and columns 2 i and 2 i + 1 of the sums.
#pragma once

#include "vector.cuh"

namespace lf::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kMinusInfinity = -INFINITY;

LF_DEVICE int lane_id() { return static_cast<int>(threadIdx.x) % 32; }

// Byte offset of a row's 16-byte chunk, for rows of 64 bytes or more. One ldmatrix reads the same
// chunk of eight rows; the exclusive or spreads those over all 32 banks.
template <int chunks>
LF_DEVICE int swizzled(int row, int chunk) {
  static_assert(chunks == 4 || chunks % 8 == 0);
  const int mask = chunks == 4 ? row / 2 % 4 : row % 8;
  return (row * chunks + (chunk ^ mask)) * 16;
}

// Offset in a tile of this lane's row for an ldmatrix of 16 rows and two chunks, of queries and
// values or of keys (see load_keys).
template <int chunks>
LF_DEVICE int rows_offset(int lane) {
  return swizzled<chunks>(lane % 16, lane / 16);
}
template <int chunks>
LF_DEVICE int keys_offset(int lane) {
  return swizzled<chunks>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
}
// Moves by `row` rows, a multiple of 16, and `pair` pairs of chunks.
template <int chunks>
LF_DEVICE const unsigned char* at_offset(const unsigned char* tile, int offset, int row, int pair) {
  return tile + (offset ^ pair * 32) + row * chunks * 16;
}

// A [16, 16] operand, rows of queries: four registers.
template <int chunks>
LF_DEVICE void load_a(uint32_t (&a)[4], const unsigned char* tile, int offset, int row, int pair) {
  ptx::ldmatrix_x4(a, at_offset<chunks>(tile, offset, row, pair));
}
// Two [8, 16] operands, 16 keys as columns of the product. b[0], b[1] are the first eight.
template <int chunks>
LF_DEVICE void load_keys(uint32_t (&b)[4], const unsigned char* tile, int offset, int row,
                         int pair) {
  ptx::ldmatrix_x4(b, at_offset<chunks>(tile, offset, row, pair));
}
// Two [8, 16] operands, summed over 16 keys, for the 16 columns of two chunks.
template <int chunks>
LF_DEVICE void load_values(uint32_t (&b)[4], const unsigned char* tile, int offset, int row,
                           int pair) {
  ptx::ldmatrix_x4_trans(b, at_offset<chunks>(tile, offset, row, pair));
}

template <class T>
LF_DEVICE uint32_t pack(float low, float high) {
  union {
    T pair[2];
    uint32_t bits;
  } u;
  if constexpr (std::is_same_v<T, __half>) {
    *reinterpret_cast<__half2*>(u.pair) = __floats2half2_rn(low, high);
  } else {
    *reinterpret_cast<__nv_bfloat162*>(u.pair) = __floats2bfloat162_rn(low, high);
  }
  return u.bits;
}

// Reduces over the four lanes of a row.
LF_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
LF_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// What is subtracted from scores below a maximum: zero for a row that has seen no key yet.
LF_DEVICE float base_of(float top) { return top == kMinusInfinity ? 0.0f : top; }

// Processes a warp's 16 rows over a tile of keys. The base-2 scores are scale * s (of rows g and g
// + 8), with masked ones -inf; they become probabilities relative to the new top. total holds this
// lane's share of a row's sum. acc [columns / 8][4] is rescaled when some row's top has grown;
// otherwise every factor is exactly one and the rescaling is skipped.
template <int tiles, int columns>
LF_DEVICE void softmax_step(float (&s)[tiles][4], float (&top)[2], float (&total)[2],
                            float (&acc)[columns][4], float scale_low, float scale_high) {
  float scale[2] = {scale_low, scale_high};
  float higher[2] = {kMinusInfinity, kMinusInfinity};
#pragma unroll
  for (int n = 0; n < tiles; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) higher[e / 2] = fmaxf(higher[e / 2], s[n][e]);
  higher[0] = fmaxf(top[0], quad_max(higher[0]) * scale[0]);
  higher[1] = fmaxf(top[1], quad_max(higher[1]) * scale[1]);
  const float base[2] = {base_of(higher[0]), base_of(higher[1])};
  const float shrink[2] = {ptx::exp2_approx(top[0] - base[0]), ptx::exp2_approx(top[1] - base[1])};
  // One FMA per score. The FMA rounds once, but the maximum's product is rounded before it. Beyond
  // 2^20 that difference matters, so scores are scaled first.
  float sum[2] = {0, 0};
  if (__any_sync(0xffffffffu, fmaxf(fabsf(base[0]), fabsf(base[1])) > 0x1p20f)) {
#pragma unroll
    for (int n = 0; n < tiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] = __fmul_rn(s[n][e], scale[e / 2]);
    scale[0] = scale[1] = 1;
  }
#pragma unroll
  for (int n = 0; n < tiles; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[n][e] = ptx::exp2_approx(fmaf(s[n][e], scale[e / 2], -base[e / 2]));
      sum[e / 2] += s[n][e];
    }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    total[h] = total[h] * shrink[h] + sum[h];
    top[h] = higher[h];
  }
  if (__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
    for (int n = 0; n < columns; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[n][e] *= shrink[e / 2];
  }
}

// The A operand of the second product: probabilities of 16 keys, rounded to T.
template <class T>
LF_DEVICE void probabilities(uint32_t (&a)[4], const float (&first)[4], const float (&second)[4]) {
  a[0] = pack<T>(first[0], first[1]);
  a[1] = pack<T>(first[2], first[3]);
  a[2] = pack<T>(second[0], second[1]);
  a[3] = pack<T>(second[2], second[3]);
}

// Zeros for a row that sees no key. If all its scores are -inf, total is 0 too, and 0 / 0 is NaN.
LF_DEVICE float inverse_of(float total, bool sees) { return sees ? 1.0f / total : 0.0f; }

}  // namespace lf::cuda
