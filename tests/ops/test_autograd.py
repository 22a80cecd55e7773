"""Tests of gradients: formulas in fp64, backends against eager, and none missing silently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import llama_fast as lf
from llama_fast import reference

from ..support.op_examples import OPS, example, i32, tensors
from ..support.tolerances import ATTENTION_VALUE_ULPS, assert_close_to_eager, ulp

TABLE = lf.rope_table(1e4, 16, head_dim=8)
POSITIONS = torch.tensor([3, 1, 0, 7, 15])
CU = {"cu_seqlens_q": i32(0, 2, 2, 5), "cu_seqlens_k": i32(0, 1, 3, 7)}
Call = Callable[..., Any]

# name -> (op of a module with the ops' names, shapes of its differentiable arguments)
CASES: dict[str, tuple[Callable[[Any], Call], list[tuple[int, ...]]]] = {
    "rms_norm": (lambda m: lambda x, w: m.rms_norm(x, w, 1e-5), [(2, 3, 16), (16,)]),
    "add_rms_norm": (
        lambda m: lambda x, r, w: m.add_rms_norm(x, r, w, 1e-5),
        [(5, 16), (5, 16), (16,)],
    ),
    "add_rms_norm-normed": (
        lambda m: lambda x, r, w: m.add_rms_norm(x, r, w, 1e-5)[0],
        [(5, 16), (5, 16), (16,)],
    ),
    "add_rms_norm-total": (
        lambda m: lambda x, r: m.add_rms_norm(x, r, torch.ones(16, dtype=x.dtype), 1e-5)[1],
        [(5, 16), (5, 16)],
    ),
    "silu_and_mul": (lambda m: m.silu_and_mul, [(2, 3, 14)]),
    "apply_rope": (
        lambda m: lambda q, k: m.apply_rope(q, k, POSITIONS, TABLE),
        [(5, 4, 8), (5, 2, 8)],
    ),
    "apply_rope-interleaved": (
        lambda m: lambda q, k: m.apply_rope(q, k, POSITIONS.int(), TABLE, interleaved=True),
        [(5, 4, 8), (5, 2, 8)],
    ),
    "apply_rope-q": (
        lambda m: lambda q, k: m.apply_rope(q, k, POSITIONS, TABLE)[0] + 0 * k.sum(),
        [(5, 4, 8), (5, 2, 8)],
    ),
    "linear": (lambda m: m.linear, [(2, 3, 6), (5, 6), (5,)]),
    "linear-no outputs": (lambda m: m.linear, [(2, 3, 6), (0, 6), (0,)]),
    "linear-no bias": (lambda m: m.linear, [(6,), (5, 6)]),
    "linear-packed": (lambda m: m.linear, [(3, 4), (1, 2, 64, 2), (64,)]),
    "pack_weight": (lambda m: lambda x, w: m.linear(x, m.pack_weight(w)), [(3, 4), (64, 4)]),
    "attention": (lambda m: m.attention, [(2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8)]),
    "attention-more keys": (lambda m: m.attention, [(2, 3, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8)]),
    "attention-more queries": (lambda m: m.attention, [(1, 7, 2, 8), (1, 3, 1, 8), (1, 3, 1, 8)]),
    "attention-not causal": (
        lambda m: lambda q, k, v: m.attention(q, k, v, causal=False, softmax_scale=0.5),
        [(1, 3, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8)],
    ),
    "attention-packed": (
        lambda m: lambda q, k, v: m.attention(q, k, v, **CU),
        [(5, 4, 8), (7, 2, 8), (7, 2, 8)],
    ),
}
ONCE = tuple(name for name in CASES if name.startswith(("attention", "silu")))


class _Unchecked:
    """The registered ops, whose public functions refuse fp64."""

    def __getattr__(self, name: str) -> Call:
        op = getattr(torch.ops.llama_fast, name).default
        defaults = {"bias": None, "interleaved": False, "causal": True, "softmax_scale": 8**-0.5}

        def call(*args: Any, **kwargs: Any) -> Any:
            names = [a.name for a in op._schema.arguments]
            given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
            return op(*(given.get(n) for n in names))

        return call


def leaves(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)


def gradients(result: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the gradients of the result's dot product with fixed random numbers."""
    generator = torch.Generator().manual_seed(1)
    outputs = tensors(result)
    seeds = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    return torch.autograd.grad(outputs, inputs, seeds)


