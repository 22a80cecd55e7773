#include "common/launch.cuh"

namespace lf::cuda {

void rms_norm(const RmsNormParams&, const Where&) {
  throw std::runtime_error("rms_norm: not written yet");
}

}  // namespace lf::cuda
