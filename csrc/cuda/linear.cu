#include "common/launch.cuh"

namespace lf::cuda {

void linear(const LinearParams&, const Where&) {
  throw std::runtime_error("linear: not written yet");
}

}  // namespace lf::cuda
