"""Tests of the fitted exponents, of the verdict on memory, and of how both are measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import llama_fast as lf
from llama_fast import reference
from llama_fast.bench.model import models, scaling
from llama_fast.bench.model.fit import fit, linear_memory
from llama_fast.bench.results import plot
from llama_fast.bench.results.files import Record

CPU = torch.device("cpu")
SIZES = [2**i for i in range(7, 18)]  # 128 to 131,072
TINY = scaling.Level(tokens=4096, context=1024, batch=4, prompt=512, ours=60.0, others=0.05)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, 1.5])
def test_exponent_is_found(exponent: float) -> None:
    found = fit([(n, 3.0 * n**exponent) for n in SIZES])
    assert found is not None and found["exponent"] == pytest.approx(exponent, abs=1e-9)
    assert found["local"] == pytest.approx(exponent, abs=1e-9) and found["error"] < 1e-6
    assert (found["start"], found["points"]) == (16384, 4)  # from an eighth on


def test_overhead_of_small_sizes_does_not_count() -> None:
    """Add a constant that dominates at the small sizes."""
    found = fit([(n, 1e7 + n**2) for n in SIZES])
    assert found is not None and found["exponent"] == pytest.approx(2.0, abs=0.1)
    assert found["local"] > found["exponent"]


@pytest.mark.parametrize("points", [[], [(1, 1), (2, 2)], [(1, 1), (2, 2), (4, 0)]])
def test_too_few_points_are_no_curve(points: list[tuple[float, float]]) -> None:
    assert fit(points) is None and linear_memory(points[:2]) is None


@pytest.mark.parametrize(
    "cost, linear",
    [
        (lambda n: 1024 * n, True),
        (lambda n: 1024 * n + 8e6, True),  # buffers that every call needs
        (lambda n: 1024 * n + n**2 / 64, False),  # a bit for every eight scores
        (lambda n: 1024 * n**1.2, False),
        (lambda n: 1024 * n * (2 if n > 65536 else 1), False),  # at the far end only
        (lambda n: 1024 * n * (1.6 if n > 8192 else 1), False),  # linear wherever it is fitted
        (lambda n: 1024 * n * max(1, n / 16384) ** 0.15, False),  # 1.4 times as much per token
    ],
    ids=["linear", "with a constant", "a little quadratic", "n^1.2", "a jump", "a step", "late"],
)
def test_linear_memory(cost: Callable[[float], float], linear: bool) -> None:
    found = linear_memory([(n, cost(n)) for n in SIZES])
    assert found is not None and found["linear"] is linear and found["to"] == 131072
    first, last = found["bytes_per_token"]
    assert (first, last) == (cost(4096) / 4096, cost(131072) / 131072)


@pytest.fixture
def narrow(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrink the run for a test: narrow layers, short curves, few rounds, one thread."""
    torch.set_num_threads(1)
    config = replace(
        models.shape(layers=1, vocab=256),
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    monkeypatch.setattr(models, "shape", lambda layers=1: config)
    monkeypatch.setitem(scaling.LEVELS, "quick", TINY)
    monkeypatch.setattr(scaling, "ROUNDS", 0.01)
    monkeypatch.setattr(scaling, "FIRST_TOKENS", 512)
    monkeypatch.setattr(scaling, "FIRST_CONTEXT", 256)
    monkeypatch.setattr(scaling, "FIRST_PROMPT", 64)


def test_curves(narrow: None, capsys: pytest.CaptureFixture[str]) -> None:
    found = scaling.run(CPU, "quick", Record())
    lines_printed = capsys.readouterr().out.splitlines()
    assert found["wrong"] == []
    curves = {c["name"]: c for c in found["curves"]}
    assert list(curves) == [
        "prefill attention",
        "decode attention, context",
        "decode attention, batch",
        "prefill",
        "decode",
    ]
    sizes = {n: [p["size"] for p in c["lines"]["ours"]["points"]] for n, c in curves.items()}
    assert sizes["prefill attention"] == [512, 1024, 2048, 4096]
    assert sizes["decode attention, batch"] == [1, 2, 4]
    assert sizes["prefill"] == sizes["decode"] == [64, 128, 256, 512]
    for curve in curves.values():
        for point in curve["lines"]["ours"]["points"]:
            assert point["seconds"] > 0 and point["bytes"] >= 0 and point["rounds"] >= 1
    lines = curves["prefill attention"]["lines"]
    assert lines["ours"]["bytes_fit"]["exponent"] < 1.3
    assert lines["ours"]["points"][-1]["bytes"] < 1.5 * 4096 * 4 * 128 * 2  # the output's
    assert lines["ours"]["points"][-1]["error"] < 0.02
    # Eager's scores are quadratic: it stops at the size that would take too long.
    assert lines["eager"]["points"][-1]["bytes"] > 4 * 512**2 * 4
    assert any("linear memory to 4096 tokens: yes" in line for line in lines_printed)
    results = {"ops": [], "scaling": found, "environment": ENVIRONMENT}
    assert [*plot.planned(results)] == ["scaling"]  # test_plots.py draws it


ENVIRONMENT: dict[str, Any] = {"cpu": "a CPU", "threads": 2, "isa": "avx2", "torch": "2.13.0"}


def only_attention(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    curves = scaling._curves
    monkeypatch.setattr(scaling, "_curves", lambda *a: [next(curves(*a))])
    return scaling.run(CPU, "quick", Record())


def test_quadratic_memory_is_noticed(narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure an attention that is right but keeps a quarter of a byte per score."""
    right = lf.attention

    def hungry(q: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        scores = torch.ones(q.shape[1] ** 2 // 4 * q.shape[2], dtype=torch.uint8)
        return right(q, *rest) + 0 * scores[0]

    monkeypatch.setattr(lf, "attention", hungry)
    (line,) = only_attention(monkeypatch)["wrong"]
    assert line == "prefill attention: memory is not linear to 4096 tokens"


@pytest.mark.parametrize("factor", [1.05, float("nan")], ids=["five percent off", "NaN"])
def test_wrong_result_is_noticed(
    narrow: None, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lf, "attention", lambda q, k, v: reference.attention(q, k, v) * factor)
    monkeypatch.setitem(scaling.LEVELS, "quick", TINY._replace(tokens=512))
    monkeypatch.setattr(scaling, "FIRST_TOKENS", 256)
    lines = only_attention(monkeypatch)["wrong"]
    assert [line.split(":")[0] for line in lines] == [
        f"prefill attention, tokens {n}" for n in (256, 512)
    ]


def test_a_size_that_would_take_too_much_is_skipped() -> None:
    point = {"size": 1024, "seconds": 1.0, "bytes": 1e6}
    assert scaling._too_much([], 2048, 1.0) == ""
    assert scaling._too_much([point], 2048, 4.0) == ""
    assert scaling._too_much([point], 2048, 3.9) == "more than 3.9 s"
    assert scaling._too_much([{**point, "bytes": 9e8}], 2048, 4.0) == "more than 3 GiB"
