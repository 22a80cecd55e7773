// The functions of llama_fast._cuda. Compiled with LF_CUDA_EMULATOR, those of the module that runs
// the same kernels on a CPU for tests (tests/cuda_emulator).
#include "../bind.h"
#include "kernels.h"

namespace {

using lf::DecodeAttentionParams;
using lf::MaybeTensor;
using lf::Tensor;

namespace py = pybind11;

// The tensors' device and its current stream. The emulator has neither.
lf::cuda::Where where(const Tensor& t) {
  constexpr int32_t kCuda = 2;  // DLDeviceType
  const lf::DLDevice device = t.device();
  if (device.type != kCuda) return {0, nullptr};
  void* stream = nullptr;
  if (lf::Torch::get().dlpack->current_stream(device.type, device.index, &stream))
    throw py::error_already_set();
  return {device.index, stream};
}

// Number of partial results per query head that decode_attention leaves in a workspace.
int64_t decode_attention_splits(const Tensor& q, const Tensor& k_cache,
                                const MaybeTensor& block_table, int64_t num_splits) {
  DecodeAttentionParams p{};
  p.seqlen_q = q.size(1);
  p.heads = q.size(2);
  p.kv_heads = k_cache.size(2);
  p.head_dim = q.size(3);
  p.block_size = k_cache.size(1) * (block_table ? block_table->size(1) : 1);
  p.num_splits = num_splits;
  p.dtype = q.dtype();
  p.cache_dtype = k_cache.dtype();
  return lf::cuda::decode_attention_splits(p, where(q));
}

// Defines decode_attention with a workspace [B, Sq, H, splits, D + 2] fp32 before its other
// arguments.
template <class... Rest>
void define_split(py::module_& m, DecodeAttentionParams (*fill)(const Tensor&, Rest...)) {
  m.def("decode_attention_split", [fill](const Tensor& workspace, const Tensor& out, Rest... rest) {
    DecodeAttentionParams p = fill(out, rest...);
    p.workspace = workspace.data<float>();
    p.workspace_splits = workspace.size(3);
    const lf::cuda::Where on = where(out);
    py::gil_scoped_release release;
    lf::cuda::decode_attention(p, on);
  });
}

}  // namespace

#if defined(LF_CUDA_EMULATOR)
namespace lf::emu {
unsigned& seed();
int& multiprocessors();
int64_t& blocks();
}  // namespace lf::emu
PYBIND11_MODULE(_cuda_emulated, m) {
  m.def(
      "set_seed", [](unsigned seed) { lf::emu::seed() = seed; },
      "Choose another order of threads.");
  m.def("set_multiprocessors", [](int n) { lf::emu::multiprocessors() = n; });
  m.def("blocks", [] { return lf::emu::blocks(); }, "Number of blocks that have run.");
#else
PYBIND11_MODULE(_cuda, m) {
#endif
  lf::Torch::load();
#define LF_DEFINE(op, Params)                                                      \
  lf::define(m, #op, &lf::Params::of, [](const lf::Params& p, const Tensor& out) { \
    const lf::cuda::Where on = where(out);                                         \
    py::gil_scoped_release release;                                                \
    lf::cuda::op(p, on);                                                           \
  });
  LF_OPS(LF_DEFINE)
  define_split(m, &DecodeAttentionParams::of);
  m.def("decode_attention_splits", &decode_attention_splits,
        "Partial results per query head; 1: decode_attention needs no workspace.");
}
