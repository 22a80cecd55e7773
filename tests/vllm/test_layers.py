"""Tests of each layer that the plugin serves, without an engine, against vLLM's own or fp32."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="make test-vllm installs vLLM")

from vllm import ir
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels.linear import (
    FP8ScaledMMLinearLayerConfig,
    init_fp8_linear_kernel,
)
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.quantization.utils import quant_utils
from vllm.model_executor.layers.quantization.utils.fp8_utils import (
    process_fp8_weight_tensor_strategy,
)
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backend import CommonAttentionMetadata

import llama_fast.vllm as plugin
from llama_fast import reference
from llama_fast.vllm import attention, layers, linear

load_general_plugins()

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def config() -> Iterator[VllmConfig]:
    config = VllmConfig()
    config.model_config = SimpleNamespace(dtype=torch.bfloat16)  # all that attention reads of it
    with set_current_vllm_config(config), torch.no_grad():
        yield config


def close(actual: Tensor, expected: Tensor, ulps: float) -> None:
    """Compare in ulps of actual's dtype at the largest expected value."""
    ulp = torch.finfo(actual.dtype).eps * expected.abs().max().item()
    assert (actual.double() - expected.double()).abs().max().item() <= ulps * ulp


def test_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_FAST_VLLM", "off")
    with pytest.raises(ValueError, match="LLAMA_FAST_VLLM: got 'off', want 0 or 1"):
        plugin.register()


def test_without_a_hook_vllm_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(linear.vllm_kernels, "_POSSIBLE_FP8_KERNELS")
    monkeypatch.setattr(plugin, "_registered", {"layers", "attention"})
    monkeypatch.setattr(plugin.logger, "propagate", True)
    plugin.register()
    assert "keeps its own linear: AttributeError" in caplog.text
    assert plugin._registered == {"layers", "attention"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_have_priority_and_match(dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 5, 64, dtype=dtype)
    weight = torch.randn(64, dtype=dtype)
    for op, args in (
        (ir.ops.rms_norm, (x, weight, 1e-5)),
        (ir.ops.fused_add_rms_norm, (x, residual, weight, 1e-5)),
    ):
        with op.set_priority(["llama_fast", "native"]):
            assert op.dispatch(*args).provider == "llama_fast"
            assert op.dispatch(*args[:-1], 1e-5, 32).provider == "native"  # part of the row
            actual = op(*args)
        with op.set_priority(["native"]):
            expected = op(*args)
        # vLLM normalizes the sum before it is rounded, and we after: an ulp of the row's sum,
        # and an ulp each for the two roundings that follow.
        pairs = (
            zip(actual, expected, strict=True)
            if isinstance(actual, tuple)
            else [(actual, expected)]
        )
        for a, e in pairs:
            close(a, e, 3)


def test_platform_lists_our_norms_first(config: VllmConfig) -> None:
    from vllm.platforms import current_platform

    priority = current_platform.get_default_ir_op_priority(config)
    assert priority.rms_norm == ["llama_fast", "native"]
    assert priority.fused_add_rms_norm == ["llama_fast", "native"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_and_mul(dtype: torch.dtype) -> None:
    layer = SiluAndMul()
    assert isinstance(layer, layers.FastSiluAndMul)
    x = torch.randn(7, 96, dtype=dtype)
    for forward in (layer, layer.forward_native, layer.forward_cpu):
        assert torch.equal(forward(x), reference.silu_and_mul(x)) or dtype == torch.float32
        close(forward(x), SiluAndMul.forward_native(x), 2)
    assert torch.equal(layer(x.double()), SiluAndMul.forward_native(x.double()))  # vLLM's


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    "parameters", [{"rope_type": "default"}, LLAMA3], ids=("default", "llama3")
)
@pytest.mark.parametrize("neox", (True, False))
def test_rotary(parameters: dict[str, Any], neox: bool) -> None:
    """In fp32 against vLLM's; in bf16 the table stays in fp32, so it is nearer to fp32's result."""
    results = {}
    positions = torch.tensor([0, 3, 1000, 900, 1])
    q, k = torch.randn(5, 6 * 64), torch.randn(5, 2 * 64)
    for dtype in DTYPES:
        layer = get_rope(64, 1024, neox, {"rope_theta": 5e5, **parameters}, dtype)
        assert isinstance(layer, layers._FastRotary)
        results[dtype] = layer(positions, q.to(dtype), k.to(dtype))
        native = type(layer).__mro__[2].forward_native  # RotaryEmbedding's
        expected = (
            native(layer, positions, q.clone(), k.clone()) if dtype == torch.float32 else None
        )
        if expected is not None:
            for a, e in zip(results[dtype], expected, strict=True):
                close(a, e, 4)
    for a, q_or_k, e in zip(results[torch.bfloat16], (q, k), results[torch.float32], strict=True):
        assert a.shape == q_or_k.shape
        close(a, e, 1)  # q and k rounded, then the result
    query_only = layer(positions, q.bfloat16(), None)  # left to vLLM
    assert query_only[1] is None


def fp8_layer(
    kernel: Any, weight: Tensor, scale: Tensor, *, name: str, blocks: bool
) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight if blocks else weight.t(), requires_grad=False)
    setattr(layer, name, torch.nn.Parameter(scale, requires_grad=False))
    kernel.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "granularity, n", [("tensor", 192), ("row", 192), ("row", 100), ("block", 256), ("block", 300)]
)
def test_fp8_linear(granularity: str, n: int, dtype: torch.dtype) -> None:
    """A scale per tensor, row or block, in vLLM's orders of the weight, packed or not."""
    k = 256
    plain = torch.randn(n, k)
    by = "block_2d" if granularity == "block" else granularity
    weight, scale = reference.quantize_fp8(plain, by)
    keys = {
        "tensor": (quant_utils.kFp8StaticTensorSym, quant_utils.kFp8DynamicTensorSym),
        "row": (quant_utils.kFp8StaticChannelSym, quant_utils.kFp8DynamicTokenSym),
        "block": (quant_utils.kFp8Static128BlockSym, quant_utils.kFp8Dynamic128Sym),
    }
    weight_key, activation_key = keys[granularity]
    kernel = init_fp8_linear_kernel(activation_key, weight_key, dtype, dtype, (n, k))
    assert isinstance(kernel, linear.FastFP8LinearKernel)
    layer = fp8_layer(
        kernel,
        weight,
        scale,
        name="weight_scale_inv" if granularity == "block" else "weight_scale",
        blocks=granularity == "block",
    )
    x, bias = torch.randn(3, k, dtype=dtype), torch.randn(n, dtype=dtype)
    expected = x.float() @ reference.dequantize_fp8(weight, scale).t()
    close(kernel.apply_weights(layer, x), expected, 4)
    close(kernel.apply_weights(layer, x, bias), expected + bias, 4)


