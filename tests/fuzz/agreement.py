"""Whether results agree with the reference's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llama_fast import reference
from llama_fast.ops.common import with_values

from .arguments import Case
from .broken import BF16, F16, F32, FP8

AUTOCAST = {
    "attention": "q k v",
    "linear": "x weight bias",
    "fp8_linear": "x bias",
    "apply_rope_and_append": "| q k v",
    "attention_with_kvcache": "| q",
}
GRADIENTS = {  # the arguments that have one
    "rms_norm": "x weight",
    "add_rms_norm": "x residual weight",
    "silu_and_mul": "gate_up",
    "apply_rope": "q k",
    "attention": "q k v",
    "linear": "x weight bias",
    "fp8_linear": "x bias",
}
PRODUCTS = ("linear", "fp8_linear", "fp8_gemm")


def twin_arguments(case: Case, named: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for the reference: in fp32 for sums, whose roundings in the dtype are
    the reference's own."""
    out = dict(named)
    always, _, with_fp8 = AUTOCAST.get(case.op, "").partition("|")
    cache = named.get("k_cache")
    fp8_cache = isinstance(cache, Tensor) and cache.dtype == FP8
    casts = (always + with_fp8 * fp8_cache).split() if "autocast" in case.mode else []
    # The reference itself rounds scores and products to the dtype, in which fp16's may overflow.
    wide = case.backend != "reference" and ("attention" in case.op or case.op in PRODUCTS)
    to = BF16
    if case.op == "apply_rope_and_append" and "autocast" in case.mode and not fp8_cache:
        casts, to = ["q", "k", "v"], cache.dtype if isinstance(cache, Tensor) else BF16
    for name, value in named.items():
        if isinstance(value, Tensor) and (value._is_zerotensor() or value.is_neg()):
            value = out[name] = with_values(value)  # x / 0 without memory is +inf in PyTorch
        if isinstance(value, Tensor) and value.dtype in (BF16, F16, F32):
            value = value.to(to) if name in casts else value
            out[name] = value.float() if wide else value
    if case.op == "fp8_gemm":
        out["out_dtype"] = F32
    return out


def tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def largest(named: dict[str, Any], *names: str) -> float:
    """Return the largest finite magnitude among tensors, FP8 ones times their scales."""
    found = [0.0]
    for name in names:
        if isinstance(t := named.get(name), Tensor) and t.numel():
            scale = named.get(f"{name[0]}_scale")
            times = scale.max().item() if isinstance(scale, Tensor) and scale.numel() else 1.0
            found.append(t.float().abs().nan_to_num(0, 0, 0).max().item() * times)
    return max(found)


def tolerance(op: str, dtype: torch.dtype, named: dict[str, Any]) -> tuple[float, float]:
    """Return (rtol, atol) for an op's results in dtype. Roundings of the dtype are in rtol, and
    sums and cancellations in fp32, or probabilities in the dtype, in atol."""
    eps, least = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    tiny = 2 * least * eps
    if "attention" in op:  # a score's error is its probability's, relatively
        q = named["q"]
        width = max(q.shape[-1], 1) ** 0.5 if isinstance(q, Tensor) and q.dim() else 1.0
        score = largest(named, "q") * largest(named, "k", "k_cache") * width
        part = max(4 * eps, 3e-5, min(2**-22 * score, 1.0))
        return 4 * eps, tiny + largest(named, "v", "v_cache") * part
    if op in PRODUCTS:
        return 2 * eps, tiny
    if "rope" in op:
        return 2 * eps, tiny + 1e-6 * largest(named, "q", "k")
    return max(4 * eps, 1e-5), tiny


