"""Tests of KV caches in FP8 (e4m3 with k_scale and v_scale): both ops, KVCache and the model."""

from __future__ import annotations

import dataclasses
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
backends = pytest.mark.parametrize("backend", ["reference", "cpu"])


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
        ("v_scale", torch.ones(2 * HKV)[::2], ValueError),
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
@backends
def test_f40_opcheck(op: str, backend: str) -> None:
    overload, _ = registered_arguments(op)
    arguments = fp8_example(op)
    with lf.use_backend(backend):
        torch.library.opcheck(
            overload,
            tuple(arguments[a.name] for a in overload._schema.arguments),
            # Not test_schema: it compares inputs before and after with allclose, which lacks FP8.
            test_utils=["test_faketensor"],
        )


@ops
@backends
def test_f40_compiles_whole(op: str, backend: str) -> None:
    fixed = {n: v for n, v in fp8_example(op).items() if not isinstance(v, Tensor)}

    def run(**tensors: Tensor) -> Tensor:
        return getattr(lf, op)(**tensors, **fixed)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    tensors = {n: v for n, v in fp8_example(op).items() if isinstance(v, Tensor)}
    with torch.inference_mode(), lf.use_backend(backend):
        copies = {n: v.clone() for n, v in tensors.items()}
        assert torch.equal(compiled(**tensors), run(**copies))
        for n in ("k_cache", "v_cache"):
            assert torch.equal(tensors[n].view(torch.uint8), copies[n].view(torch.uint8))


# ---- what they mean ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@backends
def test_append_quantizes_what_it_would_have_written(
    isa: str, backend: str, dtype: torch.dtype
) -> None:
    arguments = fp8_example("apply_rope_and_append", slots=torch.tensor([3, -1, 0, 15, 7, 9]))
    arguments["v"][0, 0, :3] = torch.tensor([1e4, -1e4, float("nan")])
    arguments |= {name: arguments[name].to(dtype) for name in "qkv"}
    plain = {
        **arguments,
        "k_cache": torch.zeros(2, 8, HKV, 16, dtype=dtype),
        "v_cache": torch.zeros(2, 8, HKV, 16, dtype=dtype),
        "k_scale": None,
        "v_scale": None,
    }
    before = arguments["k_cache"].clone()
    with lf.use_backend(backend):
        assert torch.equal(lf.apply_rope_and_append(**arguments), lf.apply_rope_and_append(**plain))
    for name, scale in (("k_cache", arguments["k_scale"]), ("v_cache", arguments["v_scale"])):
        want = (plain[name].float() / scale[:, None]).clamp(-448, 448).to(FP8).view(torch.uint8)
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


