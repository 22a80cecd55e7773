#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace lf::LF_ISA {

void quantize_fp8(const QuantizeFp8Params&, int) {}

}  // namespace lf::LF_ISA
