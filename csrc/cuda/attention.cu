#include "common/launch.cuh"

namespace lf::cuda {

void attention(const AttentionParams&, const Where&) {
  throw std::runtime_error("attention: not written yet");
}

}  // namespace lf::cuda