def agree(actual: Tensor, expected: Tensor, rtol: float, atol: Any, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, want {expected.shape}"
    if not actual.numel():
        return
    largest = torch.finfo(actual.dtype).max
    a, b = actual.double(), expected.double()
    error = (a - b).abs()
    near = b.abs() > 0.99 * largest
    bad = torch.where(b.isfinite() & ~near, ~(error <= atol + rtol * b.abs()), False)
    bad |= ~b.isfinite() & (a.isfinite() & (a.abs() < 0.98 * largest))
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(f"{what}: {a[at]} at {list(at)}, want {b[at]} ({int(bad.sum())} bad)")


def reach(op: str, named: dict[str, Any]) -> Tensor:
    """Return what attention makes of values that are 1 where they are not finite, and else 0."""
    v = named[name := "v" if "v" in named else "v_cache"]
    wrong = (~v.float().isfinite()).to(v.dtype)
    return tensors(getattr(reference, op)(**{**named, name: wrong}))[0]


def compare(case: Case, ours: Any, named: dict[str, Any]) -> None:
    """Compare results with the reference's."""
    given = twin_arguments(case, named)
    twins, results = tensors(getattr(reference, case.op)(**given)), tensors(ours)
    assert len(results) == len(twins)
    dtype = next((t.dtype for t in (*results, *given.values())
                  if isinstance(t, Tensor) and t.dtype in (BF16, F16, F32)), F32)  # fmt: skip
    if "fp8" in case.op and case.op not in PRODUCTS:
        dtype = given["gate_up" if "gate_up" in given else "x"].dtype
    if "autocast" in case.mode:  # of mixed dtypes the coarsest
        floats = [
            t.dtype for t in named.values() if isinstance(t, Tensor) and t.dtype in (BF16, F16)
        ]
        dtype = max([dtype, *floats], key=lambda d: torch.finfo(d).eps)
    rtol, atol = tolerance(case.op, dtype, given)
    bound: Any = 0.0
    if case.op in PRODUCTS:  # of the sum of magnitudes
        size = {n: magnitude(v) if isinstance(v, Tensor) else v for n, v in given.items()}
        bound = 4e-6 * tensors(getattr(reference, case.op)(**size))[0].double().nan_to_num(0, 0, 0)
    if len(results) > 1 and results[0].dtype == FP8:
        (q, scale), (twin_q, twin_scale) = results[:2], twins[:2]
        agree(scale, twin_scale, rtol, atol / 448, "scale")
        cols = q.shape[-1]
        a, b = (
            reference.dequantize_fp8(x.reshape(x.numel() // cols, cols), s)
            for x, s in ((q, scale), (twin_q, twin_scale))
        )
        spread = reference.spread_scale(twin_scale, *b.shape).double().nan_to_num(0, 0, 0)
        agree(a, b, 0.13, atol + 2.01 * 2**-9 * spread, "q * scale")  # one code beside
        results, twins = results[2:], twins[2:]
    for i, (a, b) in enumerate(zip(results, twins, strict=True)):
        if a.dtype == FP8:
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        else:
            if "attention" in case.op and case.values in ("nan", "inf"):
                # The twin gives NaN also for values of keys that a query does not see: 0 * NaN.
                b = torch.where((reach(case.op, given) == 0) & ~b.isfinite(), a.to(b.dtype), b)
            agree(a, b.to(a.dtype), rtol, atol + bound, f"result {i}")


def compare_gradients(case: Case, ours: Any, named: dict[str, Any], twins: dict[str, Any]) -> None:
    """Compare gradients with eager PyTorch's, or see that there are none."""
    outputs = [t for t in tensors(ours) if t.dtype in (BF16, F16, F32)]
    if case.op not in GRADIENTS or not outputs or not outputs[0].requires_grad:
        return
    random = torch.Generator().manual_seed(case.seed)
    towards = [torch.randn(t.shape, generator=random).to(t.dtype) for t in outputs]
    inputs = [n for n in GRADIENTS[case.op].split() if isinstance(named.get(n), Tensor)]
    if case.op == "fp8_linear" and case.seed % 3 == 2:  # the twin's rounding of x has no gradient
        return
    found = torch.autograd.grad(outputs, [named[n] for n in inputs], towards, allow_unused=True)
    eager = tensors(getattr(reference, case.op)(**twins))
    want = torch.autograd.grad(
        [t for t in eager if t.requires_grad],
        [twins[n] for n in inputs],
        towards,
        allow_unused=True,
    )
    part = 0.06 if outputs[0].dtype != F32 else 1e-3  # two ways of 16-bit roundings
    least = 1e-6
    if case.op == "attention":  # of one key, differences of equal sums over head_dim times q or k
        values = (
            largest(named, "q", "k") * largest(named, "v") * max(outputs[0].shape[-1], 1) ** 0.5
        )
        least += 4 * torch.finfo(outputs[0].dtype).eps * values
    for name, a, b in zip(inputs, found, want, strict=True):
        if a is not None and b is not None and b.numel():
            agree(a, b, part, part * b.double().abs().max().item() + least, f"gradient of {name}")


def magnitude(t: Tensor) -> Tensor:
    return t.view(torch.uint8).bitwise_and(0x7F).view(FP8) if t.dtype == FP8 else t.abs()
