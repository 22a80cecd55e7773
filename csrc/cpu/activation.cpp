#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace lf::LF_ISA {

void silu_and_mul(const SiluAndMulParams&, int) {}

}  // namespace lf::LF_ISA