@pytest.mark.parametrize("scales", ([0.5, 2.0], [0.5, torch.finfo(torch.float32).min]))
def test_fused_layers_keep_the_scale_of_each_tensor(scales: list[float]) -> None:
    """vLLM marks a scale that the checkpoint lacks by the smallest float."""
    weight = torch.randn(192, 64).to(torch.float8_e4m3fn)
    loaded, scale, _ = process_fp8_weight_tensor_strategy(
        weight, torch.tensor(scales), [128, 64], None
    )
    keys = quant_utils.kFp8DynamicTensorSym, quant_utils.kFp8StaticTensorSym
    kernel = init_fp8_linear_kernel(*keys, torch.float32, torch.float32, (192, 64))
    layer = fp8_layer(kernel, loaded.t(), scale, name="weight_scale", blocks=False)
    x = torch.randn(2, 64)
    rows = torch.tensor([0.5] * 128 + [2.0 if scales[1] > 0 else 0.5] * 64)[:, None]
    close(kernel.apply_weights(layer, x), x @ (weight.float() * rows).t(), 8)


def test_what_the_fp8_kernel_refuses() -> None:
    def refused(**changes: Any) -> str:
        fields = {
            "weight_quant_key": quant_utils.kFp8StaticTensorSym,
            "activation_quant_key": quant_utils.kFp8DynamicTensorSym,
            "weight_shape": (64, 64),
            "input_dtype": torch.bfloat16,
            "out_dtype": torch.bfloat16,
        }
        served, why = linear.FastFP8LinearKernel.can_implement(
            FP8ScaledMMLinearLayerConfig(**{**fields, **changes})
        )
        assert served == (why is None)
        return why or ""

    assert refused() == ""
    shape = quant_utils.GroupShape(64, 128)
    small = quant_utils.create_fp8_quant_key(static=True, group_shape=shape)
    assert "128 x 128" in refused(weight_quant_key=small)
    assert "float64" in refused(input_dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", (192, 100))
@pytest.mark.parametrize("remove_weight", (True, False))
def test_unquantized_linear(n: int, dtype: torch.dtype, remove_weight: bool) -> None:
    """A head's weight stays as it is: the embedding may be tied to it."""
    layer, weight = torch.nn.Module(), torch.randn(n, 64, dtype=dtype)
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight)
    assert remove_weight or torch.equal(layer.weight, weight)
    x, bias = torch.randn(3, 64, dtype=dtype), torch.randn(n, dtype=dtype)
    for given in (None, bias):
        expected = torch.nn.functional.linear(x.double(), weight.double()) + (
            0 if given is None else given
        )
        close(layer.cpu_linear(x, layer.weight, given), expected, 4)


