// What the CPU's and CUDA's Python modules have in common: each op's arguments, as addresses, sizes
// and strides, put into the op's params struct. Backend::Where says what a call runs on (threads; a
// device and a stream), and Backend::<op>(params, where) runs it, without the interpreter's lock.
// llama_fast/native.py is the only caller, and llama_fast/ops.py has checked every argument.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "params.h"

namespace lf::bind {

namespace py = pybind11;
using Ptr = uintptr_t;

template <class T>
T* as(Ptr address) {
  return reinterpret_cast<T*>(address);
}

template <class Backend>
void rms_norm(Ptr x, Ptr residual, Ptr weight, Ptr out, Ptr residual_out, Ptr scale, int64_t rows,
              int64_t hidden, int64_t x_stride, int64_t residual_stride, float eps, float scale_ub,
              int dtype, typename Backend::Where where) {
  lf::RmsNormParams p{};
  p.x = as<void>(x);
  p.residual = as<void>(residual);
  p.weight = as<void>(weight);
  p.out = as<void>(out);
  p.residual_out = as<void>(residual_out);
  p.scale = as<float>(scale);
  p.rows = rows;
  p.hidden = hidden;
  p.x_stride = x_stride;
  p.residual_stride = residual_stride;
  p.eps = eps;
  p.scale_ub = scale_ub;
  p.dtype = static_cast<DType>(dtype);
  py::gil_scoped_release release;
  Backend::rms_norm(p, where);
}

template <class Backend>
void silu_and_mul(Ptr gate_up, Ptr out, Ptr scale, int64_t rows, int64_t width,
                  int64_t gate_up_stride, float scale_ub, int dtype,
                  typename Backend::Where where) {
  lf::SiluAndMulParams p{};
  p.gate_up = as<void>(gate_up);
  p.out = as<void>(out);
  p.scale = as<float>(scale);
  p.rows = rows;
  p.width = width;
  p.gate_up_stride = gate_up_stride;
  p.scale_ub = scale_ub;
  p.dtype = static_cast<DType>(dtype);
  py::gil_scoped_release release;
  Backend::silu_and_mul(p, where);
}

template <class Backend>
void quantize_fp8(Ptr x, Ptr q, Ptr scale, int64_t rows, int64_t cols, int64_t x_stride,
                  int64_t block_rows, float scale_ub, int granularity, int dtype,
                  typename Backend::Where where) {
  lf::QuantizeFp8Params p{};
  p.x = as<void>(x);
  p.q = as<void>(q);
  p.scale = as<float>(scale);
  p.rows = rows;
  p.cols = cols;
  p.x_stride = x_stride;
  p.block_rows = block_rows;
  p.scale_ub = scale_ub;
  p.granularity = static_cast<Scale>(granularity);
  p.dtype = static_cast<DType>(dtype);
  py::gil_scoped_release release;
  Backend::quantize_fp8(p, where);
}

template <class Backend>
void rope(Ptr q, Ptr k, Ptr v, Ptr q_out, Ptr k_out, Ptr k_cache, Ptr v_cache, Ptr positions,
          Ptr slots, Ptr table, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim,
          int64_t max_positions, int64_t num_slots, int64_t block_size,
          std::array<int64_t, 6> qkv_strides, std::array<int64_t, 6> cache_strides,
          int64_t table_stride, bool positions_are_64bit, bool slots_are_64bit, bool interleaved,
          int dtype, typename Backend::Where where) {
  lf::RopeParams p{};
  p.q = as<void>(q);
  p.k = as<void>(k);
  p.v = as<void>(v);
  p.q_out = as<void>(q_out);
  p.k_out = as<void>(k_out);
  p.k_cache = as<void>(k_cache);
  p.v_cache = as<void>(v_cache);
  p.positions = as<void>(positions);
  p.slots = as<void>(slots);
  p.table = as<float>(table);
  p.tokens = tokens;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.head_dim = head_dim;
  p.max_positions = max_positions;
  p.num_slots = num_slots;
  p.block_size = block_size;
  for (int i = 0; i < 2; ++i) {
    p.q_stride[i] = qkv_strides[i];
    p.k_stride[i] = qkv_strides[2 + i];
    p.v_stride[i] = qkv_strides[4 + i];
  }
  for (int i = 0; i < 3; ++i) {
    p.k_cache_stride[i] = cache_strides[i];
    p.v_cache_stride[i] = cache_strides[3 + i];
  }
  p.table_stride = table_stride;
  p.positions_are_64bit = positions_are_64bit;
  p.slots_are_64bit = slots_are_64bit;
  p.interleaved = interleaved;
  p.dtype = static_cast<DType>(dtype);
  py::gil_scoped_release release;
  Backend::rope(p, where);
}

template <class Backend>
void attention(Ptr q, Ptr k, Ptr v, Ptr out, Ptr cu_seqlens_q, Ptr cu_seqlens_k, int64_t batch,
               int64_t seqlen_q, int64_t seqlen_k, int64_t heads, int64_t kv_heads,
               int64_t head_dim, std::array<int64_t, 12> strides, float softmax_scale, bool causal,
               int dtype, typename Backend::Where where) {
  lf::AttentionParams p{};
  p.q = as<void>(q);
  p.k = as<void>(k);
  p.v = as<void>(v);
  p.out = as<void>(out);
  p.cu_seqlens_q = as<int32_t>(cu_seqlens_q);
  p.cu_seqlens_k = as<int32_t>(cu_seqlens_k);
  p.batch = batch;
  p.seqlen_q = seqlen_q;
  p.seqlen_k = seqlen_k;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.head_dim = head_dim;
  for (int i = 0; i < 3; ++i) {
    p.q_stride[i] = strides[i];
    p.k_stride[i] = strides[3 + i];
    p.v_stride[i] = strides[6 + i];
    p.out_stride[i] = strides[9 + i];
  }
  p.softmax_scale = softmax_scale;
  p.causal = causal;
  p.dtype = static_cast<DType>(dtype);
  py::gil_scoped_release release;
  Backend::attention(p, where);
}

template <class Backend>
void kvcache_attention(Ptr q, Ptr k_cache, Ptr v_cache, Ptr out, Ptr cache_seqlens, Ptr block_table,
                       int64_t batch, int64_t seqlen_q, int64_t heads, int64_t kv_heads,
                       int64_t head_dim, int64_t num_blocks, int64_t block_size,
                       int64_t table_stride, int64_t table_blocks, std::array<int64_t, 12> strides,
                       int64_t num_splits, Ptr k_scale, Ptr v_scale, bool k_scale_per_head,
                       bool v_scale_per_head, Ptr workspace, int64_t workspace_splits,
                       float softmax_scale, bool causal, int dtype, int cache_dtype,
                       typename Backend::Where where) {
  lf::KvCacheAttentionParams p{};
  p.q = as<void>(q);
  p.k_cache = as<void>(k_cache);
  p.v_cache = as<void>(v_cache);
  p.out = as<void>(out);
  p.cache_seqlens = as<int32_t>(cache_seqlens);
  p.block_table = as<int32_t>(block_table);
  p.batch = batch;
  p.seqlen_q = seqlen_q;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.head_dim = head_dim;
  p.num_blocks = num_blocks;
  p.block_size = block_size;
  p.table_stride = table_stride;
  p.table_blocks = table_blocks;
  for (int i = 0; i < 3; ++i) {
    p.q_stride[i] = strides[i];
    p.out_stride[i] = strides[3 + i];
    p.k_cache_stride[i] = strides[6 + i];
    p.v_cache_stride[i] = strides[9 + i];
  }
  p.num_splits = num_splits;
  p.k_scale = as<float>(k_scale);
  p.v_scale = as<float>(v_scale);
  p.k_scale_per_head = k_scale_per_head;
  p.v_scale_per_head = v_scale_per_head;
  p.workspace = as<float>(workspace);
  p.workspace_splits = workspace_splits;
  p.cache_dtype = static_cast<DType>(cache_dtype);
  p.softmax_scale = softmax_scale;
  p.causal = causal;
  p.dtype = static_cast<DType>(dtype);
  py::gil_scoped_release release;
  Backend::kvcache_attention(p, where);
}

template <class Backend>
void linear(Ptr x, Ptr weight, Ptr x_scale, Ptr weight_scale, Ptr bias, Ptr out, int64_t m,
            int64_t n, int64_t k, int64_t x_stride, int64_t weight_stride, int x_dtype,
            int weight_dtype, int out_dtype, int x_granularity, int weight_granularity,
            int64_t weight_block_rows, bool packed, typename Backend::Where where) {
  lf::LinearParams p{};
  p.x = as<void>(x);
  p.weight = as<void>(weight);
  p.x_scale = as<float>(x_scale);
  p.weight_scale = as<float>(weight_scale);
  p.bias = as<void>(bias);
  p.out = as<void>(out);
  p.m = m;
  p.n = n;
  p.k = k;
  p.x_stride = x_stride;
  p.weight_stride = weight_stride;
  p.x_dtype = static_cast<DType>(x_dtype);
  p.weight_dtype = static_cast<DType>(weight_dtype);
  p.out_dtype = static_cast<DType>(out_dtype);
  p.x_granularity = static_cast<Scale>(x_granularity);
  p.weight_granularity = static_cast<Scale>(weight_granularity);
  p.weight_block_rows = weight_block_rows;
  p.packed = packed;
  py::gil_scoped_release release;
  Backend::linear(p, where);
}

// The table of contents.
template <class Backend>
void ops(py::module_& m) {
  m.def("rms_norm", &rms_norm<Backend>, "rms_norm: (+ residual) (+ FP8 out)");
  m.def("silu_and_mul", &silu_and_mul<Backend>, "activation: SwiGLU's middle (+ FP8 out)");
  m.def("quantize_fp8", &quantize_fp8<Backend>, "quantize: per tensor, row or block");
  m.def("rope", &rope<Backend>, "rope: rotate q and k (+ append k and v to the cache)");
  m.def("attention", &attention<Backend>, "attention: prefill, batched or packed");
  m.def("kvcache_attention", &kvcache_attention<Backend>, "decode_attention: over a KV cache");
  m.def("linear", &linear<Backend>, "linear, fp8_gemm: FP8 and 16-bit weights");
}

}  // namespace lf::bind
