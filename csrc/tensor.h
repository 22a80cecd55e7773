// A torch.Tensor as a binding's argument, without torch headers: one build serves every torch
// version. torch fills a DLTensor in place (DLPack's C exchange API, torch >= 2.10), in 20 ns.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "params.h"

namespace lf {

namespace py = pybind11;

// DLPack 1.3, https://github.com/dmlc/dlpack: the parts used here. The major version fixes the
// layout.
struct DLDevice {
  int32_t type, index;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  uint8_t code, bits;  // DLDataType
  uint16_t lanes;
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  const void* previous;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(PyObject*, DLTensor*);  // borrows; nonzero: a Python error is set
  int (*current_stream)(int32_t device_type, int32_t device_index, void** stream);
};

// Objects of torch, looked up once: a module first calls Torch::load().
struct Torch {
  const DLPackExchangeAPI* dlpack;
  PyTypeObject* tensor;
  PyObject* get_num_threads;

  static Torch& get() {
    static Torch torch{};
    return torch;
  }

  static void load() {
    const py::module_ torch = py::module_::import("torch");
    const py::object tensor = torch.attr("Tensor");
    if (!py::hasattr(tensor, "__dlpack_c_exchange_api__"))
      throw py::import_error("llama_fast needs torch >= 2.10: torch.Tensor has no DLPack C API");
    const py::capsule capsule = tensor.attr("__dlpack_c_exchange_api__");
    const auto* api = capsule.get_pointer<const DLPackExchangeAPI>();
    if (api->major != 1 || !api->tensor_from_object)
      throw py::import_error("llama_fast needs version 1 of DLPack's C API, torch has version " +
                             std::to_string(api->major));
    get() = {api, reinterpret_cast<PyTypeObject*>(py::object(tensor).release().ptr()),
             py::object(torch.attr("get_num_threads")).release().ptr()};
  }

  // This thread's count, as set by torch.set_num_threads. The caller holds the GIL.
  static int num_threads() {
    const py::object n =
        py::reinterpret_steal<py::object>(PyObject_CallNoArgs(get().get_num_threads));
    if (!n) throw py::error_already_set();
    return static_cast<int>(PyLong_AsLong(n.ptr()));
  }
};

// Borrowed: valid while the caller holds the torch.Tensor. Strides count elements.
class Tensor {
 public:
  bool read(PyObject* object) {
    const Torch& torch = Torch::get();
    if (!PyObject_TypeCheck(object, torch.tensor)) return false;
    if (torch.dlpack->tensor_from_object(object, &t_)) throw py::error_already_set();
    return true;
  }

  template <class T = void>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(t_.data) + t_.byte_offset);
  }
  int ndim() const { return t_.ndim; }
  int64_t size(int i) const { return t_.shape[at(i)]; }
  int64_t stride(int i) const { return t_.strides[at(i)]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < t_.ndim; ++i) n *= t_.shape[i];
    return n;
  }
  int64_t itemsize() const { return t_.bits / 8; }
  bool is_int64() const { return t_.code == kInt && t_.bits == 64; }
  DLDevice device() const { return t_.device; }

  DType dtype() const {
    if (t_.code == kFloat && t_.bits == 32) return DType::f32;
    if (t_.code == kFloat && t_.bits == 16) return DType::f16;
    if (t_.code == kBFloat) return DType::bf16;
    if (t_.code == kE4M3) return DType::e4m3;
    throw py::type_error("got a tensor whose dtype has no kernels");
  }

 private:
  enum : uint8_t { kInt = 0, kFloat = 2, kBFloat = 4, kE4M3 = 10 };  // DLDataTypeCode

  int at(int i) const {
    if (i < 0) i += t_.ndim;
    if (i < 0 || i >= t_.ndim) throw py::value_error("got a tensor of too few dimensions");
    return i;
  }

  DLTensor t_;
};

using MaybeTensor = std::optional<Tensor>;

}  // namespace lf

template <>
struct pybind11::detail::type_caster<lf::Tensor> {
  PYBIND11_TYPE_CASTER(lf::Tensor, const_name("torch.Tensor"));
  bool load(handle source, bool) { return value.read(source.ptr()); }
};
