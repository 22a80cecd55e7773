"""Tests of the model on Triton's kernels against the eager twin, of graphs, streams and the host
that runs ahead. On a CPU, Triton's interpreter runs a tiny model, and graphs are recorded."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import llama_fast as lf
from llama_fast import KVCache, Llama, LlamaConfig
from llama_fast.checkpoint.weights import Linear
from llama_fast.generation import generate, graphs
from llama_fast.ops import linear as products
from llama_fast.reference import unpack_weight

from ..support.checkpoints import relative_error
from ..support.recorded_graph import RecordedGraph

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = LlamaConfig(160, 64, 96, 2, 4, 2, 16, max_position_embeddings=2048, eos_token_id=(2,))
LOGITS = 2e-5  # of the largest logit, fp32: other orders of summation through two layers


def moved(model: Llama, device: torch.device, dtype: torch.dtype | None = None) -> Llama:
    """Return the same weights on device as [N, K]: norms, embedding and plain linears in dtype."""
    dtype = dtype or model.dtype

    def place(value: Any) -> Any:
        if isinstance(value, Linear):
            weight = unpack_weight(value.weight)
            kept = weight.dtype if value.scale is not None else dtype
            scale = None if value.scale is None else value.scale.to(device)
            return dataclasses.replace(value, weight=weight.to(device, kept), scale=scale)
        if isinstance(value, Tensor):
            return value.to(device, dtype)
        if value is None:
            return None
        if isinstance(value, list):
            return [place(item) for item in value]
        fields = {f.name: place(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)

    return Llama(model.config, place(model.weights))


def tiny(device: torch.device, quantize: str | None = None, dtype: Any = torch.float32) -> Llama:
    return moved(Llama.from_config(TINY, quantize=quantize, dtype=dtype), device)


def prompts(*lengths: int) -> list[list[int]]:
    return [torch.randint(3, TINY.vocab_size, (n,)).tolist() for n in lengths]


@pytest.fixture
def runs_ahead(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[None]:
    """Make generate() take a GPU's path: on the GPU, or on CPU tensors with recorded graphs."""
    if device.type == "cpu":
        monkeypatch.setattr(generate, "_runs_ahead", lambda device: True)
        monkeypatch.setattr(graphs, "cannot_capture", lambda device: None)
        monkeypatch.setattr(graphs, "CudaGraph", RecordedGraph)
    yield


# ---- what the interpreter shows too ----


@pytest.mark.parametrize("quantize", [None, "fp8_all"], ids=["plain", "fp8"])
def test_logits_equal_the_eager_twin(device: torch.device, quantize: str | None) -> None:
    """Compare logits. Activations are not quantized, so that only the order of sums differs."""
    model = tiny(device, quantize)
    tokens = torch.randint(TINY.vocab_size, (2, 37), device=device)
    with pytest.MonkeyPatch.context() as patch, lf.use_backend("reference", "fp8_linear"):
        patch.setattr(products, "prefers_fp8_activations", lambda weight: False)
        ours = model(tokens)
        with lf.use_backend("reference"):
            expected = model(tokens)
    assert relative_error(ours.cpu(), expected.cpu()) <= LOGITS


@pytest.mark.parametrize("finds_runs", [False, True], ids=["blocks", "run"])
def test_cache_gives_what_no_cache_gives(device: torch.device, finds_runs: bool) -> None:
    model = tiny(device)
    tokens = torch.randint(TINY.vocab_size, (1, 70), device=device)
    with lf.use_backend("reference"):
        expected = model(tokens)
    cache = KVCache(TINY, 70, dtype=torch.float32, device=device, block_size=32)
    cache.finds_runs = finds_runs
    cache.k.fill_(torch.nan), cache.v.fill_(torch.nan)
    chunks = [model(chunk, cache=cache) for chunk in tokens.split([40, 1, 29], dim=1)]
    assert relative_error(torch.cat(chunks, dim=1).cpu(), expected.cpu()) <= LOGITS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_fused_quantization_changes_no_bit(device: torch.device, dtype: torch.dtype) -> None:
    """Compare the kernels that also quantize with those that do nothing else."""
    model = tiny(device, "fp8_all", dtype)
    tokens = torch.randint(TINY.vocab_size, (2, 7), device=device)
    if not products.prefers_fp8_activations(model.weights.head.weight):
        pytest.skip("fp8_linear does not quantize on this chip")
    fused = model(tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Linear, "wants_fp8", False)
        assert torch.equal(model(tokens), fused)


