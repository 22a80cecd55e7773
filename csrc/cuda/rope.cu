#include "common/launch.cuh"

namespace lf::cuda {

void rope(const RopeParams&, const Where&) { throw std::runtime_error("rope: not written yet"); }

}  // namespace lf::cuda
