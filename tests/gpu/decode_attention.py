"""The paging and the check of attention_with_kvcache, for its tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import llama_fast as lf
from llama_fast import reference

from ..support.decode_attention import page
from ..support.tolerances import ATTENTION_VALUE_ULPS, assert_close_to_eager, ulp

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
attend = lf.attention_with_kvcache


def paged(k: Tensor, v: Tensor, block_size: int) -> tuple[Tensor, ...]:
    """Return page()'s result on the device of k."""
    return tuple(t.to(k.device) for t in page(k.cpu(), v.cpu(), block_size))


def check(q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor, **options: Any) -> Tensor:
    actual = attend(q, k, v, seqlens, **options)
    eager = reference.attention_with_kvcache(q, k, v, seqlens, **options)
    wide = (k, v) if k.dtype == FP8 else (k.double(), v.double())
    exact = reference.attention_with_kvcache(q.double(), *wide, seqlens, **options)
    allowed = 0.0
    if q.dtype == torch.float32:
        largest = v.float().nan_to_num(0, 0, 0).abs().max()
        if k.dtype == FP8:
            largest = largest * options["v_scale"].max()
        allowed = ATTENTION_VALUE_ULPS * ulp(largest, q.dtype).item()
    assert_close_to_eager(actual, eager, exact, allowed)
    return actual