@pytest.mark.usefixtures("runs_ahead")
@pytest.mark.parametrize(
    ("options", "graphs"),
    [({"temperature": 0}, True), ({"temperature": 1.0, "seed": 3}, False)],
    ids=["greedy-graphs", "sampled-eager"],
)
def test_generates_what_the_eager_twin_does_on_a_cpu(
    device: torch.device, options: dict[str, Any], graphs: bool
) -> None:
    """Generate in fp32: the same seed gives the same tokens on every device. The longer prompt
    crosses into a new block. Four tokens take a warm-up, a capture and two replays."""
    model = tiny(device)
    batch = prompts(3, 127)
    with pytest.MonkeyPatch.context() as patch, lf.use_backend("reference"):
        patch.setattr(generate, "_runs_ahead", lambda device: False)
        expected = tiny(torch.device("cpu")).generate(batch, 4, stop_ids=(), **options)
    assert model.generate(batch, 4, stop_ids=(), graphs=graphs, **options) == expected


@pytest.mark.usefixtures("runs_ahead")
def test_f41_a_sequence_alone_and_in_a_batch(device: torch.device) -> None:
    """Compare FP8 linears, which are Triton kernels. cuBLAS does not promise it."""
    model = tiny(device, "fp8_all", torch.bfloat16)
    batch = prompts(5, 130, 30)
    together = model.generate(batch, 3, temperature=0, stop_ids=())
    assert together[1:2] == model.generate(batch[1:2], 3, temperature=0, stop_ids=())


def test_f47_a_bad_id_is_refused_or_nan(device: torch.device) -> None:
    model = tiny(device)
    for bad in (-1, TINY.vocab_size, 2**62):
        tokens = torch.tensor([[1, 2, 3], [4, bad, 5]], device=device)
        if device.type == "cpu":
            with pytest.raises(ValueError, match="tokens: got id"):
                model(tokens)
            continue
        logits = model(tokens)
        # The query before it also becomes NaN: it gives the bad token's value no weight, and 0 x
        # NaN is NaN.
        assert logits.isnan().any(-1).tolist() == [[False] * 3, [True] * 3]
        assert torch.equal(logits[:1], model(tokens[:1]))


# ---- what only hardware shows ----

SMALL = LlamaConfig(4096, 512, 1024, 4, 8, 2, 64, max_position_embeddings=8192, eos_token_id=())
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.9, "top_p": 1.0, "seed": 1},
    {"temperature": 0.9, "top_p": 0.8, "seed": 2},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 3},
]


