"""Tests of --compare: which changes count as slower, and which are noise."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

import llama_fast as lf
from llama_fast.bench.__main__ import main
from llama_fast.bench.results import compare

from .runs import TINY, Bench


def row(*others: float, limit: float | None = None, noise: float = 0.01) -> dict[str, Any]:
    """Return a row in which ours took 1 s in each of three passes. The others and the limit take
    the given multiples of it; `noise` scatters all of them."""
    named = {f"other {i}": times for i, times in enumerate(others)}
    if limit is not None:
        named["limit"] = limit
    seconds = {"ours": {"passes": [1.0] * 3}}
    for name, times in named.items():
        seconds[name] = {"passes": [times, times * (1 + noise), times * (1 + 2 * noise)]}
    return {"op": "op", "shape": "shape", "limit": "copy", "seconds": seconds}


OLD = row(2.0, 3.0, 4.0, limit=0.5)


@pytest.mark.parametrize(
    "new, verdict",
    [
        (OLD, "same"),
        (row(2.0 / 1.1, 3.0 / 1.1, 4.0 / 1.1, limit=0.5 / 1.1), "slower"),
        (row(2.0 * 1.1, 3.0 * 1.1, 4.0 * 1.1, limit=0.5 * 1.1), "faster"),
        (row(2.0 / 1.02, 3.0 / 1.02, 4.0 / 1.02, limit=0.5 / 1.02), "same"),
        (row(2.0 / 1.1, 3.0 / 1.1, 4.0 / 1.1, limit=0.5 / 1.1, noise=0.1), "too noisy to tell"),
        (row(2.0 / 1.5, 3.0, 4.0, limit=0.5 / 1.1), "same"),  # one baseline became faster
        (row(2.0 / 1.5, 3.0 / 1.5, 4.0 / 1.5, limit=0.5), "same"),
        (row(2.0 / 1.2, 3.0 / 1.2, 4.0 / 1.2, limit=0.5 * 1.2), "same"),
    ],
    ids=[
        "same",
        "10 % slower",
        "10 % faster",
        "2 %",
        "noisy",
        "a faster baseline",
        "memory became slower",
        "no agreement",
    ],
)
def test_change(new: dict[str, Any], verdict: str) -> None:
    found = compare.change("op shape", OLD, new)
    assert found is not None and found.verdict == verdict and "noise" in str(found)


def test_the_fast_end_counts() -> None:
    """Keep what one pass reached when a neighbor disturbed the other two."""
    new = row(2.0, 3.0, 4.0, limit=0.5)
    new["seconds"]["ours"]["passes"] = [1.4, 1.0, 1.3]
    found = compare.change("op shape", OLD, new)
    assert found is not None and found.slowdown == 0.0


def test_a_single_pass_has_its_rounds_noise() -> None:
    old, new = (row(x, limit=x / 4) for x in (2.0, 1.0))
    for r in (old, new):
        for timing in r["seconds"].values():
            timing["passes"] = timing["passes"][:1]
    found = compare.change("op shape", old, new)
    assert found is not None and found.verdict == "too noisy to tell"
    for r in (old, new):
        for name in ("other 0", "limit"):
            r["seconds"][name]["ratio"] = {"log": 0.0, "error": 0.01}
    found = compare.change("op shape", old, new)
    assert found is not None and found.verdict == "slower"


def test_other_weights_of_ours_are_no_baseline() -> None:
    """Compare with the others: a cause that slows our bf16 and FP8 alike must still show."""

    def forward(others: float) -> dict[str, Any]:
        case = row(others, limit=others / 4)
        case |= {"ours": "bf16", "siblings": ["FP8"], "shape": "bf16"}
        case["seconds"]["bf16"] = case["seconds"].pop("ours")
        case["seconds"]["FP8"] = {"passes": [0.5] * 3}
        return case

    found = compare.change("op bf16", forward(2.0), forward(2.0 / 1.2))
    assert found is not None and found.verdict == "slower"


def test_nothing_to_compare_with() -> None:
    assert compare.change("op shape", row(2.0), row()) is None


@pytest.mark.parametrize("again, slower", [(1.25, True), (1.0, False)])
def test_a_suspect_is_measured_once_more(again: float, slower: bool) -> None:
    """Measure a suspect again. A pass as fast as before clears it."""
    said: list[str] = []

    def took(*ours: float) -> dict[str, Any]:
        seconds = {"ours": {"passes": list(ours)}, "other": {"passes": [2.0] * len(ours)}}
        return {"op": "op", "shape": "shape", "limit": "copy", "seconds": seconds}

    def measure(name: str) -> dict[str, Any]:
        assert name == "op shape" and len(said) == 1
        return took(again)

    old, new = ({"ops": [took(*[x] * 3)]} for x in (1.0, 1.25))
    (change,) = compare.compare(old, new, measure, said.append)
    assert (change.verdict == "slower") == slower and "measured again" in said[0]


def test_other_machines_are_not_compared(bench: Bench, tmp_path: Path, capsys: Any) -> None:
    _, document = bench("--op", "rms_norm", "--no-plot")
    document["environment"]["threads"] = 64
    old = tmp_path / "old.json"
    old.write_text(json.dumps(document))
    capsys.readouterr()
    assert main([*TINY, "--op", "rms_norm", "--compare", str(old)]) == 2
    assert "the older run has threads 64" in capsys.readouterr().err
    old.write_text("{}")
    assert main([*TINY, "--compare", str(old)]) == 2
    assert "want 3: a file of `python -m bench`" in capsys.readouterr().err


def test_slower_kernel_fails_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slow a kernel to a quarter and run the command. (The sensitivity is measured by hand.)"""
    options = [*TINY, "--op", "linear", "--no-plot", "--threads", "1", "--json"]
    old = tmp_path / "old.json"
    assert main([*options, str(old)]) == 0
    right = lf.linear

    def slow(*args: Any) -> Any:
        start = time.perf_counter()
        result = right(*args)
        until = start + 4 * (time.perf_counter() - start)
        while time.perf_counter() < until:
            pass
        return result

    monkeypatch.setattr(lf, "linear", slow)
    status = main([*options, str(tmp_path / "new.json"), "--compare", str(old)])
    out = capsys.readouterr().out
    assert status == 3 and "measured again" in out and "slower" in out
    document = json.loads((tmp_path / "new.json").read_text())
    assert document["compared"]["changes"][0]["verdict"] == "slower" and document["complete"]
