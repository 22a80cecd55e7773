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

}  // namespace

#if defined(LF_CUDA_EMULATOR)
namespace lf::emu {
unsigned& seed();
}
PYBIND11_MODULE(_cuda_emulated, m) {
  m.def("set_seed", [](unsigned seed) { lf::emu::seed() = seed; }, "Another order of threads.");
#else
PYBIND11_MODULE(_cuda, m) {
#endif
  lf::bind::ops<Cuda>(m);
}
