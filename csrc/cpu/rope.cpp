#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace lf::LF_ISA {

void rope(const RopeParams&, int) {}

}  // namespace lf::LF_ISA
