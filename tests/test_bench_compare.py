"""--compare: what counts as slower, and what is noise."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

import llama_fast as lf
from llama_fast.bench import compare
from llama_fast.bench.__main__ import main

from .bench_runs import TINY, Bench


def row(*ratios: tuple[float, float], limit: float | None = None) -> dict[str, Any]:
    """A case whose ours took 1 s in two passes, with (how many times longer, error of the
    logarithm)."""
    named = {f"other {i}": r for i, r in enumerate(ratios)}
    if limit is not None:
        named["limit"] = (limit, 0.02)
    seconds = {"ours": {"passes": [1.0, 1.0]}}
    for name, (times, error) in named.items():
        seconds[name] = {"passes": [times, times * math.exp(2 * error)]}
    return {"op": "op", "shape": "shape", "limit": "copy", "seconds": seconds}


def test_voice() -> None:
    """The fast end, and what hangs on a single pass."""
    found = compare.voice(row((2.0, 0.1)), "other 0")
    assert found is not None and found.log == pytest.approx(math.log(2))
    assert found.error == pytest.approx(0.1)
    case = {"seconds": {"ours": {"passes": [1.5, 1.0, 1.0]}, "other": {"passes": [2.0, 3.0, 2.0]}}}
    steady = compare.voice(case, "other")
    assert steady == compare.Voice(math.log(2), 0.0)  # two passes reached each's fast end
    case["seconds"]["ours"]["passes"][2] = 1.5
    lucky = compare.voice(case, "other")
    assert lucky is not None and lucky.error == pytest.approx(2 / 3 * math.log(1.5))
    assert compare.voice(case, "absent") is None
    once = {"ours": {"passes": [1.0]}, "x": {"passes": [2.0]}}
    assert compare.voice({"seconds": once}, "x") == compare.Voice(math.log(2), math.inf)
    once["x"]["ratio"] = {"log": 0.7, "error": 0.1}
    assert compare.voice({"seconds": once}, "x") == compare.Voice(math.log(2), 0.1)


@pytest.mark.parametrize(
    "new, verdict",
    [
        (row((2.0, 0.02), (3.0, 0.02)), "same"),
        (row((2.0 / 1.2, 0.02), (3.0 / 1.2, 0.02)), "slower"),
        (row((2.0 * 1.2, 0.02), (3.0 * 1.2, 0.02)), "faster"),
        (row((2.0 / 1.02, 0.02), (3.0 / 1.02, 0.02)), "same"),
        (row((2.0 / 1.2, 0.15), (3.0 / 1.2, 0.15)), "too noisy to tell"),
        (row((2.0 / 1.5, 0.02), (3.0, 0.02), (4.0, 0.02)), "same"),  # one baseline became faster
        (row((2.0 / 1.5, 0.02), (3.0 / 1.5, 0.02), (4.0 / 1.5, 0.02), limit=0.5), "same"),
        (row((2.0 / 1.2, 0.02), (3.0 / 1.2, 0.02), (4.0 / 1.2, 0.02), limit=0.5 / 1.2), "slower"),
        (row((2.0 / 1.2, 0.02), (3.0 / 1.2, 0.02), (4.0 / 1.2, 0.02), limit=0.5 * 1.2), "same"),
    ],
    ids=[
        "same",
        "20 % slower",
        "20 % faster",
        "2 %",
        "noisy",
        "a faster baseline",
        "memory became slower",
        "20 % slower, and than the limit",
        "no agreement",
    ],
)
def test_change(new: dict[str, Any], verdict: str) -> None:
    old = row((2.0, 0.02), (3.0, 0.02), (4.0, 0.02), limit=0.5)
    found = compare.change("op shape", old, new)
    assert found is not None and found.verdict == verdict and "noise" in str(found)


def test_a_quiet_case_has_the_noise_of_the_others() -> None:
    """Three passes that agree by luck are believed no more than cases like it."""
    old, new = row((2.0, 0.0), limit=0.5), row((2.0 / 1.3, 0.0), limit=0.5 / 1.3)
    found = compare.change("op shape", old, new)
    assert found is not None and found.verdict == "slower"
    for limits, others, by in ((0.2, 0.0, 1.25), (0.0, 0.2, 1.35)):
        new = row((2.0 / 1.3, 0.0), limit=0.5 / by)  # the smaller change is the noisy one's
        least = {("copy", True): limits, ("copy", False): others}
        found = compare.change("op shape", old, new, least)
        assert found is not None and found.verdict == "too noisy to tell"


def test_a_single_pass_without_errors_says_nothing() -> None:
    old, new = row((2.0, 0.0), limit=0.5), row((1.0, 0.0), limit=0.25)
    for r in (old, new):
        for timing in r["seconds"].values():
            timing["passes"] = timing["passes"][:1]
    found = compare.change("op shape", old, new)
    assert found is not None and found.verdict == "too noisy to tell"


def test_other_weights_of_ours_have_no_voice() -> None:
    """What slows bf16 and FP8 alike is seen by everybody else."""

    def forward(others: float) -> dict[str, Any]:
        case = row((others, 0.001), limit=0.5 * others / 2)
        case |= {"ours": "bf16", "siblings": ["FP8"], "shape": "bf16"}
        case["seconds"]["bf16"] = case["seconds"].pop("ours")
        case["seconds"]["FP8"] = {"passes": [0.5, 0.5]}
        return case

    found = compare.change("op bf16", forward(2.0), forward(2.0 / 1.2))
    assert found is not None and found.verdict == "slower"


def test_two_who_are_as_sure_as_each_other() -> None:
    for one, other in ((1.0, 1.3), (1 / 1.3, 1.0)):  # slower by a half, or faster by a half
        new = row((2.0 / one, 0.001), (2.0 / other, 0.001))
        found = compare.change("op shape", row((2.0, 0.001), (2.0, 0.001)), new)
        assert found is not None and abs(found.slowdown) == pytest.approx(math.log(1.3) / 2)


def test_noise_is_that_of_all_cases_with_the_limit() -> None:
    """The median: a case that somebody disturbed counts no more than one."""
    one = {"ops": [row((2.0, 0.1)), row((3.0, 0.02)), row((2.0, 0.5)) | {"limit": "matmul"}]}
    one["ops"][1]["shape"] = "another"
    one["ops"][2]["op"] = "product"
    two = {"ops": [row((2.0, 5.0))], "end_to_end": {"rows": []}}
    assert compare.noise(one, two) == pytest.approx({("copy", False): 0.1, ("matmul", False): 0.5})


def test_nobody_to_compare_with() -> None:
    assert compare.change("op shape", row((2.0, 0.1)), row()) is None


@pytest.mark.parametrize(
    "repeats, slower", [([1.25, 1.25], True), ([1.25, 1.0], False), ([1.0, 1.0], False)]
)
def test_a_suspect_is_measured_again(repeats: list[float], slower: bool) -> None:
    """Until a pass shows that it can be as fast as it was."""
    said: list[str] = []
    measured = iter(repeats)

    def took(*ours: float) -> dict[str, Any]:
        seconds = {"ours": {"passes": list(ours)}, "other": {"passes": [2.0] * len(ours)}}
        return {"op": "op", "shape": "shape", "limit": "copy", "seconds": seconds}

    def again(name: str, time: int) -> dict[str, Any]:
        assert (name, time) == ("op shape", len(said) - 1)
        return took(next(measured))

    old, new = took(1.0, 1.0), took(1.25, 1.25)
    changes = compare.compare({"ops": [old]}, {"ops": [new]}, again, said.append)
    assert [c.verdict == "slower" for c in changes] == [slower]
    assert len(said) == len(repeats) and next(measured, None) is None


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
    """A quarter as fast, on purpose, through the command; how fine it is, is measured by hand."""
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