def test_other_weights_are_left_to_vllm() -> None:
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.randn(8, 1, 4), requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, True)
    assert not hasattr(layer, "cpu_linear")


BLOCK_SIZE = 32


def attend(
    dtype: torch.dtype, earlier: list[int], queries: list[int], *, impl: Any = None
) -> tuple[Tensor, Tensor]:
    """Run a batch through the backend, and each of its sequences through the reference."""
    heads, kv_heads, d = 6, 2, 64
    impl = impl or attention.Impl(heads, d, d**-0.5, kv_heads, None, None, "auto")
    total, lengths = sum(queries), [e + n for e, n in zip(earlier, queries, strict=True)]
    width = -(-max(lengths) // BLOCK_SIZE)
    blocks = width * len(queries) + 1
    cache = torch.full((blocks, kv_heads, BLOCK_SIZE, 2 * d), torch.nan, dtype=dtype)
    table = torch.randperm(blocks)[:-1].view(len(queries), width).int()
    k, v = (torch.randn(sum(lengths), kv_heads, d, dtype=dtype) for _ in range(2))
    at = [torch.arange(length) for length in lengths]
    slots = [
        row[t // BLOCK_SIZE] * BLOCK_SIZE + t % BLOCK_SIZE for row, t in zip(table, at, strict=True)
    ]
    # Padding after the last token: vLLM marks it with slot -1.
    slots = torch.cat([*slots, torch.tensor([-1])]).long()
    padded = [torch.cat((t, t[:1])) for t in (k, v)]
    impl.do_kv_cache_update(SimpleNamespace(), *padded, cache, slots)
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    builder = SimpleNamespace(served=True)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(lengths).int(),
        num_reqs=len(queries),
        num_actual_tokens=total,
        max_query_len=max(queries),
        max_seq_len=max(lengths),
        block_table_tensor=table,
        slot_mapping=slots,
    )
    metadata = attention.Builder.build(builder, 0, common)
    q, out = torch.randn(total + 1, heads, d, dtype=dtype), torch.zeros(total + 1, heads, d)
    out = out.to(dtype)
    impl.forward(SimpleNamespace(), q, k, v, cache, metadata, out)
    assert (out[total:] == 0).all()
    parts = zip(q[:total].split(queries), k.split(lengths), v.split(lengths), strict=True)
    expected = [reference.attention(*(t[None].double() for t in part))[0] for part in parts]
    return out[:total], torch.cat(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "earlier, queries",
    [
        ([70], [1]),
        ([40, 0, 7, 31], [1, 1, 1, 1]),
        ([0, 0], [33, 50]),
        ([9, 80, 0, 64], [1, 1, 45, 45]),
        ([64, 3, 10], [5, 5, 70]),
    ],
    ids=("decode", "batch", "prefill", "mixed", "chunks"),
)
def test_attention(dtype: torch.dtype, earlier: list[int], queries: list[int]) -> None:
    actual, expected = attend(dtype, earlier, queries)
    close(actual, expected, 2 if dtype == torch.bfloat16 else 8)


def test_attention_by_vllm_where_ours_does_not_fit() -> None:
    for changes in (
        {"sliding_window": 16},
        {"alibi_slopes": [0.1] * 6},
        {"logits_soft_cap": 30.0},
        {"sinks": torch.zeros(6)},
    ):
        options = {"alibi_slopes": None, "sliding_window": None, **changes}
        assert not attention.Impl(6, 64, 0.125, 2, kv_cache_dtype="auto", **options).served
