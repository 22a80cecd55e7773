// One struct per family of ops: raw pointers, sizes and strides. CPU and CUDA kernels take the same
// structs, so launchers differ only in where the work runs. Strides count elements, never bytes,
// and are always 64-bit: a KV pool or a fused QKV view can exceed 2^31 elements.
#pragma once
#include <cstdint>

namespace lf {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, e4m3 = 3 };

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
};

// The one list of op families. It generates tables, declarations and bindings. Each entry names a
// function, csrc/cpu/<name>.cpp, csrc/cuda/<name>.cu, kernels/<name>.py and
// llama_fast/ops/<name>.py.
#define LF_OPS(OP)                                                                          \
  OP(rms_norm, RmsNormParams)                 /* (+ residual) (+ FP8 out) */                \
  OP(activation, ActivationParams)            /* SwiGLU's middle (+ FP8 out) */             \
  OP(quantize, QuantizeParams)                /* per tensor, row or block */                \
  OP(rope, RopeParams)                        /* q and k (+ append k and v to the cache) */ \
  OP(attention, AttentionParams)              /* prefill, batched or packed */              \
  OP(decode_attention, DecodeAttentionParams) /* over a KV cache */                         \
  OP(linear, LinearParams)                    /* FP8 and 16-bit weights */

}  // namespace lf
