// Kernel launch on the right device and stream, with errors as exceptions.
#pragma once

#include <stdexcept>
#include <string>

#include "../kernels.h"
#include "ptx.cuh"

#if !defined(LF_CUDA_EMULATOR)
#include <cuda_runtime.h>
#endif

namespace lf::cuda {

// Names the kernel in the message of a failed launch: "rms_norm [512, 4096] bf16".
inline std::string shape_text(std::initializer_list<int64_t> sizes) {
  std::string text = " [";
  for (int64_t size : sizes) text += (text.size() > 2 ? ", " : "") + std::to_string(size);
  return text + "]";
}

inline void check(cudaError_t error, const char* op, const std::string& shape) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next CUDA call, from any caller, would report this error
  throw std::runtime_error(std::string(op) + shape + ": " + cudaGetErrorString(error));
}

// Makes a device current for a scope. The caller's current device may differ.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) {
#if defined(LF_CUDA_EMULATOR)
    (void)device, (void)op;
#else
    check(cudaGetDevice(&before_), op, "");
    if (before_ != device) {
      check(cudaSetDevice(device), op, "");
      changed_ = true;
    }
#endif
  }
  ~DeviceGuard() {
#if !defined(LF_CUDA_EMULATOR)
    if (changed_) cudaSetDevice(before_);
#endif
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Properties of a device, read once.
struct Device {
  int sm;  // 90 for sm_90
  int multiprocessors;
  size_t shared_bytes;  // limit of one block
};

inline Device device_of(const Where& where) {
#if defined(LF_CUDA_EMULATOR)
  (void)where;
  return {90, emu::multiprocessors(), 232448};
#else
  constexpr int kMost = 64;
  static Device known[kMost] = {};
  if (where.device < kMost && known[where.device].sm) return known[where.device];
  int major = 0, minor = 0, count = 0, shared = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, where.device), "device",
        "");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, where.device), "device",
        "");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, where.device), "device", "");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, where.device),
        "device", "");
  const Device device{10 * major + minor, count, static_cast<size_t>(shared)};
  if (where.device < kMost) known[where.device] = device;
  return device;
#endif
}

struct LaunchShape {
  const char* op;
  std::initializer_list<int64_t> sizes;  // for error messages
  dim3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks per cluster along x (sm_90)
  // Starts while the previous kernel ends (sm_90). The kernel must call ptx::griddepcontrol_wait.
  bool programmatic = false;
};

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...). A grid with a zero launches nothing.
template <class... Parameters, class... Arguments>
void launch(const Where& where, const LaunchShape& s, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  if (s.grid.x == 0 || s.grid.y == 0 || s.grid.z == 0) return;
#if defined(LF_CUDA_EMULATOR)
  (void)where;
  emu::launch(
      s.grid, s.block, s.shared_bytes, s.cluster, [&] { kernel(arguments...); }, s.programmatic);
#else
  const DeviceGuard guard(where.device, s.op);
  const std::string none;
  if (s.shared_bytes > 48 << 10)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(s.shared_bytes)),
          s.op, shape_text(s.sizes));
  cudaLaunchConfig_t config{};
  config.gridDim = s.grid;
  config.blockDim = s.block;
  config.dynamicSmemBytes = s.shared_bytes;
  config.stream = static_cast<cudaStream_t>(where.stream);
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (s.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {s.cluster, 1, 1};
  }
  if (s.programmatic && device_of(where).sm >= 90) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  if (error != cudaSuccess) check(error, s.op, shape_text(s.sizes));
#endif
}

}  // namespace lf::cuda