@pytest.mark.parametrize("name", CASES)
def test_formulas_in_fp64(name: str) -> None:
    make, shapes = CASES[name]
    with lf.use_backend("reference"):
        inputs = leaves(shapes, torch.float64)
        assert torch.autograd.gradcheck(make(_Unchecked()), inputs, fast_mode=True)
        if name not in ONCE:
            assert torch.autograd.gradgradcheck(make(_Unchecked()), inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["attention", "silu_and_mul"])
def test_second_derivatives_are_right_or_refused(name: str) -> None:
    make, shapes = CASES[name]
    inputs = leaves(shapes)
    (of_q, *_) = torch.autograd.grad(make(lf)(*inputs).sum(), inputs, create_graph=True)
    with pytest.raises(
        RuntimeError, match="_backward: has no gradient|_backward is not implemented"
    ):
        of_q.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_match_eager(name: str, backend: str, dtype: torch.dtype) -> None:
    """Bound the error by twice eager's in the same dtype: a formula computes in fp32 and rounds
    once, where eager rounds after each step. Attention's is PyTorch's own fused kernel, whose sums
    and exponentials differ from eager's like those of ours in the forward pass, for the two
    factors of each addend: the probability, and its gradient."""
    make, shapes = CASES[name]
    inputs = leaves(shapes, dtype)
    exact = tuple(t.detach().double().requires_grad_() for t in inputs)
    op = "pack_weight" if name == "pack_weight" else name.partition("-")[0]
    if backend == "triton" and op in ("linear", "pack_weight"):
        pytest.skip("the triton backend has no such op")
    with lf.use_backend(backend, op):
        ours = gradients(make(lf)(*inputs), inputs)
    eager = gradients(make(reference)(*inputs), inputs)
    for a, b, c in zip(ours, eager, gradients(make(reference)(*exact), exact), strict=True):
        fused = dtype == torch.float32 and op == "attention"
        largest = ulp(c.abs().max(), dtype).item() if fused else 0.0
        assert_close_to_eager(a, b, c, allowed=2 * ATTENTION_VALUE_ULPS * largest)


@pytest.mark.parametrize("name", ["rms_norm", "linear", "attention"])
def test_long_sums_in_bf16_keep_their_accuracy(name: str) -> None:
    """Sum a weight's gradient over 4,096 rows, or a key's over 512 queries, in fp32: in bf16 the
    sum would stop growing at 256 times an addend."""
    shapes = {
        "rms_norm": [(4096, 64), (64,)],
        "linear": [(4096, 64), (32, 64), (32,)],
        "attention": [(1, 512, 4, 16), (1, 512, 1, 16), (1, 512, 1, 16)],
    }[name]
    make, _ = CASES[name]
    inputs = leaves(shapes, torch.bfloat16)
    exact = tuple(t.detach().double().requires_grad_() for t in inputs)
    ours = torch.autograd.grad([o.sum() for o in tensors(make(lf)(*inputs))], inputs)
    true = torch.autograd.grad([o.sum() for o in tensors(make(reference)(*exact))], exact)
    for a, b in zip(ours, true, strict=True):
        # One rounding of the result, and for attention bf16 probabilities: half an ulp each,
        # which average over the sum.
        assert (a.double() - b).abs().max() <= 2.0**-7 * b.abs().max()


@pytest.mark.parametrize("seqlen_q", [1024, 1000])
def test_attention_stores_no_scores(seqlen_q: int) -> None:
    """Allocate no [H, Sq, Sk] in fp32, 32 MB here; a mask [Sq, Sk] is 4 MB."""
    q, k, v = leaves([(1, seqlen_q, 8, 8), (1, 1024, 2, 8), (1, 1024, 2, 8)])
    out = lf.attention(q, k, v).sum()
    with torch.profiler.profile(profile_memory=True) as profile:
        out.backward()
    assert 0 < max(event.self_cpu_memory_usage for event in profile.events()) <= 8 << 20


