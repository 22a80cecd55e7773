// CUtensorMap, TMA's descriptor of a tensor. The driver's own function encodes it; it is looked up
// at run time, so that nothing links against libcuda.
#pragma once

#include "launch.cuh"
#include "wgmma.cuh"

namespace lf::cuda {

struct TensorLayout {
  const void* data;  // 16-byte aligned
  DType dtype;
  int rank;             // 2 to 4
  uint64_t sizes[4];    // elements, innermost first
  uint64_t strides[4];  // elements; [0] is 1, the others multiples of 16 bytes
  uint32_t box[4];      // elements; box[0] is 128 bytes with the swizzle
  bool swizzle;         // 128 bytes
};

inline size_t bytes_of(DType dtype) {
  return dtype == DType::e4m3 ? 1 : dtype == DType::f32 ? 4 : 2;
}

#if defined(LF_CUDA_EMULATOR)

inline CUtensorMap tensor_map(const TensorLayout& t, const char*) {
  emu::TensorMap m{};
  m.base = static_cast<const unsigned char*>(t.data);
  m.element_bytes = static_cast<uint32_t>(bytes_of(t.dtype));
  m.rank = static_cast<uint32_t>(t.rank);
  m.swizzle_bytes = t.swizzle ? 128 : 0;
  for (int i = 0; i < t.rank; ++i) {
    m.sizes[i] = static_cast<uint32_t>(t.sizes[i]);
    m.box[i] = t.box[i];
    m.strides[i] = t.strides[i] * bytes_of(t.dtype);
  }
  CUtensorMap map{};
  std::memcpy(&map, &m, sizeof m);
  return map;
}

#else

inline CUtensorMap tensor_map(const TensorLayout& t, const char* op) {
  using Encode =
      CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                   const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                   CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [op] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                           cudaEnableDefault, &found),
          op, "");
    if (found != cudaDriverEntryPointSuccess || !entry)
      throw std::runtime_error(std::string(op) + ": the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(entry);
  }();
  const CUtensorMapDataType type = t.dtype == DType::bf16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : t.dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                   : t.dtype == DType::f32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                                           : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  cuuint64_t sizes[4], strides[3];
  cuuint32_t box[4], step[4] = {1, 1, 1, 1};
  for (int i = 0; i < t.rank; ++i) {
    sizes[i] = t.sizes[i];
    box[i] = t.box[i];
    if (i) strides[i - 1] = t.strides[i] * bytes_of(t.dtype);
  }
  CUtensorMap map;
  const CUresult result =
      encode(&map, type, static_cast<cuuint32_t>(t.rank), const_cast<void*>(t.data), sizes, strides,
             box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             t.swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error(std::string(op) + ": cuTensorMapEncodeTiled: error " +
                             std::to_string(static_cast<int>(result)));
  return map;
}

#endif

}  // namespace lf::cuda
