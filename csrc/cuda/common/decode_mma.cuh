// decode_attention's products: a few rows of queries with a warp's tile of keys and values, 16-bit
// or e4m3. C is the operands' type: the cache's or, for e4m3, __half.
#pragma once

#include "decode_plan.cuh"
#include "fp8.cuh"

namespace lf::cuda {

// The query operands of 16 rows. For an FP8 cache they are fp16 times a power of two, in the order
// of the e4m3 codes. scale: factors of the two rows' scores, which take in that power.
template <class C, bool fp8, int D>
LF_DEVICE void load_queries(const DecodeAttentionParams& p, const DecodePlan& plan, const Part& w,
                            int first_row, int rows, uint32_t (&q)[D / 16][4], float (&scale)[2]) {
  const int i = lane_id() % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = first_row + lane_id() / 4 + 8 * h;
    const bool valid = r < rows;
    const uint16_t* from = static_cast<const uint16_t*>(p.q) +
                           (valid ? Row(plan, w.kv_head, r).in(p.q_stride, w.b) : 0);
#pragma unroll
    for (int d = 0; d < D / 16; ++d)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = 16 * d + (fp8 ? 4 * i + 2 * half : 8 * half + 2 * i);
        uint32_t pair = 0;
        if (valid && column < p.head_dim) {
          if (plan.q_aligned)
            pair = *reinterpret_cast<const uint32_t*>(from + column);
          else
            pair = from[column] | static_cast<uint32_t>(from[column + 1]) << 16;
        }
        q[d][2 * half + h] = pair;
      }
    if constexpr (!fp8) continue;
    if (p.dtype != DType::f16) {
      // bf16 -> fp16. Elements below 2^-14 of the row's largest are off by at most 2^-25 of it.
      float largest = 0;
#pragma unroll
      for (int d = 0; d < D / 16; ++d)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t pair = q[d][2 * half + h];
          largest = fmaxf(largest, fmaxf(fabsf(__uint_as_float(pair << 16)),
                                         fabsf(__uint_as_float(pair & 0xffff0000u))));
        }
      uint32_t exponent = __float_as_uint(quad_max(largest)) & 0x7f800000u;
      exponent = exponent < 0x00800000u ? 0x00800000u : exponent;
      exponent = exponent > 0x7e800000u ? 0x7e800000u : exponent;
      const float inverse = __uint_as_float(0x7f000000u - exponent);
      scale[h] *= __uint_as_float(exponent);
#pragma unroll
      for (int d = 0; d < D / 16; ++d)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t pair = q[d][2 * half + h];
          q[d][2 * half + h] = pack<__half>(__uint_as_float(pair << 16) * inverse,
                                            __uint_as_float(pair & 0xffff0000u) * inverse);
        }
    }
    // The largest score is found before scaling: a negative scale would reverse the order, and a
    // masked score times zero is NaN.
    const uint32_t sign = __float_as_uint(scale[h]) & 0x80000000u;
#pragma unroll
    for (int d = 0; d < D / 16; ++d)
#pragma unroll
      for (int half = 0; half < 2; ++half) q[d][2 * half + h] ^= sign | sign >> 16;
    scale[h] = fabsf(scale[h]) < 1.17549435e-38f ? 1.17549435e-38f : fabsf(scale[h]);
  }
}

// s [keys / 8] += q k^T of a warp's tile.
template <class C, bool fp8, int D, int keys, int row_tiles>
LF_DEVICE void scores(float (&s)[row_tiles][keys / 8][4], const uint32_t (&q)[row_tiles][D / 16][4],
                      const unsigned char* tile, int offset) {
  constexpr int width = fp8 ? 32 : 16;  // elements of head_dim in one ldmatrix of two chunks
#pragma unroll
  for (int d = 0; d < D / width; ++d)
#pragma unroll
    for (int n = 0; n < keys / 16; ++n) {
      uint32_t b[4];
      load_keys<D / (width / 2)>(b, tile, offset, 16 * n, d);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (fp8) {
          const uint32_t low = from_e4m3x2(b[j] & 0xffff), high = from_e4m3x2(b[j] >> 16);
#pragma unroll
          for (int m = 0; m < row_tiles; ++m)
            ptx::mma_16816(s[m][2 * n + j / 2], q[m][2 * d + j % 2], low, high, C{});
        } else if (j % 2 == 0) {
#pragma unroll
          for (int m = 0; m < row_tiles; ++m)
            ptx::mma_16816(s[m][2 * n + j / 2], q[m][d], b[j], b[j + 1], C{});
        }
      }
    }
}

// acc [D / 8] += p v. Tile n of eight columns holds d = 8 n and on. FP8: of each 16 columns, tile 2
// n holds the even d and tile 2 n + 1 the odd ones.
template <class C, bool fp8, int D, int keys, int row_tiles>
LF_DEVICE void add_values(float (&acc)[row_tiles][D / 8][4],
                          const uint32_t (&a)[row_tiles][keys / 16][4], const unsigned char* tile,
                          int offset) {
  constexpr int chunks = fp8 ? D / 16 : D / 8;
#pragma unroll
  for (int n = 0; n < keys / 16; ++n) {
#pragma unroll
    for (int c = 0; c < chunks; c += 2) {
      uint32_t b[4];
      load_values<chunks>(b, tile, offset, 16 * n, c / 2);
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const int columns = fp8 ? 2 * c + j : c + j / 2;
        if constexpr (fp8) {
          const uint32_t low = __byte_perm(b[j], 0, 0x3120);  // even column of two keys, then odd
          const uint32_t high = __byte_perm(b[j + 1], 0, 0x3120);
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) {
            const uint32_t b0 = from_e4m3x2(low >> 16 * odd & 0xffff);
            const uint32_t b1 = from_e4m3x2(high >> 16 * odd & 0xffff);
#pragma unroll
            for (int m = 0; m < row_tiles; ++m)
              ptx::mma_16816(acc[m][columns + odd], a[m][n], b0, b1, C{});
          }
        } else {
#pragma unroll
          for (int m = 0; m < row_tiles; ++m)
            ptx::mma_16816(acc[m][columns], a[m][n], b[j], b[j + 1], C{});
        }
      }
    }
  }
}

}  // namespace lf::cuda
