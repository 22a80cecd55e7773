"""Every tolerance of the suite, each with its reason.

Errors are measured in ulps: units in the last place of the output dtype at the expected value.
"""

from __future__ import annotations

import torch
from torch import Tensor

# rms_norm against the eager twin. 16 bits: both round twice (the normalized value, then the
# product). Another order of the sum of squares moves rstd by fp32 ulps and so, near a tie, each
# rounding by one ulp of the dtype. The first is at most doubled, where the product crosses a power
# of two. fp32: rstd is off by 1.5 ulp from the sum's order, the division and the root on each side,
# and the two products round on each side; doubled likewise.
RMS_NORM_ULPS = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 8}

# A kernel's error against fp64 may be at most this many times eager PyTorch's in the same dtype
# (the measure of FlashAttention's tests), plus one ulp of the largest output for cases where eager
# happens to be exact.
TIMES_EAGER = 2.0

# Attention in fp32: rounding a score by one ulp moves its probability by about the score times
# 2^-24, and the output by that share of a value. With scores up to 8, eager's largest error is one
# to three ulps of the largest value and, over few outputs, varies twofold by chance. A kernel is
# allowed this many for any error of eager's.
ATTENTION_VALUE_ULPS = 4


def ulp(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the spacing of dtype at each value of expected (fp64)."""
    info = torch.finfo(dtype)
    magnitude = expected.abs().double().clamp(min=info.tiny)
    return torch.exp2(torch.floor(torch.log2(magnitude))) * info.eps


def ulps(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> float:
    """Return the largest error of actual, in ulps of its dtype (or of dtype) at expected."""
    if actual.numel() == 0:
        return 0.0
    error = (actual.double() - expected.double()).abs()
    return (error / ulp(expected, dtype or actual.dtype)).max().item()


def assert_close_to_eager(
    actual: Tensor, eager: Tensor, exact: Tensor, allowed: float = 0.0
) -> None:
    """Require max|actual - exact| <= 2 max|eager - exact| + ulp of the largest, or <= allowed."""
    assert actual.shape == exact.shape and actual.dtype == eager.dtype
    if actual.numel() == 0:
        return
    assert not actual.isnan().any(), "NaN in the output"
    ours = (actual.double() - exact.double()).abs().max().item()
    theirs = (eager.double() - exact.double()).abs().max().item()
    floor = ulp(exact.double().abs().max(), actual.dtype).item()
    bound = max(TIMES_EAGER * theirs + floor, allowed)
    assert ours <= bound, f"error {ours:.3g}, eager's {theirs:.3g}"


# fp32 silu against torch's: exp to 2 ulp here and 1 there, one addition and one division each.
SILU_FP32_ULPS = 8

# The number of 65,536 16-bit values that a Triton silu may round by one ulp otherwise than torch.
# fp32 errors of up to 4 ulp (2^-22) on either side of a tie decide them, and ties are 2^-11 apart
# in fp16. For about 40,000 values silu is neither x nor 0 nor x / 2: some 40 of them may differ.
SILU_TIES = 64

# Sums of e4m3 products on sm_89 and sm_90, as a share of sum |a b|. Tensor cores align 32 products
# and the sum so far to the largest of them and cut off what lies 13 bits below it. That is 2^-14 of
# the largest for each on average, of either sign. The largest of 32 random products is an eighth of
# their sum of magnitudes, so the sum is off by about 2^-15 of it. A kernel that lets this grow over
# a whole row of K, instead of 128 of it, fails at K of some thousands.
FP8_SUM = 2.0**-12
