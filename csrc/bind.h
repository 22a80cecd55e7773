// Shared by the CPU's and CUDA's Python modules: reads torch.Tensors without torch headers, so that
// one build serves every torch version. torch fills a DLTensor in place (DLPack's C exchange API,
// torch >= 2.10), in 20 ns.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "params.h"

namespace lf {

namespace py = pybind11;

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
    py::register_local_exception_translator([](std::exception_ptr p) {
      try {
        if (p) std::rethrow_exception(p);
      } catch (const WrongType& error) {
        PyErr_SetString(PyExc_TypeError, error.what());
      }
    });
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

// Defines m.name(tensors, ...): of makes the params struct, run(params, first tensor) computes.
template <class Params, class... Rest, class Run>
void define(py::module_& m, const char* name, Params (*of)(const Tensor&, Rest...), Run run) {
  m.def(name, [of, run](const Tensor& first, Rest... rest) { run(of(first, rest...), first); });
}

}  // namespace lf

template <>
struct pybind11::detail::type_caster<lf::Tensor> {
  PYBIND11_TYPE_CASTER(lf::Tensor, const_name("torch.Tensor"));
  bool load(handle source, bool) {
    const lf::Torch& torch = lf::Torch::get();
    if (!PyObject_TypeCheck(source.ptr(), torch.tensor)) return false;
    if (torch.dlpack->tensor_from_object(source.ptr(), value.raw())) throw error_already_set();
    if (!value.rows_are_dense())  // ops/checks.py has refused those that a user gives
      throw value_error("got a tensor whose last dimension has gaps");
    return true;
  }
};
