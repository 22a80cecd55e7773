// linear, fp8_linear and fp8_gemm: out = (x @ weight^T) * x_scale * weight_scale + bias, in fp32
// and rounded once.
//
// With few rows, a panel of 64 output features streams through the registers and is decoded there:
// one sequential read of the weight, which is the product's whole cost (N * K bytes for e4m3). With
// more rows, a block of the panel stays in a cache while every tile of rows uses it, and the cost
// is arithmetic, 2 M N K FLOPs. A plain weight is first packed block by block.
//
// One output is one chain of sums over k, whatever M, the threads and the weight's layout: a row's
// result has the same bits alone or in a batch, from a packed or a plain weight. With scales per
// block of 128 columns, or an fp32 result, the chain restarts at each block of 128 and the scaled
// sums are added in order.
#include "kernels.h"
#include "linear_dot.h"
#include "linear_fma.h"
#include "linear_int16.h"
#include "parallel.h"
#include "simd.h"

namespace lf::LF_ISA {
namespace {

template <class S, class T>
void choose_math(const LinearParams& p, int threads) {
#if defined(LF_AVX512_BF16)
  constexpr bool kDot = (std::is_same_v<S, bf16> || std::is_same_v<S, e4m3>) &&
                        (std::is_same_v<T, bf16> || std::is_same_v<T, e4m3>);
  if constexpr (kDot) return run_dot<S, T>(p, threads);
#endif
  run_fma<S, T>(p, threads);
}

}  // namespace

void linear(const LinearParams& p, int threads) {
  if (p.m == 0 || p.n == 0) return;
  if (p.x_dtype == DType::e4m3) return choose_math<e4m3, e4m3>(p, threads);
  with_dtype(p.x_dtype, [&](auto* t) {
    using S = std::remove_pointer_t<decltype(t)>;
#if defined(LF_AVX2)
    if (p.int16 && p.weight_dtype == DType::e4m3) return run_int16<S>(p, threads);
#endif
    if (p.weight_dtype == DType::e4m3) return choose_math<S, e4m3>(p, threads);
    choose_math<S, S>(p, threads);
  });
}

void pack_weight(const void* weight, void* packed, int64_t n, int64_t k, int64_t stride,
                 int itemsize, int threads) {
  const auto pack = [&](auto unit) {
    using T = decltype(unit);
    parallel_for(n / kPanel, threads, [&](int64_t panel) {
      pack_panel(static_cast<T*>(packed) + panel * kPanel * k,
                 static_cast<const T*>(weight) + panel * kPanel * stride, stride, kPanel, k);
    });
  };
  if (itemsize == 1) return pack(e4m3{});
  if (itemsize == 2) return pack(bf16{});
  pack(float{});
}

void decode_weight(const void* weight, void* out, int64_t n, int64_t k, int64_t stride, bool fp8,
                   int threads) {
  const int64_t step = stride < 0 ? kPairRow : k;
  const auto decode = [&](auto unit) {
    using T = decltype(unit);
    const T* from = static_cast<const T*>(weight);
    parallel_for((n + kPanel - 1) / kPanel, threads, [&](int64_t panel) {
      const int64_t first = panel * kPanel, end = first + kPanel < n ? first + kPanel : n;
      T block[kPanel * kPairRow];  // [64][128], in L1
      for (int64_t k0 = 0; k0 < k; k0 += step) {
        const int64_t count = k - k0 < step ? k - k0 : step;
        if (stride < 0) {  // packed: transposing pair rows again restores the rows
          const T* rows[kPanel];
          for (int64_t i = 0; i < kPanel; ++i)
            rows[i] = from + first * k + (k0 + (2 * i < count ? 2 * i : 0)) * kPanel;
          for (int line = 0; line < kPanel; line += kPairsPerLine<T>)
            transpose_columns(reinterpret_cast<RowPair<T>*>(block + line * kPairRow), rows,
                              2 * line);
        }
        for (int64_t row = first; row < end; ++row) {
          const T* columns =
              stride < 0 ? block + (row - first) * kPairRow : from + row * stride + k0;
          bf16* to = static_cast<bf16*>(out) + row * k + k0;
          if constexpr (std::is_same_v<T, bf16>)
            std::memcpy(to, columns, static_cast<size_t>(count) * sizeof(T));
          else
            for (int64_t i = 0; i < count; i += kLanes) {
              const int lanes = lanes_left(count - i);
              if (lanes == kLanes)
                store(to + i, load(columns + i));
              else
                store_n(to + i, load_n(columns + i, lanes), lanes);
            }
        }
      }
    });
  };
  if (fp8) return decode(e4m3{});
  decode(bf16{});
}

}  // namespace lf::LF_ISA
