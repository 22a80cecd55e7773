"""Tests of the modules: their names, what moving and saving them does, and their gradients."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llama_fast as lf
from llama_fast import reference
from llama_fast.nn import Attention, FP8Linear, RMSNorm, RotaryEmbedding, SwiGLU

from ..support.checkpoints import LLAMA3_ROPE, hf_model, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

FP8 = torch.float8_e4m3fn
GRANULARITIES = ["row", "tensor", "block"]
FP32 = 2e-6  # of the largest, for sums of up to 256 products in another order: 8 fp32 ulps


# ---- layers against transformers' own, from the same state dict ----


def rotary(positions: int = 64) -> RotaryEmbedding:
    fields = {k: v for k, v in LLAMA3_ROPE.items() if k not in ("rope_type", "rope_theta")}
    scaling = lf.RopeScaling(**fields)  # type: ignore[arg-type]
    return RotaryEmbedding(500000.0, positions, head_dim=16, scaling=scaling)


def test_layers_take_transformers_state_dicts() -> None:
    hf = hf_model().model
    theirs, x = hf.layers[0], torch.randn(2, 19, 128)
    norm, mlp = RMSNorm(128), SwiGLU(128, 192)
    attention = Attention(128, 8, 2, rotary(), head_dim=16)
    norm.load_state_dict(theirs.input_layernorm.state_dict())
    mlp.load_state_dict(theirs.mlp.state_dict())
    attention.load_state_dict(theirs.self_attn.state_dict())
    with torch.no_grad():
        assert relative_error(norm(x), theirs.input_layernorm(x)) < FP32
        assert relative_error(mlp(x), theirs.mlp(x)) < FP32
        positions = torch.arange(19)[None]
        mask = torch.full((19, 19), -torch.inf).triu(1)[None, None]
        expected = theirs.self_attn(x, hf.rotary_emb(x, positions), attention_mask=mask)[0]
        assert relative_error(attention(x), expected) < 2 * FP32  # two products and a softmax


def test_rms_norm_adds_a_residual() -> None:
    norm, x, residual = RMSNorm(64, 1e-6), torch.randn(3, 64), torch.randn(3, 64)
    nn.init.normal_(norm.weight)
    with torch.no_grad():
        out, total = norm(x, residual)
    expected = reference.add_rms_norm(x, residual, norm.weight, 1e-6)
    assert relative_error(out, expected[0]) < FP32 and torch.equal(total, expected[1])


def test_attention_with_a_cache_continues() -> None:
    attention, x = Attention(64, 4, 2, rotary()), torch.randn(2, 7, 64)
    cache = torch.zeros(2, 9, 2, 16), torch.zeros(2, 9, 2, 16)
    empty = torch.zeros(2, dtype=torch.int32)
    with torch.no_grad():
        whole = attention(x)
        parts = [attention(x[:, :4], cache=cache, cache_seqlens=empty)]
        parts += [
            attention(x[:, i : i + 1], cache=cache, cache_seqlens=empty + i) for i in (4, 5, 6)
        ]
        assert relative_error(torch.cat(parts, 1), whole) < FP32
        before = cache[0].clone()
        with pytest.raises(ValueError, match="cache_seqlens: got 10"):
            attention(x[:, :3], cache=cache, cache_seqlens=empty + 7)
        assert torch.equal(cache[0][1, :7], before[1, :7])  # no write past row 0's end
        with pytest.raises(ValueError, match="cache_seqlens: got None"):
            attention(x, cache=cache)


def test_rotary_table_stays_fp32_and_can_be_computed_again() -> None:
    module, table = rotary().bfloat16(), rotary().table
    assert module.table.dtype == torch.float32 and torch.equal(module.table, table)
    assert not module.state_dict()
    module = rotary().to("meta").to_empty(device="cpu")
    module.reset_parameters()
    assert torch.equal(module.table, table)
    q, k, at = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 16), torch.randint(64, (2, 5))
    got = module(q, k, at)
    flat = reference.apply_rope(q.flatten(0, 1), k.flatten(0, 1), at.flatten(), table)
    for a, b in zip(got, flat, strict=True):
        assert torch.equal(a.flatten(0, 1), b)
    for a, b in zip(module(q[0, 0], k[0, 0], at[0, 0]), got, strict=True):
        assert torch.equal(a, b[0, 0])  # a single token, [H, D]


def test_fp8_linear_takes_any_strides() -> None:
    """As nn.Linear does, though the op wants a contiguous last dimension."""
    module, x = FP8Linear.from_linear(nn.Linear(64, 32)), torch.randn(64, 5)
    assert torch.equal(module(x.t()), module(x.t().contiguous()))


def test_import_needs_no_transformers(run_python: Callable[..., Any]) -> None:
    run_python(
        "import llama_fast as lf, sys; lf.nn.FP8Linear; assert 'transformers' not in sys.modules"
    )


# ---- FP8Linear ----


@pytest.fixture(params=GRANULARITIES)
def granularity(request: pytest.FixtureRequest) -> str:
    return request.param


def made(granularity: str, n: int = 192, k: int = 160, **options: Any) -> FP8Linear:
    return FP8Linear.from_linear(nn.Linear(k, n), granularity, **options)


@pytest.mark.parametrize("n", [192, 70], ids=["packed", "plain"])
def test_from_linear_quantizes_the_weight(granularity: str, n: int) -> None:
    linear = nn.Linear(160, n)
    module = FP8Linear.from_linear(linear, granularity)
    by = "block_2d" if granularity == "block" else granularity
    q, scale = reference.quantize_fp8(linear.weight.detach(), by)
    assert module.weight.dim() == (4 if n % 64 == 0 else 2)
    state = module.state_dict()
    assert list(state) == ["weight", "bias", "weight_scale"]
    assert torch.equal(state["weight"].view(torch.uint8), q.view(torch.uint8))
    assert torch.equal(state["weight_scale"], scale)
    dense = reference.dequantize_fp8(q, scale)
    assert torch.equal(module.dequantize(), dense)
    x = torch.randn(2, 3, 160)
    expected = nn.functional.linear(x, dense, linear.bias)
    assert relative_error(module(x), expected) < FP32
    assert relative_error(module.to_linear(torch.float32)(x), expected) == 0
    with torch.no_grad():
        module.bias += 1
    assert not torch.equal(module.bias, linear.bias)  # a copy


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.bfloat16(),
        lambda m: m.half().bfloat16(),
        lambda m: m.double().to("cpu", torch.bfloat16),
        lambda m: m.type(torch.bfloat16),
        lambda m: nn.Sequential(m).to(torch.bfloat16)[0],
    ],
    ids=["to", "bfloat16", "half", "double", "type", "parent"],
)
def test_casts_leave_fp8_and_its_scale(granularity: str, cast: Callable[..., FP8Linear]) -> None:
    module = made(granularity)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    module = cast(module)
    after = module.state_dict()
    assert after["weight"].dtype == FP8 and after["weight_scale"].dtype == torch.float32
    assert torch.equal(after["weight"].view(torch.uint8), before["weight"].view(torch.uint8))
    assert torch.equal(after["weight_scale"], before["weight_scale"])
    assert after["bias"].dtype == torch.bfloat16
    assert module(torch.randn(2, 160).bfloat16()).dtype == torch.bfloat16


def test_copies_give_the_same(granularity: str) -> None:
    module, x = made(granularity, quantize_activation=True, scale_ub=2.0), torch.randn(2, 160)
    expected, file = module(x), io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(other(x), expected) and not other.weight.requires_grad
        assert other.weight.data_ptr() != module.weight.data_ptr()


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_loads_its_state_dict_from_any_device(granularity: str, assign: bool) -> None:
    module, x = made(granularity), torch.randn(2, 160)
    options: dict[str, Any] = {"granularity": granularity}
    on_meta = FP8Linear(160, 192, device="meta", **options)
    assert on_meta.weight.shape == (192, 160)  # packing is for CPUs
    assert copy.deepcopy(module).to("meta").weight.shape == (192, 160)
    emptied = module.__class__(160, 192, **options).to("meta").to_empty(device="cpu")
    for other in (FP8Linear(160, 192, **options), emptied, *([on_meta] if assign else [])):
        other.load_state_dict(module.state_dict(), assign=assign)
        assert other.weight.dim() == 4 and not other.weight.requires_grad
        assert torch.equal(other(x), module(x))


def test_takes_scales_in_checkpoints_shapes() -> None:
    module, state = made("row"), made("tensor").state_dict()
    one = state["weight_scale"]
    for scale in (one, one[0], one[None], one.expand(192), one.expand(192, 1)):
        module.load_state_dict(state | {"weight_scale": scale})
        assert module.weight_scale.shape == (192, 1) and (module.weight_scale == one).all()


@pytest.mark.parametrize(
    ("granularity", "change", "message"),
    [
        ("row", {"weight": torch.ones(192, 160)}, "weight: got dtype torch.float32, want .*e4m3"),
        ("row", {"weight": torch.ones(160, 192).to(FP8)}, "size mismatch for weight"),
        ("row", {"weight_scale": torch.ones(191, 1)}, r"weight_scale: got shape \[191, 1\]"),
        ("block", {"weight_scale": torch.ones(1)}, r"weight_scale: got shape \[1\], want \[2, 2\]"),
        ("block", {"weight_scale": torch.ones(1, 4)}, r"weight_scale: got shape \[1, 4\]"),
        ("tensor", {"weight_scale": torch.ones(192, 1)}, r"weight_scale: got shape \[192, 1\]"),
    ],
)
def test_refuses_other_state_dicts(
    granularity: str, change: dict[str, Tensor], message: str
) -> None:
    """A block's scales may have as many elements as a row's: shapes decide, not sizes."""
    module = made(granularity)
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(module.state_dict() | change)


def test_refuses_what_has_no_fp8_form() -> None:
    linear = nn.Linear(8, 8)
    with torch.no_grad():
        linear.weight[3, 3] = torch.inf
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        FP8Linear.from_linear(linear)
    with pytest.raises(ValueError, match="granularity: got 'column'"):
        FP8Linear(8, 8, granularity="column")
    with pytest.raises(TypeError, match="weight: got dtype torch.float32"):
        FP8Linear(8, 8).set_weight(torch.ones(8, 8), torch.ones(8, 1))


# ---- gradients of FP8Linear ----


@pytest.mark.parametrize("quantize_activation", [None, True], ids=["weight-only", "activations"])
def test_input_gradient_is_the_dequantized_weights(
    granularity: str, quantize_activation: bool | None
) -> None:
    """Rounding x to FP8 is passed straight through."""
    module = made(granularity, quantize_activation=quantize_activation)
    dense = nn.Linear(160, 192)
    dense.weight.data = module.dequantize()
    grad = torch.randn(2, 5, 192)
    grads = []
    for m in (module, dense):
        torch.manual_seed(1)
        x = torch.randn(2, 5, 160, requires_grad=True)
        m(x).backward(grad)
        assert m.bias.grad is not None
        grads.append((x.grad, m.bias.grad))
    for got, expected in zip(*grads, strict=True):
        assert relative_error(got, expected) < FP32
    assert module.weight.grad is None


def test_compiles_with_its_gradient(granularity: str) -> None:
    module, grads, outs = made(granularity), [], []
    for m in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        x = torch.linspace(-1, 1, 480).view(3, 160).requires_grad_()
        outs.append(m(x))
        outs[-1].square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*outs) and relative_error(*grads) < FP32


def test_a_gradient_of_the_weight_is_an_error() -> None:
    module, x = made("row"), torch.randn(2, 160, requires_grad=True)
    module.weight.requires_grad_(True)
    with pytest.raises(NotImplementedError, match="an FP8 weight has no gradient; freeze it"):
        module(x).sum().backward()