@pytest.mark.parametrize("d", [8, 64, 72, 96, 128])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_append_equals_the_reference(
    isa: str, dtype: torch.dtype, interleaved: bool, d: int
) -> None:
    """Compare caches of any strides byte by byte, with what lies around the heads' elements."""
    tokens, table = 40, lf.rope_table(1e4, 64, head_dim=d)
    q, k, v = (torch.randn(tokens, n, d).to(dtype) for n in (4, 3, 3))
    k[5, 1, 3], k[6, 2], v[7, 0, 1], v[9, 2] = float("nan"), 1e4, float("inf"), 0.0
    scales = {"k_scale": torch.tensor([0.004, 0.3, 7.0]), "v_scale": torch.tensor([0.011])}
    slots = torch.randperm(48)[:tokens]
    slots[3] = -1
    results = []
    for backend in ("cpu", "reference"):
        pool = torch.full((2, 6, 3, 8, 2 * d), 7, dtype=torch.uint8).view(FP8)
        caches = pool[0].transpose(1, 2)[..., 3 : d + 3], pool[1].transpose(1, 2)[..., :d]
        with lf.use_backend(backend):
            given = (q, k, v, torch.arange(tokens), table, *caches, slots)
            out = lf.apply_rope_and_append(*given, interleaved=interleaved, **scales)
        codes = pool.view(torch.uint8)
        results.append((out.nan_to_num(9.0), codes.where(codes != 255, 127)))  # NaN of any sign
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sq", [1, 25], ids=["decode", "prefill"])
def test_every_e4m3_value_comes_back(isa: str, dtype: torch.dtype, sq: int) -> None:
    """Attend to one key: the result is its values times v_scale, NaN only where a value is."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).view(1, 1, 2, 128)
    q, length = torch.randn(1, sq, 4, 128).to(dtype), torch.ones(1, dtype=torch.int32)
    scales = {"k_scale": torch.ones(1), "v_scale": torch.ones(1) / 4}
    out = lf.attention_with_kvcache(
        q, torch.zeros_like(codes), codes, length, causal=False, **scales
    )
    want = (codes.float() / 4).nan_to_num(1e9).repeat_interleave(2, 2).expand(1, sq, 4, 128)
    assert torch.equal(out.float().nan_to_num(1e9), want)


@pytest.mark.parametrize("sq", [1, 25], ids=["decode", "prefill"])
@pytest.mark.parametrize("value", [-0.7, 0.37, 0.0, 1e-44], ids=str)
def test_k_scale_of_any_sign_and_size(isa: str, sq: int, value: float) -> None:
    q, k, v = torch.randn(1, sq, 8, 64), torch.randn(1, 140, 2, 64), torch.randn(1, 140, 2, 64)
    given = (q, k.to(FP8), v.to(FP8), torch.tensor([131], dtype=torch.int32))
    scales = {"k_scale": torch.tensor([value]), "v_scale": torch.tensor([1.7, 0.02])}
    ours = lf.attention_with_kvcache(*given, **scales)
    with lf.use_backend("reference"):
        torch.testing.assert_close(ours, lf.attention_with_kvcache(*given, **scales))


@pytest.mark.parametrize("power", [-100, -60, 40, 120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_queries_of_any_size(isa: str, power: int, dtype: torch.dtype) -> None:
    """Scale queries and k_scale by opposite powers of two: no bit changes."""
    q, k, v = torch.randn(1, 1, 4, 32), torch.randn(1, 100, 2, 32), torch.randn(1, 100, 2, 32)
    q = (q / q.abs().max() * 3.5).to(dtype)
    q[0, 0, 1] = 0.0
    length, one = torch.tensor([100], dtype=torch.int32), torch.ones(1)
    caches = (k.to(FP8), v.to(FP8), length)
    want = lf.attention_with_kvcache(q, *caches, k_scale=one, v_scale=one)
    scaled = q * 2.0**power, one * 2.0**-power
    out = lf.attention_with_kvcache(scaled[0], *caches, k_scale=scaled[1], v_scale=one)
    assert torch.equal(out, want)


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
    logits = []
    for backend, dtype in (("cpu", FP8), ("reference", FP8), ("cpu", torch.float32)):
        scale = 0.01 if dtype == FP8 else None
        cache = KVCache(CONFIG, 20, dtype=dtype, k_scale=scale, v_scale=scale)
        with lf.use_backend(backend):
            for part in (tokens[:, :9], tokens[:, 9:10], tokens[:, 10:]):
                last = model(part, cache=cache)
        logits.append(last)
        assert cache.seqlens == [12]
    errors = [float((x - logits[2]).norm() / logits[2].norm()) for x in logits[:2]]
    assert 0 < errors[0] < 0.05
    # An fp32 ulp moves a key or value across a rounding of e4m3 (1 / 16 of it) now and then.
    assert errors[0] == pytest.approx(errors[1], rel=0.2)


def test_scales_not_given_are_measured_on_the_first_tokens(one_thread: None) -> None:
    """Take the amax of a plain cache after the same tokens: twice that is 448 times the scale."""
    model = lf.Llama.from_config(CONFIG, dtype=torch.float32)
    tokens, k_scale = torch.randint(0, 128, (1, 9)), torch.tensor([[0.5], [2.0]])
    plain = KVCache(CONFIG, 64, dtype=torch.float32)
    model(tokens, cache=plain)
    for given in (None, k_scale):
        cache = KVCache(CONFIG, 64, 2, dtype=FP8, k_scale=given)
        view = cache.select([1])
        model(tokens, cache=view)
        assert (plain.k[0, 0, :9].abs().amax((0, 2)) != plain.k[1, 0, :9].abs().amax((0, 2))).all()
        for name, pool in (("k_scale", plain.k), ("v_scale", plain.v)):
            for layer in range(2):
                want = pool[layer, 0, :9].abs().amax(dim=(0, 2)) * 2 / 448
                if name == "k_scale" and given is not None:
                    want = given[layer]
                # Layer 1's keys are over layer 0's rounded ones.
                torch.testing.assert_close(
                    cache.scales(layer)[name], want, rtol=1e-5 if layer == 0 else 0.1, atol=0
                )
        before = cache.v_scale.clone()
        model(tokens[:, :1].repeat(2, 1), cache=cache)
        assert torch.equal(cache.v_scale, before)
        cache.clear()
        model(tokens[:, :1], cache=cache.select([0]))
        assert not torch.equal(cache.v_scale, before)


def test_heads_without_an_amax_keep_the_scale_1() -> None:
    cache = KVCache(CONFIG, 20, dtype=FP8)
    k = torch.ones(3, 2, 16)
    k[:, 0], k[1, 1, 3] = 0.0, float("nan")
    cache.measure(1, k, torch.full((3, 2, 16), 1e-44))
    assert cache.scales(1)["k_scale"].tolist() == [1.0, 1.0]
    assert (cache.scales(1)["v_scale"] == torch.finfo(torch.float32).tiny).all()
    assert cache.measures(0) and not cache.measures(1)


@pytest.mark.parametrize("speculate", [None, "lookup"])
def test_generate_with_an_fp8_cache(
    one_thread: None, speculate: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generate the tokens that the model gives over an FP8 KVCache with the same scales."""
    model = lf.Llama.from_config(CONFIG, dtype=torch.float32)
    prompt = torch.randint(0, 128, (1, 9))
    cache = KVCache(CONFIG, 40, dtype=FP8)
    want = [int(model(prompt, cache=cache)[0, -1].argmax())]
    while len(want) < 20:
        want.append(int(model(torch.tensor([[want[-1]]]), cache=cache)[0, -1].argmax()))
    options = {"temperature": 0.0, "stop_ids": (), "speculate": speculate}
    given = prompt.tolist()
    assert model.generate(given, 20, kv_cache="fp8", **options) == [want]
    with pytest.raises(ValueError, match="kv_cache: got 'int8'"):
        model.generate(given, 20, kv_cache="int8")
    # The checkpoint's scales come before measured ones. These saturate nearly everything.
    scales = {name: torch.full((2, 2), 1e-6) for name in ("k_scale", "v_scale")}
    model.weights = dataclasses.replace(model.weights, **scales)
    assert model.generate(given, 20, kv_cache="fp8", **options) != [want]
