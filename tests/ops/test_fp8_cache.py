"""Tests of KV caches in FP8 (e4m3 with k_scale and v_scale): both ops, KVCache and the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import llama_fast as lf
from llama_fast.generation.cache import KVCache

from ..support.op_examples import HKV, described, example, fp8, registered_arguments, x

FP8 = torch.float8_e4m3fn
CACHED = ["apply_rope_and_append", "attention_with_kvcache"]
ops = pytest.mark.parametrize("op", CACHED)


def fp8_example(op: str, **replaced: Any) -> dict[str, Any]:
    arguments = example(op)
    shape = arguments["k_cache"].shape
    scales = {"k_scale": torch.tensor([0.5]), "v_scale": torch.tensor([0.02, 3.0])}
    return {**arguments, "k_cache": fp8(*shape), "v_cache": fp8(*shape), **scales, **replaced}


# ---- arguments ----


@ops
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("k_scale", None, ValueError),
        ("v_scale", None, ValueError),
        ("k_scale", 0.5, TypeError),
        ("k_scale", torch.ones(1).half(), TypeError),
        ("v_scale", torch.ones(1, 1), ValueError),
        ("v_scale", torch.ones(HKV + 1), ValueError),
        ("v_scale", torch.tensor(1.0), ValueError),
        ("k_scale", torch.ones(1, device="meta"), ValueError),
        ("v_cache", x(2, 8, HKV, 16), TypeError),
        ("v_cache", fp8(2, 9, HKV, 16), ValueError),
        ("k_cache", fp8(2, 8, 16), ValueError),
    ],
    ids=described,
)
def test_bad_argument_is_named(op: str, name: str, value: Any, error: type[Exception]) -> None:
    with lf.use_backend("reference"), pytest.raises(error, match=f"^{name}: got .* want "):
        getattr(lf, op)(**fp8_example(op, **{name: value}))


def test_scales_without_an_fp8_cache_are_refused() -> None:
    for op in CACHED:
        for name in ("k_scale", "v_scale"):
            with pytest.raises(ValueError, match=f"^{name}: got a scale for a float32 "):
                getattr(lf, op)(**{**example(op), name: torch.ones(1)})


@ops
def test_the_compiled_backend_says_what_to_use_instead(op: str) -> None:
    with pytest.raises(
        NotImplementedError, match=rf'{op}: .*use_backend\("reference", op="{op}"\)'
    ):
        getattr(lf, op)(**fp8_example(op))


@ops
def test_f40_opcheck(op: str) -> None:
    overload, _ = registered_arguments(op)
    arguments = fp8_example(op)
    with lf.use_backend("reference"):
        torch.library.opcheck(
            overload,
            tuple(arguments[a.name] for a in overload._schema.arguments),
            # Not test_schema: it compares inputs before and after with allclose, which lacks FP8.
            test_utils=["test_faketensor"],
        )


@ops
def test_f40_compiles_whole(op: str) -> None:
    fixed = {n: v for n, v in fp8_example(op).items() if not isinstance(v, Tensor)}

    def run(**tensors: Tensor) -> Tensor:
        return getattr(lf, op)(**tensors, **fixed)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    tensors = {n: v for n, v in fp8_example(op).items() if isinstance(v, Tensor)}
    with torch.inference_mode(), lf.use_backend("reference"):
        copies = {n: v.clone() for n, v in tensors.items()}
        assert torch.equal(compiled(**tensors), run(**copies))
        for n in ("k_cache", "v_cache"):
            assert torch.equal(tensors[n].view(torch.uint8), copies[n].view(torch.uint8))


# ---- what they mean ----


def test_append_quantizes_what_it_would_have_written() -> None:
    arguments = fp8_example("apply_rope_and_append", slots=torch.tensor([3, -1, 0, 15, 7, 9]))
    arguments["v"][0, 0, :3] = torch.tensor([1e4, -1e4, float("nan")])
    plain = {
        **arguments,
        "k_cache": torch.zeros(2, 8, HKV, 16),
        "v_cache": torch.zeros(2, 8, HKV, 16),
        "k_scale": None,
        "v_scale": None,
    }
    before = arguments["k_cache"].clone()
    with lf.use_backend("reference"):
        assert torch.equal(lf.apply_rope_and_append(**arguments), lf.apply_rope_and_append(**plain))
    for name, scale in (("k_cache", arguments["k_scale"]), ("v_cache", arguments["v_scale"])):
        want = (plain[name] / scale[:, None]).clamp(-448, 448).to(FP8).view(torch.uint8)
        got = arguments[name].view(torch.uint8)
        for slot in (3, 0, 15, 7, 9):
            assert torch.equal(got[slot // 8, slot % 8], want[slot // 8, slot % 8])
    assert arguments["v_cache"].float()[0, 3, 0, :2].tolist() == [448.0, -448.0]
    assert arguments["v_cache"].float()[0, 3, 0, 2].isnan()
    unwritten = arguments["k_cache"].view(torch.uint8)[1, 2:7], before.view(torch.uint8)[1, 2:7]
    assert torch.equal(*unwritten)


def test_attention_equals_that_over_the_dequantized_cache() -> None:
    a = fp8_example("attention_with_kvcache")
    k = a["k_cache"].float() * a["k_scale"][:, None]
    v = a["v_cache"].float() * a["v_scale"][:, None]
    with lf.use_backend("reference"):
        out = lf.attention_with_kvcache(**a)
        plain = {**a, "k_cache": k, "v_cache": v, "k_scale": None, "v_scale": None}
        assert torch.equal(out, lf.attention_with_kvcache(**plain))


# ---- KVCache and the model ----

CONFIG = lf.LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=128,
    max_position_embeddings=64,
)


def test_kvcache_scales() -> None:
    cache = KVCache(CONFIG, 20, dtype=FP8, k_scale=0.5, v_scale=torch.rand(2, 2))
    assert cache.k.dtype == FP8 and cache.scales(1)["k_scale"].tolist() == [0.5]
    assert torch.equal(cache.select([0]).scales(1)["v_scale"], cache.v_scale[1])
    assert KVCache(CONFIG, 20).scales(0) == {"k_scale": None, "v_scale": None}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("k_scale", {"dtype": FP8}),
        ("v_scale", {"dtype": FP8, "k_scale": 1.0}),
        ("k_scale", {"k_scale": 1.0}),
        ("v_scale", {"v_scale": 1.0}),
        ("k_scale", {"dtype": FP8, "k_scale": 0.0, "v_scale": 1.0}),
        ("k_scale", {"dtype": FP8, "k_scale": float("nan"), "v_scale": 1.0}),
        ("v_scale", {"dtype": FP8, "k_scale": 1.0, "v_scale": torch.ones(2)}),
        ("v_scale", {"dtype": FP8, "k_scale": 1.0, "v_scale": torch.ones(2, 2).double()}),
    ],
    ids=str,
)
def test_kvcache_refuses(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got .* want "):
        KVCache(CONFIG, 20, **options)


def test_the_model_over_an_fp8_cache(one_thread: None) -> None:
    model = lf.Llama.from_config(CONFIG, dtype=torch.float32)
    tokens = torch.randint(0, 128, (1, 12))
    fp8_cache = KVCache(CONFIG, 20, dtype=FP8, k_scale=0.01, v_scale=0.01)
    plain = KVCache(CONFIG, 20, dtype=torch.float32)
    with lf.use_backend("reference"):
        for part in (tokens[:, :9], tokens[:, 9:10], tokens[:, 10:]):
            got, want = model(part, cache=fp8_cache), model(part, cache=plain)
    error = (got - want).norm() / want.norm()
    assert 0 < error < 0.05
    assert fp8_cache.seqlens == [12]
    with pytest.raises(NotImplementedError, match="the cpu backend has no FP8 KV cache"):
        model(tokens[:, :1], cache=fp8_cache)
