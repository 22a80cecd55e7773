// The table of contents of llama_fast._cpu. Tensors arrive as addresses (Tensor.data_ptr()), so the
// module includes no torch header and one build serves every torch version. llama_fast/cpu.py is
// the only caller and llama_fast/ops.py has checked every argument by then.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <string>
#include <vector>

#include "../bind_ops.h"
#include "kernels.h"

namespace py = pybind11;

namespace {

using lf::bind::as;
using lf::bind::Ptr;

std::atomic<const lf::Kernels*> g_kernels{nullptr};

const lf::Kernels& kernels() { return *g_kernels.load(std::memory_order_acquire); }

struct Cpu {
  using Where = int;  // threads
  static void rms_norm(const lf::RmsNormParams& p, int n) { kernels().rms_norm(p, n); }
  static void silu_and_mul(const lf::SiluAndMulParams& p, int n) { kernels().silu_and_mul(p, n); }
  static void quantize_fp8(const lf::QuantizeFp8Params& p, int n) { kernels().quantize_fp8(p, n); }
  static void rope(const lf::RopeParams& p, int n) { kernels().rope(p, n); }
  static void attention(const lf::AttentionParams& p, int n) { kernels().attention(p, n); }
  static void kvcache_attention(const lf::KvCacheAttentionParams& p, int n) {
    kernels().kvcache_attention(p, n);
  }
  static void linear(const lf::LinearParams& p, int n) { kernels().linear(p, n); }
};

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

void decode_weight(Ptr weight, Ptr out, int64_t n, int64_t k, int64_t stride, bool fp8,
                   int threads) {
  py::gil_scoped_release release;
  kernels().decode_weight(as<void>(weight), as<void>(out), n, k, stride, fp8, threads);
}

uint64_t read_bandwidth_probe(Ptr data, int64_t bytes, int threads) {
  py::gil_scoped_release release;
  return kernels().read_memory(as<void>(data), bytes, threads);
}

double multiply_add_probe(bool pairs, double flops, int threads) {
  py::gil_scoped_release release;
  return kernels().multiply_add(pairs, flops, threads);
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

  lf::bind::ops<Cpu>(m);
  m.def("pack_weight", &pack_weight, "linear.cpp: the layout that linear streams fastest");
  m.def("decode_weight", &decode_weight, "linear.cpp: bf16 [N, K] out of e4m3 or of packed bf16");
  m.def("advise_huge_pages", &advise_huge_pages, "For memory not yet written; a hint, on Linux");
  m.def("read_bandwidth_probe", &read_bandwidth_probe,
        "bandwidth.cpp: XOR of the 64-bit words, read as fast as memory gives them");
  m.def("multiply_add_probe", &multiply_add_probe,
        "bandwidth.cpp: multiply-adds in registers, of bf16 pairs or fp32; how many operations");
}
