// A torch.Tensor as the kernels' params structs read it: where it lies and its layout, without
// torch or Python headers. bind.h fills it.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>

namespace lf {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, e4m3 = 3 };

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

// A TypeError in Python.
struct WrongType : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Borrowed: valid while the caller holds the torch.Tensor. Strides count elements.
class Tensor {
 public:
  DLTensor* raw() { return &t_; }
  template <class T = void>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(t_.data) + t_.byte_offset);
  }
  int ndim() const { return t_.ndim; }
  int64_t size(int i) const { return t_.shape[at(i)]; }
  int64_t stride(int i) const { return t_.strides[at(i)]; }
  // The last N strides before the last dimension's: of batches, tokens and heads, in this order.
  template <int N>
  void strides(int64_t (&to)[N]) const {
    for (int i = 0; i < N; ++i) to[i] = stride(ndim() - 1 - N + i);
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < t_.ndim; ++i) n *= t_.shape[i];
    return n;
  }
  // Whether the elements of the last dimension lie side by side, where there is more than one.
  bool rows_are_dense() const {
    const int last = t_.ndim - 1;
    return last < 0 || t_.shape[last] < 2 || t_.strides[last] == 1 || numel() == 0;
  }
  int64_t itemsize() const { return t_.bits / 8; }
  bool is_int64() const { return t_.code == kInt && t_.bits == 64; }
  DLDevice device() const { return t_.device; }

  DType dtype() const {
    if (t_.code == kFloat && t_.bits == 32) return DType::f32;
    if (t_.code == kFloat && t_.bits == 16) return DType::f16;
    if (t_.code == kBFloat) return DType::bf16;
    if (t_.code == kE4M3) return DType::e4m3;
    throw WrongType("got a tensor whose dtype has no kernels");
  }

 private:
  enum : uint8_t { kInt = 0, kFloat = 2, kBFloat = 4, kE4M3 = 10 };  // DLDataTypeCode

  int at(int i) const {
    if (i < 0) i += t_.ndim;
    if (i < 0 || i >= t_.ndim) throw std::invalid_argument("got a tensor of too few dimensions");
    return i;
  }

  DLTensor t_;
};

using MaybeTensor = std::optional<Tensor>;

template <class T = void>
T* data_or_null(const MaybeTensor& t) {
  return t ? t->data<T>() : nullptr;
}

}  // namespace lf
