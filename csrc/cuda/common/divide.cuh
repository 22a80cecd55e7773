// Division without its slow path. For an unrestricted x / d, nvcc emits a reciprocal, a check, a
// branch around a call, and registers reserved for that call; a 64-bit integer division takes about
// a hundred instructions. Here a divisor is prepared once, and each quotient takes a few
// multiplications and has the same bits.
#pragma once

#include <cfloat>

#include "vector.cuh"

namespace lf::cuda {

// 1 / d rounded to nearest for normal d up to 2^126, by the steps of __frcp_rn. Gives 0 for larger
// d and Inf, Inf for 0 and subnormal d, and NaN for NaN.
LF_DEVICE float reciprocal(float d) {
  const float r = ptx::rcp_approx(d);
  return fmaf(r, fminf(fmaf(-d, r, 1.0f), 1.0f), r);  // min turns the NaN of Inf * 0 into 1
}

// x / d rounded to nearest, given r = reciprocal(d), if nothing underflows or overflows
// (Markstein): the remainder y d - x is exact, and y - r (y d - x) rounds as the quotient does.
// With these signs a remainder of zero preserves -0. finite: neither x nor d is infinite.
template <bool finite>
LF_DEVICE float quotient(float x, float d, float r) {
  const float y = __fmul_rn(x, r), remainder = fmaf(y, d, -x);
  return fmaf(finite ? remainder : fminf(remainder, FLT_MAX), -r, y);  // min: Inf, not Inf - Inf
}

// n / d and n % d. The multiplication is off by at most one. Constructed on the host.
template <class Unsigned>
struct Divider {
  Unsigned divisor, inverse;

  explicit Divider(int64_t d)
      : divisor(static_cast<Unsigned>(d < 1 ? 1 : d)), inverse(~Unsigned{0} / divisor) {}

  LF_DEVICE Unsigned divide(Unsigned n, Unsigned& rest) const {
    Unsigned q;
    if constexpr (sizeof(Unsigned) == 8)
      q = __umul64hi(n, inverse);
    else
      q = __umulhi(n, inverse);
    rest = n - q * divisor;
    if (rest < divisor) return q;
    rest -= divisor;
    return q + 1;
  }
};

}  // namespace lf::cuda
