// The table of contents of llama_fast._cuda; and, compiled with LF_CUDA_EMULATOR, of the module
// that runs the same kernels on a CPU for tests (tests/cuda_emulator).
#include <pybind11/pybind11.h>

#include <utility>

#include "../bind_ops.h"
#include "kernels.h"

namespace {

struct Cuda {
  using Where = std::pair<int, uintptr_t>;  // device index, cudaStream_t

  static lf::cuda::Where at(const Where& w) { return {w.first, reinterpret_cast<void*>(w.second)}; }
  static void rms_norm(const lf::RmsNormParams& p, const Where& w) { lf::cuda::rms_norm(p, at(w)); }
  static void silu_and_mul(const lf::SiluAndMulParams& p, const Where& w) {
    lf::cuda::silu_and_mul(p, at(w));
  }
  static void quantize_fp8(const lf::QuantizeFp8Params& p, const Where& w) {
    lf::cuda::quantize_fp8(p, at(w));
  }
  static void rope(const lf::RopeParams& p, const Where& w) { lf::cuda::rope(p, at(w)); }
  static void attention(const lf::AttentionParams& p, const Where& w) {
    lf::cuda::attention(p, at(w));
  }
  static void kvcache_attention(const lf::KvCacheAttentionParams& p, const Where& w) {
    lf::cuda::kvcache_attention(p, at(w));
  }
  static void linear(const lf::LinearParams& p, const Where& w) { lf::cuda::linear(p, at(w)); }
};

int64_t kvcache_attention_splits(int64_t seqlen_q, int64_t heads, int64_t kv_heads,
                                 int64_t head_dim, int64_t capacity, int64_t num_splits, int dtype,
                                 int cache_dtype, const Cuda::Where& where) {
  lf::KvCacheAttentionParams p{};
  p.seqlen_q = seqlen_q;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.head_dim = head_dim;
  p.block_size = capacity;
  p.num_splits = num_splits;
  p.dtype = static_cast<lf::DType>(dtype);
  p.cache_dtype = static_cast<lf::DType>(cache_dtype);
  return lf::cuda::kvcache_attention_splits(p, Cuda::at(where));
}

}  // namespace

#if defined(LF_CUDA_EMULATOR)
namespace lf::emu {
unsigned& seed();
int& multiprocessors();
int64_t& blocks();
}  // namespace lf::emu
PYBIND11_MODULE(_cuda_emulated, m) {
  m.def("set_seed", [](unsigned seed) { lf::emu::seed() = seed; }, "Another order of threads.");
  m.def("set_multiprocessors", [](int n) { lf::emu::multiprocessors() = n; });
  m.def("blocks", [] { return lf::emu::blocks(); }, "How many have run.");
#else
PYBIND11_MODULE(_cuda, m) {
#endif
  lf::bind::ops<Cuda>(m);
  m.def("kvcache_attention_splits", &kvcache_attention_splits,
        "decode_attention: partial results that its workspace holds, a query's head");
}
