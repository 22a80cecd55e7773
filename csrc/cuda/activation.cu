#include "common/launch.cuh"

namespace lf::cuda {

void silu_and_mul(const SiluAndMulParams&, const Where&) {
  throw std::runtime_error("silu_and_mul: not written yet");
}

}  // namespace lf::cuda
