// The functions of llama_fast._cpu. llama_fast/ops/ has already checked every argument.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <string>
#include <vector>

#include "../bind.h"
#include "kernels.h"

namespace py = pybind11;

namespace {

using lf::MaybeTensor;
using lf::Tensor;
using lf::Torch;
using Address = uintptr_t;

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

// Index of the first of n integers outside [low, high], or -1.
template <class T>
int64_t first_outside(const T* x, int64_t n, int64_t low, int64_t high) {
  for (int64_t i = 0; i < n; ++i)
    if (x[i] < low || x[i] > high) return i;
  return -1;
}

// The same for a contiguous tensor.
int64_t first_outside_of(const Tensor& t, int64_t low, int64_t high) {
  return t.is_int64() ? first_outside(t.data<int64_t>(), t.numel(), low, high)
                      : first_outside(t.data<int32_t>(), t.numel(), low, high);
}

// (row, column, block id) of the first id within the lengths outside [0, num_blocks), or None.
py::object first_bad_block(const Tensor& block_table, const Tensor& cache_seqlens,
                           int64_t block_size, int64_t num_blocks) {
  for (int64_t row = 0; row < cache_seqlens.size(0); ++row) {
    const int64_t used = (cache_seqlens.data<int32_t>()[row] + block_size - 1) / block_size;
    const int32_t* blocks = block_table.data<int32_t>() + row * block_table.stride(0);
    const int64_t bad = first_outside(blocks, used, 0, num_blocks - 1);
    if (bad >= 0) return py::make_tuple(row, bad, blocks[bad]);
  }
  return py::none();
}

// A cache's dimensions of more than one element, the largest stride first.
struct Layout {
  struct {
    int64_t stride, size;
  } dims[4];
  int n = 0;
  int64_t reach = 0;    // from the first element to the last
  bool shared = false;  // strides that could give two elements one address

  explicit Layout(const Tensor& t) {
    for (int i = 0; i < t.ndim() && i < 4; ++i) {
      if (t.size(i) < 2) continue;
      int at = n++;
      for (; at > 0 && dims[at - 1].stride < t.stride(i); --at) dims[at] = dims[at - 1];
      dims[at] = {t.stride(i), t.size(i)};
    }
    for (int i = n - 1; i >= 0; --i) {
      shared |= dims[i].stride <= reach;
      reach += dims[i].stride * (dims[i].size - 1);
    }
  }

  // Whether two elements can be `distance` apart, by the dimensions from i on.
  bool spans(int64_t distance, int i = 0) const {
    if (i == n) return distance == 0;
    const auto [stride, size] = dims[i];
    const int64_t below = (distance < 0 ? distance - stride + 1 : distance) / stride;
    for (int64_t steps = below; steps <= below + 1; ++steps)
      if (-size < steps && steps < size && spans(distance - steps * stride, i + 1)) return true;
    return false;
  }
};

// The name of a cache whose elements share memory, "both" if the caches share it with each other,
// or null. They have one shape and dtype. Interleaved caches must have the same strides.
const char* shared_memory(const Tensor& k, const Tensor& v) {
  if (k.numel() == 0) return nullptr;
  const Layout of_k(k), of_v(v);
  if (of_k.shared) return "k_cache";
  if (of_v.shared) return "v_cache";
  const int64_t size = k.itemsize(), apart = v.data<char>() - k.data<char>();
  if (apart >= (of_k.reach + 1) * size || -apart >= (of_v.reach + 1) * size) return nullptr;
  for (int i = 0; i < k.ndim(); ++i)
    if (k.size(i) > 1 && k.stride(i) != v.stride(i)) return "both";
  return apart % size || of_k.spans(apart / size) ? "both" : nullptr;
}

// Requests huge pages for the whole 2 MiB pages within t, before they are first written. This is a
// hint, which affects speed alone.
void advise_huge_pages(const Tensor& t) {
#if defined(__linux__)
  constexpr Address kHuge = Address{2} << 20;
  const auto data = reinterpret_cast<Address>(t.data());
  const Address begin = (data + kHuge - 1) / kHuge * kHuge;
  const Address end = (data + static_cast<Address>(t.numel() * t.itemsize())) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)t;
#endif
}

void pack_weight(const Tensor& packed, const Tensor& weight) {
  advise_huge_pages(packed);  // M = 1 reads it 1.1 times as fast
  const int threads = Torch::num_threads();
  py::gil_scoped_release release;
  kernels().pack_weight(weight.data(), packed.data(), weight.size(0), weight.size(1),
                        weight.stride(0), static_cast<int>(weight.itemsize()), threads);
}

void decode_weight(const Tensor& out, const Tensor& weight) {
  const int threads = Torch::num_threads();
  const int64_t stride = weight.ndim() == 4 ? -1 : weight.stride(0);
  const bool fp8 = weight.dtype() == lf::DType::e4m3;
  py::gil_scoped_release release;
  kernels().decode_weight(weight.data(), out.data(), out.size(0), out.size(1), stride, fp8,
                          threads);
}

uint64_t read_bandwidth_probe(Address data, int64_t bytes, int threads) {
  py::gil_scoped_release release;
  return kernels().read_memory(reinterpret_cast<void*>(data), bytes, threads);
}

double multiply_add_probe(bool pairs, double flops, int threads) {
  py::gil_scoped_release release;
  return kernels().multiply_add(pairs, flops, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  Torch::load();
  set_isa(isas().back());

  m.def("isas", &isas, "Instruction sets that this machine can run, slowest first.");
  m.def("isa", [] { return kernels().isa; }, "The instruction set in use.");
  m.def("set_isa", &set_isa, "Select one of isas(). Raises ValueError for other names.");
  m.def("first_outside", &first_outside_of,
        "Index of the first integer outside [low, high], or -1.");
  m.def("shared_memory", &shared_memory,
        "The cache whose elements share memory, 'both', or None.");
  m.def("first_bad_block", &first_bad_block,
        "(row, column, block id) of the first invalid block id.");

  py::list families;
#define LF_DEFINE(op, Params)                                                  \
  families.append(#op);                                                        \
  lf::define(m, #op, &lf::Params::of, [](const lf::Params& p, const Tensor&) { \
    const int threads = Torch::num_threads();                                  \
    py::gil_scoped_release release;                                            \
    kernels().op(p, threads);                                                  \
  });
  LF_OPS(LF_DEFINE)
  m.attr("families") = py::tuple(families);
  lf::define(m, "linear_int16", &lf::LinearParams::of, [](lf::LinearParams p, const Tensor&) {
    p.int16 = true;
    const int threads = Torch::num_threads();
    py::gil_scoped_release release;
    kernels().linear(p, threads);
  });
  m.def("pack_weight", &pack_weight,
        "linear.cpp: pack into the layout that linear streams fastest.");
  m.def("decode_weight", &decode_weight, "linear.cpp: decode e4m3 or packed bf16 to bf16 [N, K].");
  m.def("advise_huge_pages", &advise_huge_pages, "A hint, on Linux, for memory not yet written.");
  m.def("read_bandwidth_probe", &read_bandwidth_probe,
        "bandwidth.cpp: XOR of 64-bit words, read at full memory bandwidth.");
  m.def("multiply_add_probe", &multiply_add_probe,
        "bandwidth.cpp: multiply-adds in registers, of bf16 pairs or fp32; returns their number.");
}
