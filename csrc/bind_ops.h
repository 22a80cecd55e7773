// Shared by the CPU's and CUDA's Python modules: puts each family's tensors into its params struct
// by name. llama_fast/ops/<family>.py has checked the arguments and allocated the outputs, which
// come first and are contiguous. dispatch.py's Backend documents each function's arguments.
#pragma once

#include <cmath>

#include "tensor.h"

namespace lf::bind {

template <class T = void>
T* data(const MaybeTensor& t) {
  return t ? t->data<T>() : nullptr;
}

inline float bound(std::optional<float> scale_ub) { return scale_ub.value_or(INFINITY); }

// The last N strides before the last dimension's: of batches, tokens and heads, in this order.
template <int N>
void strides(int64_t (&to)[N], const Tensor& t) {
  for (int i = 0; i < N; ++i) to[i] = t.stride(t.ndim() - 1 - N + i);
}

// An FP8 cache's scales: [1], or [Hkv].
template <class Params>
void cache_scales(Params& p, const MaybeTensor& k_scale, const MaybeTensor& v_scale) {
  p.k_scale = data<float>(k_scale);
  p.v_scale = data<float>(v_scale);
  p.k_scale_per_head = k_scale && k_scale->numel() > 1;
  p.v_scale_per_head = v_scale && v_scale->numel() > 1;
}

inline RmsNormParams rms_norm(const Tensor& out, const Tensor& x, const Tensor& weight, float eps,
                              const MaybeTensor& residual, const MaybeTensor& residual_out,
                              const MaybeTensor& scale, std::optional<float> scale_ub) {
  RmsNormParams p{};
  p.x = x.data();
  p.residual = data(residual);
  p.weight = weight.data();
  p.out = out.data();
  p.residual_out = data(residual_out);
  p.scale = data<float>(scale);
  p.rows = x.size(0);
  p.hidden = x.size(1);
  p.x_stride = x.stride(0);
  p.residual_stride = residual ? residual->stride(0) : 0;
  p.eps = eps;
  p.scale_ub = bound(scale_ub);
  p.dtype = x.dtype();
  return p;
}

inline ActivationParams activation(const Tensor& out, const Tensor& gate_up,
                                   const MaybeTensor& scale, std::optional<float> scale_ub) {
  ActivationParams p{};
  p.gate_up = gate_up.data();
  p.out = out.data();
  p.scale = data<float>(scale);
  p.rows = gate_up.size(0);
  p.width = gate_up.size(1) / 2;
  p.gate_up_stride = gate_up.stride(0);
  p.scale_ub = bound(scale_ub);
  p.dtype = gate_up.dtype();
  return p;
}

inline QuantizeParams quantize(const Tensor& q, const Tensor& scale, const Tensor& x,
                               const std::string& granularity, std::optional<float> scale_ub) {
  QuantizeParams p{};
  p.x = x.data();
  p.q = q.data();
  p.scale = scale.data<float>();
  p.rows = x.size(0);
  p.cols = x.size(1);
  p.x_stride = x.stride(0);
  p.block_rows = granularity == "block_2d" ? 128 : 1;
  p.scale_ub = bound(scale_ub);
  p.granularity = granularity == "tensor" ? Scale::tensor
                  : granularity == "row"  ? Scale::row
                                          : Scale::block;
  p.dtype = x.dtype();
  return p;
}

// apply_rope with k_out; apply_rope_and_append with v, both caches and slots.
inline RopeParams rope(const Tensor& q_out, const MaybeTensor& k_out, const Tensor& q,
                       const Tensor& k, const Tensor& positions, const Tensor& table,
                       bool interleaved, const MaybeTensor& v, const MaybeTensor& k_cache,
                       const MaybeTensor& v_cache, const MaybeTensor& slots,
                       const MaybeTensor& k_scale, const MaybeTensor& v_scale) {
  RopeParams p{};
  p.q = q.data();
  p.k = k.data();
  p.v = data(v);
  p.q_out = q_out.data();
  p.k_out = data(k_out);
  p.k_cache = data(k_cache);
  p.v_cache = data(v_cache);
  p.positions = positions.data();
  p.slots = data(slots);
  p.table = table.data<float>();
  p.tokens = q.size(0);
  p.heads = q.size(1);
  p.kv_heads = k.size(1);
  p.head_dim = q.size(2);
  p.max_positions = table.size(0);
  strides(p.q_stride, q);
  strides(p.k_stride, k);
  if (v) strides(p.v_stride, *v);
  if (k_cache && v_cache) {
    p.block_size = k_cache->size(1);
    p.num_slots = k_cache->size(0) * p.block_size;
    strides(p.k_cache_stride, *k_cache);
    strides(p.v_cache_stride, *v_cache);
  }
  p.table_stride = table.stride(0);
  cache_scales(p, k_scale, v_scale);
  p.positions_are_64bit = positions.is_int64();
  p.slots_are_64bit = slots && slots->is_int64();
  p.interleaved = interleaved;
  p.dtype = q.dtype();
  return p;
}

inline AttentionParams attention(const Tensor& out, const Tensor& q, const Tensor& k,
                                 const Tensor& v, bool causal, float softmax_scale,
                                 const MaybeTensor& cu_seqlens_q, const MaybeTensor& cu_seqlens_k) {
  AttentionParams p{};
  p.q = q.data();
  p.k = k.data();
  p.v = v.data();
  p.out = out.data();
  p.cu_seqlens_q = data<int32_t>(cu_seqlens_q);
  p.cu_seqlens_k = data<int32_t>(cu_seqlens_k);
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

inline DecodeAttentionParams decode_attention(
    const Tensor& out, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
    const Tensor& cache_seqlens, const MaybeTensor& block_table, bool causal, float softmax_scale,
    int64_t num_splits, const MaybeTensor& k_scale, const MaybeTensor& v_scale) {
  DecodeAttentionParams p{};
  p.q = q.data();
  p.k_cache = k_cache.data();
  p.v_cache = v_cache.data();
  p.out = out.data();
  p.cache_seqlens = cache_seqlens.data<int32_t>();
  p.block_table = data<int32_t>(block_table);
  p.batch = q.size(0);
  p.seqlen_q = q.size(1);
  p.heads = q.size(2);
  p.kv_heads = k_cache.size(2);
  p.head_dim = q.size(3);
  p.num_blocks = k_cache.size(0);
  p.block_size = k_cache.size(1);
  p.table_stride = block_table ? block_table->stride(0) : 0;
  p.table_blocks = block_table ? block_table->size(1) : 0;
  strides(p.q_stride, q);
  strides(p.out_stride, out);
  strides(p.k_cache_stride, k_cache);
  strides(p.v_cache_stride, v_cache);
  p.num_splits = num_splits;
  cache_scales(p, k_scale, v_scale);
  p.workspace_splits = 1;
  p.softmax_scale = softmax_scale;
  p.causal = causal;
  p.dtype = q.dtype();
  p.cache_dtype = k_cache.dtype();
  return p;
}

// fp8_gemm (both scales), fp8_linear (weight_scale) and linear (neither).
inline LinearParams linear(const Tensor& out, const Tensor& x, const Tensor& weight,
                           const MaybeTensor& bias, const MaybeTensor& x_scale,
                           const MaybeTensor& weight_scale) {
  LinearParams p{};
  p.x = x.data();
  p.weight = weight.data();
  p.x_scale = data<float>(x_scale);
  p.weight_scale = data<float>(weight_scale);
  p.bias = data(bias);
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

// Defines m.name(tensors, ...): fill makes the params struct, run(params, first tensor) computes.
template <class Params, class... Rest, class Run>
void define(py::module_& m, const char* name, Params (*fill)(const Tensor&, Rest...), Run run) {
  m.def(name, [fill, run](const Tensor& out, Rest... rest) { run(fill(out, rest...), out); });
}

}  // namespace lf::bind