# ---- no gradient is missing silently ----


def _floating(op: str) -> list[str]:
    return [
        name
        for name, value in example(op).items()
        if isinstance(value, Tensor) and value.is_floating_point()
    ]


@pytest.mark.parametrize("op, name", [(op, name) for op in OPS for name in _floating(op)])
def test_no_gradient_is_missing_silently(op: str, name: str) -> None:
    """Give each floating-point argument of each op a gradient, or raise."""
    arguments = example(op)
    wanted = arguments[name] = arguments[name].detach().requires_grad_()
    try:
        outputs = tensors(getattr(lf, op)(**arguments))
        assert all(o.requires_grad for o in outputs)
        sum(o.float().sum() for o in outputs).backward()  # type: ignore[union-attr]
    except NotImplementedError as error:
        assert op in str(error) or "add_rms_norm_fp8" in str(error)
        return
    except ValueError as error:
        assert op == "apply_rope_and_append" and name in str(error)
        return
    assert wanted.grad is not None and wanted.grad.shape == wanted.shape
    assert wanted.grad.isfinite().all() and wanted.grad.abs().max() > 0


@pytest.mark.parametrize("op", ["rms_norm", "quantize_fp8"])
def test_forward_mode_is_refused(op: str) -> None:
    arguments = example(op)
    x, call = arguments.pop("x"), lambda x: getattr(lf, op)(x, **arguments)
    with pytest.raises(NotImplementedError, match=f"{op}: has no forward-mode derivative"):
        torch.func.jvp(call, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        call(x)
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with torch.no_grad(), pytest.raises(NotImplementedError, match=op):
            call(dual)


class _Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(op.name())
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", OPS)
def test_calls_without_gradients_skip_autograd(op: str) -> None:
    """Call the overload without an autograd kernel, which would cost 4.5 us."""
    with _Ops() as seen, torch.no_grad():
        getattr(lf, op)(**example(op))
    with _Ops() as plain:
        getattr(lf, op)(**example(op))
    for names in (seen.names, plain.names):
        ours = [n for n in names if n.startswith("llama_fast::")]
        assert ours and all(n.endswith(".no_grad") for n in ours)


def test_only_needed_gradients_are_computed() -> None:
    x, w, b = leaves([(3, 6), (5, 6), (5,)])
    for wanted, products in (((x,), 1), ((w,), 1), ((b,), 0), ((x, w, b), 2)):
        frozen = [t if any(t is u for u in wanted) else t.detach() for t in (x, w, b)]
        out = lf.linear(*frozen)
        with _Ops() as seen:
            torch.autograd.grad(out.sum(), wanted)
        assert seen.names.count("aten::mm") == products


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_any_strides(name: str) -> None:
    make, shapes = CASES[name]
    inputs = leaves(shapes)
    outputs = tensors(make(lf)(*inputs))
    ones = [torch.ones((), dtype=o.dtype).expand(o.shape) for o in outputs]
    expanded = torch.autograd.grad(outputs, inputs, ones, retain_graph=True)
    plain = torch.autograd.grad(outputs, inputs, [o.contiguous() for o in ones], retain_graph=True)
    spread = [torch.ones(*o.shape, 2)[..., 0] for o in outputs]
    spaced = torch.autograd.grad(outputs, inputs, spread)
    for a, b, c in zip(expanded, spaced, plain, strict=True):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b, c)


@pytest.mark.parametrize("name", CASES)
def test_zero_tokens_have_zero_gradients(name: str) -> None:
    if "packed" in name or "rope" in name or name == "linear-no bias":
        pytest.skip("its positions, offsets or single row are fixed")
    make, shapes = CASES[name]
    tokens = [(0, *s[1:]) if len(s) > 1 and i == 0 else s for i, s in enumerate(shapes)]
    if name.startswith("add_rms_norm"):
        tokens[1] = tokens[0]
    if name.startswith("attention"):
        tokens = [(s[0], 0, *s[2:]) if i == 0 else s for i, s in enumerate(shapes)]
    inputs = leaves(tokens)
    for t, g in zip(inputs, gradients(make(lf)(*inputs), inputs), strict=True):
        assert g.shape == t.shape and not g.any()


