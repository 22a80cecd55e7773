// The table of contents of llama_fast._cpu. Tensors arrive as addresses (Tensor.data_ptr()), so the
// module includes no torch header and one build serves every torch version. llama_fast/cpu.py is
// the only caller and llama_fast/ops.py has checked every argument by then.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <array>
#include <atomic>
#include <string>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace {

using lf::DType;
using lf::Scale;
using Ptr = uintptr_t;

std::atomic<const lf::Kernels*> g_kernels{nullptr};

const lf::Kernels& kernels() { return *g_kernels.load(std::memory_order_acquire); }

std::vector<std::string> isas() {
  const lf::Kernels* table[4];
  const int n = lf::available_kernels(table);
  std::vector<std::string> names;
  for (int i = 0; i < n; ++i) names.emplace_back(table[i]->isa);
  return names;
}

void set_isa(const std::string& name) {
  const lf::Kernels* table[4];
  const int n = lf::available_kernels(table);
  for (int i = 0; i < n; ++i)
    if (name == table[i]->isa) return g_kernels.store(table[i], std::memory_order_release);
  std::string known;
  for (int i = 0; i < n; ++i) known += (i ? ", " : "") + std::string(table[i]->isa);
  throw py::value_error("isa: got '" + name + "', this machine can run: " + known);
}

template <class T>
T* as(Ptr address) {
  return reinterpret_cast<T*>(address);
}

// Index of the first of n integers outside [low, high], or -1.
template <class T>
int64_t first_outside(const T* x, int64_t n, int64_t low, int64_t high) {
  for (int64_t i = 0; i < n; ++i)
    if (x[i] < low || x[i] > high) return i;
  return -1;
}

// (row, column, block id) of the first block id outside [0, num_blocks) among those that the
// lengths reach, or None.
py::object first_bad_block(Ptr block_table, int64_t stride, Ptr cache_seqlens, int64_t batch,
                           int64_t block_size, int64_t num_blocks) {
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t used = (as<int32_t>(cache_seqlens)[row] + block_size - 1) / block_size;
    const int32_t* blocks = as<int32_t>(block_table) + row * stride;
    const int64_t bad = first_outside(blocks, used, 0, num_blocks - 1);
    if (bad >= 0) return py::make_tuple(row, bad, blocks[bad]);
  }
  return py::none();
}

void rms_norm(Ptr x, Ptr residual, Ptr weight, Ptr out, Ptr residual_out, Ptr scale, int64_t rows,
              int64_t hidden, int64_t x_stride, int64_t residual_stride, float eps, float scale_ub,
              int dtype, int threads) {
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
  kernels().rms_norm(p, threads);
}

void silu_and_mul(Ptr gate_up, Ptr out, Ptr scale, int64_t rows, int64_t width,
                  int64_t gate_up_stride, float scale_ub, int dtype, int threads) {
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
  kernels().silu_and_mul(p, threads);
}

void quantize_fp8(Ptr x, Ptr q, Ptr scale, int64_t rows, int64_t cols, int64_t x_stride,
                  int64_t block_rows, float scale_ub, int granularity, int dtype, int threads) {
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
  kernels().quantize_fp8(p, threads);
}

void rope(Ptr q, Ptr k, Ptr v, Ptr q_out, Ptr k_out, Ptr k_cache, Ptr v_cache, Ptr positions,
          Ptr slots, Ptr table, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim,
          int64_t max_positions, int64_t num_slots, int64_t block_size,
          std::array<int64_t, 6> qkv_strides, std::array<int64_t, 6> cache_strides,
          int64_t table_stride, bool positions_are_64bit, bool slots_are_64bit, bool interleaved,
          int dtype, int threads) {
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
  kernels().rope(p, threads);
}

void attention(Ptr q, Ptr k, Ptr v, Ptr out, Ptr cu_seqlens_q, Ptr cu_seqlens_k, int64_t batch,
               int64_t seqlen_q, int64_t seqlen_k, int64_t heads, int64_t kv_heads,
               int64_t head_dim, std::array<int64_t, 12> strides, float softmax_scale, bool causal,
               int dtype, int threads) {
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
  kernels().attention(p, threads);
}

