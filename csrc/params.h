// One struct per family of ops: raw pointers, sizes and strides, then `of`, which fills it from the
// tensors. CPU and CUDA kernels take the same structs, so launchers differ only in where the work
// runs. of()'s arguments are those of the function of the op's name in llama_fast._cpu and _cuda,
// and of the launcher in kernels/<op>.py. llama_fast/ops/<op>.py has checked them and allocated the
// outputs, which come first and are contiguous. Strides count elements, never bytes,
// and are always 64-bit: a KV pool or a fused QKV view can exceed 2^31 elements.
#pragma once
#include <cmath>
#include <string>

#include "tensor.h"

namespace lf {

// An FP8 cache's scales: [1], or [Hkv].
template <class Params>
void set_cache_scales(Params& p, const MaybeTensor& k_scale, const MaybeTensor& v_scale) {
  p.k_scale = data_or_null<float>(k_scale);
  p.v_scale = data_or_null<float>(v_scale);
  p.k_scale_per_head = k_scale && k_scale->numel() > 1;
  p.v_scale_per_head = v_scale && v_scale->numel() > 1;
}

// Layout of an FP8 operand's scales.
enum class Scale : int32_t { tensor = 0, row = 1, block = 2 };

// rms_norm, add_rms_norm and their FP8 forms.
struct RmsNormParams {
  const void* x;         // [rows, hidden] dtype
  const void* residual;  // [rows, hidden] dtype, or null: no residual
  const void* weight;    // [hidden] dtype
  void* out;             // [rows, hidden] contiguous; dtype, or e4m3 when scale is set
  void* residual_out;    // [rows, hidden] contiguous, x + residual; null without residual
  float* scale;          // [rows], or null: not quantized
  int64_t rows, hidden;
  int64_t x_stride, residual_stride;  // elements from one row to the next
  float eps;
  float scale_ub;  // bound on a row's amax; +inf: unbounded
  DType dtype;

  static RmsNormParams of(const Tensor& out, const Tensor& x, const Tensor& weight, float eps,
                          const MaybeTensor& residual, const MaybeTensor& residual_out,
                          const MaybeTensor& scale, std::optional<float> scale_ub) {
    RmsNormParams p{};
    p.x = x.data();
    p.residual = data_or_null(residual);
    p.weight = weight.data();
    p.out = out.data();
    p.residual_out = data_or_null(residual_out);
    p.scale = data_or_null<float>(scale);
    p.rows = x.size(0);
    p.hidden = x.size(1);
    p.x_stride = x.stride(0);
    p.residual_stride = residual ? residual->stride(0) : 0;
    p.eps = eps;
    p.scale_ub = scale_ub.value_or(INFINITY);
    p.dtype = x.dtype();
    return p;
  }
};

// silu_and_mul and its FP8 form.
struct ActivationParams {
  const void* gate_up;  // [rows, 2 * width] dtype, gate first
  void* out;            // [rows, width] contiguous; dtype, or e4m3 when scale is set
  float* scale;         // [rows], or null: not quantized
  int64_t rows, width;
  int64_t gate_up_stride;
  float scale_ub;
  DType dtype;

  static ActivationParams of(const Tensor& out, const Tensor& gate_up, const MaybeTensor& scale,
                             std::optional<float> scale_ub) {
    ActivationParams p{};
    p.gate_up = gate_up.data();
    p.out = out.data();
    p.scale = data_or_null<float>(scale);
    p.rows = gate_up.size(0);
    p.width = gate_up.size(1) / 2;
    p.gate_up_stride = gate_up.stride(0);
    p.scale_ub = scale_ub.value_or(INFINITY);
    p.dtype = gate_up.dtype();
    return p;
  }
};

struct QuantizeParams {
  const void* x;  // [rows, cols] dtype
  void* q;        // [rows, cols] contiguous e4m3
  float* scale;   // tensor [1]; row [rows]; block [ceil(rows / block_rows), ceil(cols / 128)]
  int64_t rows, cols;
  int64_t x_stride;
  int64_t block_rows;  // block: 1 (activations, 1x128) or 128 (weights, 128x128)
  float scale_ub;
  Scale granularity;
  DType dtype;