# ---- torch.compile, checkpointing, training ----


@pytest.mark.parametrize("name", CASES)
def test_compiles_forward_and_backward(name: str) -> None:
    make, shapes = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(make(lf), fullgraph=True, dynamic=True, backend="aot_eager")
    inputs = leaves(shapes)
    expected = gradients(make(lf)(*inputs), inputs)
    for a, b in zip(gradients(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(reentrant: bool) -> None:
    step, weights = tiny(lf)
    x = torch.randn(2, 6, 32, requires_grad=True)
    plain = torch.autograd.grad(step(x).square().sum(), [x, *weights])
    again = checkpoint(step, x, use_reentrant=reentrant).square().sum()
    again.backward()
    for t, g in zip([x, *weights], plain, strict=True):
        assert t.grad is not None and torch.equal(t.grad, g)


def tiny(m: Any, seed: int = 0) -> tuple[Call, list[Tensor]]:
    """Return a Llama layer [B, S, 32] -> the same, made of m's ops, and its weights."""
    g = torch.Generator().manual_seed(seed)
    table, positions = lf.rope_table(1e4, 64, head_dim=8), torch.arange(64)
    shapes = [(32,), (64, 32), (32, 32), (32,), (128, 32), (32, 64)]
    weights = [torch.randn(s, generator=g) / (s[-1] ** 0.5 if len(s) > 1 else 8) for s in shapes]
    weights = [(w + (w.dim() == 1)).requires_grad_() for w in weights]

    def step(x: Tensor) -> Tensor:
        norm, qkv, out, ffn_norm, gate_up, down = weights
        batch, length, _ = x.shape
        heads = m.linear(m.rms_norm(x, norm, 1e-5), qkv).view(batch * length, 8, 8)
        q, k, v = heads.split((4, 2, 2), dim=1)
        q, k = m.apply_rope(q, k, positions[: batch * length], table)
        q, k, v = (t.reshape(batch, length, -1, 8) for t in (q, k, v))
        h = m.linear(m.attention(q, k, v).flatten(2), out)
        h, x = m.add_rms_norm(h, x, ffn_norm, 1e-5)
        return x + m.linear(m.silu_and_mul(m.linear(h, gate_up)), down)

    return step, weights


def test_inductor_compiles_a_training_step(one_thread: None) -> None:
    step, weights = tiny(lf)
    x = torch.randn(2, 6, 32, requires_grad=True)
    expected = torch.autograd.grad(step(x).square().sum(), [x, *weights])
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    actual = torch.autograd.grad(compiled(x).square().sum(), [x, *weights])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_fine_tuning_follows_eager(one_thread: None) -> None:
    """Train two layers for 50 steps with our ops and with eager PyTorch's, in fp32."""

    def train(m: Any) -> list[float]:
        (first, a), (second, b) = tiny(m, 1), tiny(m, 2)
        g = torch.Generator().manual_seed(3)
        x, target = (torch.randn(4, 12, 32, generator=g) for _ in range(2))
        optimizer = torch.optim.AdamW([*a, *b], lr=3e-3)
        losses = []
        for _ in range(50):
            loss = (second(first(x)) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    ours, eager = train(lf), train(reference)
    assert eager[-1] < 0.8 * eager[0]
    assert max(abs(a - b) for a, b in zip(ours, eager, strict=True)) < 1e-3


def test_an_in_place_write_is_seen_by_autograd() -> None:
    """Raise _version, so that a cache saved for a backward pass is not used after it changed."""
    arguments = example("apply_rope_and_append")
    caches = arguments["k_cache"], arguments["v_cache"]
    before = [c._version for c in caches]
    x = torch.ones(caches[0].shape, requires_grad=True)
    product = (x * caches[0]).sum()
    lf.apply_rope_and_append(**arguments)
    assert all(c._version > v for c, v in zip(caches, before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