void kvcache_attention(Ptr q, Ptr k_cache, Ptr v_cache, Ptr out, Ptr cache_seqlens, Ptr block_table,
                       int64_t batch, int64_t seqlen_q, int64_t heads, int64_t kv_heads,
                       int64_t head_dim, int64_t num_blocks, int64_t block_size,
                       int64_t table_stride, std::array<int64_t, 12> strides, int64_t num_splits,
                       float softmax_scale, bool causal, int dtype, int threads) {
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
  for (int i = 0; i < 3; ++i) {
    p.q_stride[i] = strides[i];
    p.out_stride[i] = strides[3 + i];
    p.k_cache_stride[i] = strides[6 + i];
    p.v_cache_stride[i] = strides[9 + i];
  }
  p.num_splits = num_splits;
  p.softmax_scale = softmax_scale;
  p.causal = causal;
  p.dtype = static_cast<DType>(dtype);
  py::gil_scoped_release release;
  kernels().kvcache_attention(p, threads);
}

void linear(Ptr x, Ptr weight, Ptr x_scale, Ptr weight_scale, Ptr bias, Ptr out, int64_t m,
            int64_t n, int64_t k, int64_t x_stride, int64_t weight_stride, int x_dtype,
            int weight_dtype, int out_dtype, int x_granularity, int weight_granularity,
            int64_t weight_block_rows, bool packed, int threads) {
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
  kernels().linear(p, threads);
}

// Asks for huge pages for the whole 2 MiB pages within [data, data + bytes), before they are first
// written. A hint: whether the system grants it changes nothing but speed.
void advise_huge_pages(Ptr data, int64_t bytes) {
#if defined(__linux__)
  constexpr Ptr kHuge = Ptr{2} << 20;
  const Ptr begin = (data + kHuge - 1) / kHuge * kHuge;
  const Ptr end = (data + static_cast<Ptr>(bytes)) / kHuge * kHuge;
  if (begin < end) madvise(as<void>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

void pack_weight(Ptr weight, Ptr packed, int64_t n, int64_t k, int64_t stride, int itemsize,
                 int threads) {
  py::gil_scoped_release release;
  advise_huge_pages(packed, n * k * itemsize);  // M = 1 reads it 1.1 times as fast
  kernels().pack_weight(as<void>(weight), as<void>(packed), n, k, stride, itemsize, threads);
}

uint64_t read_bandwidth_probe(Ptr data, int64_t bytes, int threads) {
  py::gil_scoped_release release;
  return kernels().read_memory(as<void>(data), bytes, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  set_isa(isas().back());

  m.def("isas", &isas, "Instruction sets this machine can run, slowest first.");
  m.def("isa", [] { return kernels().isa; }, "The instruction set in use.");
  m.def("set_isa", &set_isa, "Use another of isas(); ValueError for any other name.");
  m.def(
      "first_outside",
      [](Ptr x, int64_t n, bool is_64bit, int64_t low, int64_t high) {
        return is_64bit ? first_outside(as<int64_t>(x), n, low, high)
                        : first_outside(as<int32_t>(x), n, low, high);
      },
      "Index of the first integer outside [low, high], or -1.");
  m.def("first_bad_block", &first_bad_block, "First block id that no block of the pool has.");

  m.def("rms_norm", &rms_norm, "rms_norm.cpp: (+ residual) (+ FP8 out)");
  m.def("silu_and_mul", &silu_and_mul, "activation.cpp: SwiGLU's middle (+ FP8 out)");
  m.def("quantize_fp8", &quantize_fp8, "quantize.cpp: per tensor, row or block");
  m.def("rope", &rope, "rope.cpp: rotate q and k (+ append k and v to the cache)");
  m.def("attention", &attention, "attention.cpp: prefill, batched or packed");
  m.def("kvcache_attention", &kvcache_attention, "decode_attention.cpp: over a KV cache");
  m.def("linear", &linear, "linear.cpp: FP8 and 16-bit weights, plain or packed");
  m.def("pack_weight", &pack_weight, "linear.cpp: the layout that linear streams fastest");
  m.def("advise_huge_pages", &advise_huge_pages, "For memory not yet written; a hint, on Linux");
  m.def("read_bandwidth_probe", &read_bandwidth_probe,
        "bandwidth.cpp: XOR of the 64-bit words, read as fast as memory gives them");
}