  static QuantizeParams of(const Tensor& q, const Tensor& scale, const Tensor& x,
                           const std::string& granularity, std::optional<float> scale_ub) {
    QuantizeParams p{};
    p.x = x.data();
    p.q = q.data();
    p.scale = scale.data<float>();
    p.rows = x.size(0);
    p.cols = x.size(1);
    p.x_stride = x.stride(0);
    p.block_rows = granularity == "block_2d" ? 128 : 1;
    p.scale_ub = scale_ub.value_or(INFINITY);
    p.granularity = granularity == "tensor" ? Scale::tensor
                    : granularity == "row"  ? Scale::row
                                            : Scale::block;
    p.dtype = x.dtype();
    return p;
  }
};

// apply_rope, and apply_rope_and_append when k_cache is set.
struct RopeParams {
  const void* q;  // [T, H, D] dtype
  const void* k;  // [T, Hkv, D] dtype
  const void* v;  // [T, Hkv, D] dtype; append only
  void* q_out;    // [T, H, D] contiguous
  void* k_out;    // [T, Hkv, D] contiguous; null when appending
  void* k_cache;  // [blocks, block_size, Hkv, D] with any strides, last dim contiguous; or null
  void* v_cache;  // likewise
  const void* positions;  // [T] int32 or int64, each in [0, max_positions)
  const void* slots;      // [T] int32 or int64; slot = block * block_size + offset; -1 skips
  const float* table;     // [max_positions, D]: cos | sin, D / 2 each
  int64_t tokens, heads, kv_heads, head_dim;
  int64_t max_positions, num_slots, block_size;
  int64_t q_stride[2], k_stride[2], v_stride[2];  // token, head
  int64_t k_cache_stride[3], v_cache_stride[3];   // block, offset, head
  int64_t table_stride;
  // FP8 caches store k / k_scale and v / v_scale: [1], or [Hkv] if per head. Null: of dtype.
  const float *k_scale, *v_scale;
  bool k_scale_per_head, v_scale_per_head;
  bool positions_are_64bit, slots_are_64bit;
  bool interleaved;  // pairs (2i, 2i + 1), Meta's order; else (i, i + D / 2), Hugging Face's
  DType dtype;

  // apply_rope with k_out; apply_rope_and_append with v, both caches and slots.
  static RopeParams of(const Tensor& q_out, const MaybeTensor& k_out, const Tensor& q,
                       const Tensor& k, const Tensor& positions, const Tensor& table,
                       bool interleaved, const MaybeTensor& v, const MaybeTensor& k_cache,
                       const MaybeTensor& v_cache, const MaybeTensor& slots,
                       const MaybeTensor& k_scale, const MaybeTensor& v_scale) {
    RopeParams p{};
    p.q = q.data();
    p.k = k.data();
    p.v = data_or_null(v);
    p.q_out = q_out.data();
    p.k_out = data_or_null(k_out);
    p.k_cache = data_or_null(k_cache);
    p.v_cache = data_or_null(v_cache);
    p.positions = positions.data();
    p.slots = data_or_null(slots);
    p.table = table.data<float>();
    p.tokens = q.size(0);
    p.heads = q.size(1);
    p.kv_heads = k.size(1);
    p.head_dim = q.size(2);
    p.max_positions = table.size(0);
    q.strides(p.q_stride);
    k.strides(p.k_stride);
    if (v) v->strides(p.v_stride);
    if (k_cache && v_cache) {
      p.block_size = k_cache->size(1);
      p.num_slots = k_cache->size(0) * p.block_size;
      k_cache->strides(p.k_cache_stride);
      v_cache->strides(p.v_cache_stride);
    }
    p.table_stride = table.stride(0);
    set_cache_scales(p, k_scale, v_scale);
    p.positions_are_64bit = positions.is_int64();
    p.slots_are_64bit = slots && slots->is_int64();
    p.interleaved = interleaved;
    p.dtype = q.dtype();
    return p;
  }
};

// attention: no cache; batched or packed.
struct AttentionParams {
  const void* q;                      // [B, Sq, H, D], or [total_q, H, D] with cu_seqlens_q
  const void* k;                      // [B, Sk, Hkv, D], or [total_k, Hkv, D]
  const void* v;                      // as k
  void* out;                          // as q, contiguous
  const int32_t* cu_seqlens_q;        // [B + 1], or null
  const int32_t* cu_seqlens_k;        // [B + 1], or null
  int64_t batch, seqlen_q, seqlen_k;  // packed: total_q and total_k
  int64_t heads, kv_heads, head_dim;
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];  // batch, token, head
  float softmax_scale;
  bool causal;  // bottom-right: query i sees keys j <= i + Sk - Sq
  DType dtype;