def small(quantize: str | None = "fp8_all", dtype: torch.dtype = torch.bfloat16) -> Llama:
    return Llama.from_config(SMALL, quantize=quantize, dtype=dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("quantize", [None, "fp8_all", "fp8_ffn"], ids=["plain", "fp8", "fp8_ffn"])
def test_graphs_give_what_single_launches_give(quantize: str | None, dtype: torch.dtype) -> None:
    """Generate in several calls of other lengths and settings, so that most steps are replays."""
    model = small(quantize, dtype)
    for lengths in ((5, 700, 64), (1000, 3, 200), (17,), (800, 801, 802), (4,)):
        for options in OPTIONS:
            batch = prompts(*lengths)
            eager = model.generate(batch, 20, graphs=False, **options)
            assert model.generate(batch, 20, graphs=True, **options) == eager
    assert len(model.decoders) == 1


@pytest.mark.gpu
def test_sequences_stop_on_their_own() -> None:
    model = small()
    batch = prompts(*range(5, 14))  # nine: buckets 16, 8, 4, 2 and 1
    options = {"temperature": 1.0, "top_p": 1.0, "seed": 5}
    free = model.generate(batch, 60, graphs=False, **options)
    stops = [ids[5 * i] for i, ids in enumerate(free)]
    expected = model.generate(batch, 60, graphs=False, stop_ids=stops, **options)
    seen: list[list[int]] = [[] for _ in batch]
    for _ in range(2):
        got = model.generate(
            batch,
            60,
            stop_ids=stops,
            on_token=lambda i, token: seen[i].append(token),
            **options,
        )
        assert got == expected
    assert seen == [ids * 2 for ids in expected]


@pytest.mark.gpu
def test_no_step_waits_for_the_device() -> None:
    """Generate twice. After the call that compiles and captures, nothing may synchronize: torch
    raises if it does. (Waiting for a token's event is allowed.)"""
    model = small()
    for options in OPTIONS:
        model.generate(prompts(5, 300), 8, **options)
        batch = prompts(300, 7)
        expected = model.generate(batch, 8, **options)
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = model.generate(batch, 8, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert got == expected


@pytest.mark.gpu
def test_f18_the_callers_stream_counts() -> None:
    """Warm up, capture and replay on a side stream whose long earlier work makes the weights."""
    model = small()
    batch = prompts(30, 40)
    expected = model.generate(batch, 12, temperature=0)
    made = [w for layer in model.weights.layers for w in (layer.attention_norm, layer.ffn_norm)]
    kept = [w.clone() for w in made]
    model.decoders.clear()
    for _ in range(4):  # warm-up and capture, then replays
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.inference_mode():
            for w in made:
                w.zero_()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.inference_mode():
            torch.cuda._sleep(200_000_000)  # 0.1 s
            for w, value in zip(made, kept, strict=True):
                w.copy_(value)
            assert model.generate(batch, 12, temperature=0) == expected
        assert model.generate(batch, 12, temperature=0) == expected  # the default stream again


@pytest.mark.gpu
def test_f20_small_then_large_then_small() -> None:
    """Keep a small batch's graphs through a larger one's workspaces, in both decoders."""
    model = small()
    cases = [prompts(9), prompts(*[9] * 8), prompts(3000, 5), prompts(12), prompts(*[100] * 40)]
    expected = [model.generate(batch, 16, temperature=0, graphs=False) for batch in cases]
    model.decoders.clear()
    for order in ((0, 1, 0, 2, 0, 3, 4, 3, 1, 0), (4, 0, 2, 1, 0, 3)):
        for which in order:
            got = model.generate(cases[which], 16, temperature=0)
            junk = torch.full((1 << 26,), torch.nan, device="cuda")  # free memory is NaN now
            del junk
            assert got == expected[which]


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", ["None", "'fp8_all'"])
def test_f21_the_first_product_of_a_process_is_captured(
    quantize: str, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Generate first of all: the second step captures, and nothing has warmed up a library."""
    run_python(f"""
import llama_fast as lf
model = lf.Llama.from_config(lf.{SMALL}, quantize={quantize}, device="cuda")
first = model.generate([[1]], 12, temperature=0, graphs=True)
assert model.generate([[1]], 12, temperature=0, graphs=False) == first
""")


@pytest.mark.gpu
def test_memory_does_not_grow_with_the_calls() -> None:
    model = small()
    held = []
    for _ in range(6):
        model.generate(prompts(100, 200, 300), 10, temperature=0)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[2:] == held[2:3] * 4
    before = torch.cuda.memory_allocated()
    size = model.decoders[0].cache.k.nbytes * 2
    model.decoders.clear()
    assert torch.cuda.memory_allocated() <= before - size


@pytest.mark.gpu
def test_eager_twin_cannot_be_captured() -> None:
    model = small()
    with lf.use_backend("reference"):
        with pytest.raises(ValueError, match="graphs: got True, but attention_with_kvcache"):
            model.generate([[1]], 3, graphs=True)
        assert len(model.generate([[1]], 3, temperature=0)[0]) == 3


@pytest.mark.gpu
def test_f17_a_model_on_another_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = moved(small(), torch.device("cuda:1"))
    batch = prompts(5, 60)
    expected = model.generate(batch, 10, temperature=0, graphs=False)
    for _ in range(2):
        assert model.generate(batch, 10, temperature=0) == expected
