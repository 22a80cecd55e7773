"""torch's default dtype and device are the program's, not the model's: with others, whole runs give
the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import llama_fast as lf
from llama_fast import Llama
from llama_fast.generation import generate, graphs
from llama_fast.generation.cache import KVCache
from llama_fast.nn import FP8Linear

from ..support.checkpoints import hf_model, quantized, save
from ..support.recorded_graph import RecordedGraph

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[1, 5, 9, 5, 9, 5], [1, 7]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(hf_model(max_position_embeddings=256), tmp_path_factory.mktemp("defaults"))


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS: dict[str, Callable[[], Any]] = {
    "bfloat16": default_dtype,
    "meta": lambda: torch.device("meta"),  # stands for cuda: nothing computed on it has values
}


def run(folder: Path, quantize: str | None) -> list[Any]:
    model = Llama.from_pretrained(folder, torch.float32, quantize, device="cpu")
    random = Llama.from_config(model.config, dtype=torch.float32, quantize=quantize, device="cpu")
    tokens = torch.tensor([PROMPTS[0]], device="cpu")
    cache = KVCache(model.config, 9, device="cpu", dtype=torch.float32)
    out: list[Any] = [
        m(tokens, cache=c) for m, c in ((model, None), (model, cache), (random, None))
    ]
    for options in (
        {"temperature": 0},
        {"seed": 1},
        {"seed": 1, "top_k": 3},
        {"temperature": 0, "speculate": "lookup"},
        {"temperature": 0, "speculate": random},
    ):
        out.append(model.generate(PROMPTS, max_new_tokens=5, **options))
    return out


@pytest.mark.parametrize("quantize", [None, "fp8", "fp8_ffn"])
@pytest.mark.parametrize("default", DEFAULTS)
def test_a_whole_run(folder: Path, default: str, quantize: str | None) -> None:
    expected = run(folder, quantize)
    with DEFAULTS[default]():
        got = run(folder, quantize)
    for ours, want in zip(got, expected, strict=True):
        assert torch.equal(ours, want) if isinstance(want, torch.Tensor) else ours == want


@pytest.mark.parametrize("default", DEFAULTS)
def test_the_loop_of_gpus(folder: Path, default: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "_runs_ahead", lambda device: True)
    monkeypatch.setattr(graphs, "cannot_capture", lambda device: None)
    monkeypatch.setattr(graphs, "CudaGraph", RecordedGraph)
    model = Llama.from_pretrained(folder, torch.float32, device="cpu")
    settings: list[dict[str, Any]] = [{"temperature": 0}, {"seed": 1}]
    expected = [model.generate(PROMPTS, max_new_tokens=5, **options) for options in settings]
    model.decoders.clear()
    with DEFAULTS[default]():
        assert [model.generate(PROMPTS, max_new_tokens=5, **o) for o in settings] == expected


@pytest.mark.parametrize("default", DEFAULTS)
def test_stored_fp8_and_modules(folder: Path, tmp_path: Path, default: str) -> None:
    stored = save(hf_model(max_position_embeddings=256), tmp_path)
    quantized(stored, "row", "weight_scale", quant_method="fbgemm_fp8")
    tokens = torch.tensor([PROMPTS[0]])
    expected = Llama.from_pretrained(stored, torch.float32)(tokens)
    linear = torch.nn.Linear(64, 64)
    x = torch.randn(3, 64)
    want = FP8Linear.from_linear(linear)(x)
    table = lf.rope_table(5e5, 9, head_dim=16)
    with DEFAULTS[default]():
        assert torch.equal(
            Llama.from_pretrained(stored, torch.float32, device="cpu")(tokens), expected
        )
        assert torch.equal(FP8Linear.from_linear(linear)(x), want)
        assert torch.equal(lf.rope_table(5e5, 9, head_dim=16, device="cpu"), table)
        on = lf.rope_table(5e5, 9, head_dim=16)
        assert on.device.type == ("meta" if default == "meta" else "cpu")
        assert on.dtype == torch.float32