  static AttentionParams of(const Tensor& out, const Tensor& q, const Tensor& k, const Tensor& v,
                            bool causal, float softmax_scale, const MaybeTensor& cu_seqlens_q,
                            const MaybeTensor& cu_seqlens_k) {
    AttentionParams p{};
    p.q = q.data();
    p.k = k.data();
    p.v = v.data();
    p.out = out.data();
    p.cu_seqlens_q = data_or_null<int32_t>(cu_seqlens_q);
    p.cu_seqlens_k = data_or_null<int32_t>(cu_seqlens_k);
    p.batch = cu_seqlens_q ? cu_seqlens_q->size(0) - 1 : q.size(0);
    p.seqlen_q = q.size(-3);
    p.seqlen_k = k.size(-3);
    p.heads = q.size(-2);
    p.kv_heads = k.size(-2);
    p.head_dim = q.size(-1);
    const int packed = cu_seqlens_q ? 1 : 0;  // no stride between sequences
    for (int i = packed; i < 3; ++i) {
      p.q_stride[i] = q.stride(i - packed);
      p.k_stride[i] = k.stride(i - packed);
      p.v_stride[i] = v.stride(i - packed);
      p.out_stride[i] = out.stride(i - packed);
    }
    p.softmax_scale = softmax_scale;
    p.causal = causal;
    p.dtype = q.dtype();
    return p;
  }
};

// attention_with_kvcache: contiguous or paged cache.
struct DecodeAttentionParams {
  const void* q;                 // [B, Sq, H, D]
  const void* k_cache;           // [B, S, Hkv, D], or [blocks, block_size, Hkv, D] with block_table
  const void* v_cache;           // as k_cache
  void* out;                     // [B, Sq, H, D] contiguous
  const int32_t* cache_seqlens;  // [B] valid tokens, this call's queries included
  const int32_t* block_table;    // [B, table_stride] block ids, or null: contiguous
  int64_t batch, seqlen_q, heads, kv_heads, head_dim;
  int64_t num_blocks, block_size;                // contiguous: B and S
  int64_t table_stride, table_blocks;            // elements of a row of block_table; columns
  int64_t q_stride[3], out_stride[3];            // batch, token, head
  int64_t k_cache_stride[3], v_cache_stride[3];  // block, offset, head
  int64_t num_splits;                            // over the keys; 0: the kernel chooses
  // FP8 caches store k / k_scale and v / v_scale: [1], or [Hkv] if per head. Null: of q's dtype.
  const float *k_scale, *v_scale;
  bool k_scale_per_head, v_scale_per_head;
  // CUDA: partial results, [B, Sq, H, workspace_splits, D + 2]; null: one split.
  float* workspace;
  int64_t workspace_splits;
  float softmax_scale;
  bool causal;
  DType dtype, cache_dtype;

  static DecodeAttentionParams of(const Tensor& out, const Tensor& q, const Tensor& k_cache,
                                  const Tensor& v_cache, const Tensor& cache_seqlens,
                                  const MaybeTensor& block_table, bool causal, float softmax_scale,
                                  int64_t num_splits, const MaybeTensor& k_scale,
                                  const MaybeTensor& v_scale) {
    DecodeAttentionParams p{};
    p.q = q.data();
    p.k_cache = k_cache.data();
    p.v_cache = v_cache.data();
    p.out = out.data();
    p.cache_seqlens = cache_seqlens.data<int32_t>();
    p.block_table = data_or_null<int32_t>(block_table);
    p.batch = q.size(0);
    p.seqlen_q = q.size(1);
    p.heads = q.size(2);
    p.kv_heads = k_cache.size(2);
    p.head_dim = q.size(3);
    p.num_blocks = k_cache.size(0);
    p.block_size = k_cache.size(1);
    p.table_stride = block_table ? block_table->stride(0) : 0;
    p.table_blocks = block_table ? block_table->size(1) : 0;
    q.strides(p.q_stride);
    out.strides(p.out_stride);
    k_cache.strides(p.k_cache_stride);
    v_cache.strides(p.v_cache_stride);
    p.num_splits = num_splits;
    set_cache_scales(p, k_scale, v_scale);
    p.workspace_splits = 1;
    p.softmax_scale = softmax_scale;
    p.causal = causal;
    p.dtype = q.dtype();
    p.cache_dtype = k_cache.dtype();
    return p;
  }
};

// fp8_gemm, fp8_linear and linear: out = (x @ weight^T) * x_scale * weight_scale + bias.
struct LinearParams {
  const void* x;              // [M, K] x_dtype
  const void* weight;         // [N, K] weight_dtype; or packed [N / 64, K / 2, 64, 2]
  const float* x_scale;       // tensor [1]; row [M]; block [M, ceil(K / 128)]; null: x is not FP8
  const float* weight_scale;  // tensor [1]; row [N]; or null: weight is not FP8;
                              // block [ceil(N / weight_block_rows), ceil(K / 128)]
  const void* bias;           // [N] out_dtype, or null
  void* out;                  // [M, N] contiguous
  int64_t m, n, k;
  int64_t x_stride, weight_stride;  // elements from one row to the next; weight's unused if packed
  DType x_dtype, weight_dtype, out_dtype;
  Scale x_granularity, weight_granularity;
  int64_t weight_block_rows;  // block: 1 or 128
  bool packed;
  bool int16;  // CPU, with an e4m3 weight and wider x: round both to 13 bits where that is faster

  // fp8_gemm (both scales), fp8_linear (weight_scale) and linear (neither).
  static LinearParams of(const Tensor& out, const Tensor& x, const Tensor& weight,
                         const MaybeTensor& bias, const MaybeTensor& x_scale,
                         const MaybeTensor& weight_scale) {
    LinearParams p{};
    p.x = x.data();
    p.weight = weight.data();
    p.x_scale = data_or_null<float>(x_scale);
    p.weight_scale = data_or_null<float>(weight_scale);
    p.bias = data_or_null(bias);
    p.out = out.data();
    p.m = x.size(0);
    p.n = out.size(1);
    p.k = x.size(1);
    p.x_stride = x.stride(0);
    p.weight_stride = weight.stride(0);
    p.x_dtype = x.dtype();
    p.weight_dtype = weight.dtype();
    p.out_dtype = out.dtype();
    p.weight_block_rows = 1;
    if (x_scale && x_scale->numel() > 1)
      p.x_granularity = x_scale->size(1) > 1 ? Scale::block : Scale::row;
    if (weight_scale && weight_scale->numel() > 1) {
      const bool by_row = weight_scale->size(0) == p.n;
      p.weight_granularity = by_row && weight_scale->size(1) == 1 ? Scale::row : Scale::block;
      p.weight_block_rows = by_row ? 1 : 128;
    }
    p.packed = weight.ndim() == 4;
    return p;
  }
};

// The one list of op families. It generates tables, declarations and bindings, and is
// llama_fast._cpu.families. Each entry names a function, csrc/cpu/<name>.cpp, csrc/cuda/<name>.cu,
// kernels/<name>.py and llama_fast/ops/<name>.py.
#define LF_OPS(OP)                                                                          \
  OP(rms_norm, RmsNormParams)                 /* (+ residual) (+ FP8 out) */                \
  OP(rope, RopeParams)                        /* q and k (+ append k and v to the cache) */ \
  OP(activation, ActivationParams)            /* SwiGLU's middle (+ FP8 out) */             \
  OP(quantize, QuantizeParams)                /* per tensor, row or block */                \
  OP(attention, AttentionParams)              /* prefill, batched or packed */              \
  OP(decode_attention, DecodeAttentionParams) /* over a KV cache */                         \
  OP(linear, LinearParams)                    /* FP8 and 16-bit weights */

}  // namespace lf
