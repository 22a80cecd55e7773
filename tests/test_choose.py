"""What `python -m bench --choose` makes of GPU reports, on reports made up for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llama_fast import choices
from llama_fast.bench import choose
from llama_fast.bench.__main__ import main

from .choices import case, chosen, passing, report, timing

ATTENTION = "16-bit, head_dim 128"
FAST = case("attention", ATTENTION)


def entry(tmp_path: Path, content: Any, op: str = "attention", sm: str = "sm_90") -> Any:
    (found,) = chosen(tmp_path, h200=content)["choices"][sm][op]
    return found


def test_committed_choices_are_what_the_committed_reports_say() -> None:
    """Else: python -m bench --choose."""
    assert choices.PATH.read_text() == choose.text(choose.make(choose.RESULTS))


def test_right_and_faster_is_chosen(tmp_path: Path) -> None:
    found = entry(tmp_path, report(FAST, case("attention", ATTENTION, triton=3e-3)))
    assert found == {
        "class": ATTENTION,
        "backend": "cuda",
        "times": pytest.approx(6**0.5, rel=1e-3),
        "why": "right and faster in 2 cases",
        "reports": ["h200"],
    }


WRONG = {"seconds": timing(1e-3), "error": 0.5, "wrong": True}
FAILED = {"failed": "an illegal memory access was encountered"}


@pytest.mark.parametrize(
    "rows, wanted",
    [
        ([FAST, case("attention", ATTENTION, cuda=WRONG)], "cuda is wrong at attention s"),
        ([FAST, case("attention", ATTENTION, cuda=FAILED)], "cuda failed at attention s"),
        ([case("attention", ATTENTION, cuda={"skipped": "not built"})], "cuda was not measured"),
        ([case("attention", ATTENTION, cuda=1.99e-3)], "cuda is not faster beyond the noise"),
        ([case("attention", ATTENTION, cuda=2e-3)], "cuda is not faster beyond the noise"),
        ([FAST, case("attention", ATTENTION, cuda=2.1e-3, shape="long")], "cuda takes 1.05 times"),
    ],
    ids=["wrong", "failed", "absent", "within noise", "equal", "slower in one"],
)
def test_why_triton_stays(tmp_path: Path, rows: list[Any], wanted: str) -> None:
    found = entry(tmp_path, report(*rows))
    assert found["backend"] == "triton" and found["why"].startswith(wanted)


def test_even_in_one_case_and_faster_in_another_is_chosen(tmp_path: Path) -> None:
    """A decode step's launch is as short as it gets on either."""
    even = case("attention", ATTENTION, triton=1e-6, cuda=1.005e-6)
    assert entry(tmp_path, report(FAST, even))["backend"] == "cuda"


ONE = {"tests/gpu/test_attention.py::test_head_dims[8]": "assert"}
HARDWARE = "tests/gpu/test_hardware.py::test_f42"


@pytest.mark.parametrize(
    "tests, wanted",
    [
        (passing(failed=ONE), "1 tests of cuda failed, as tests/gpu/test_attention.py"),
        (passing(failed={f"{HARDWARE}[attention]": ""}), "1 tests of cuda failed"),
        (passing(failed={"tests/gpu/test_model.py::test_x": ""}), "1 tests of cuda failed"),
        (passing(complete=False), "the tests of cuda did not run to their end"),
        ({"complete": True, "what": "not built"}, None),
        (passing(passed={f"{HARDWARE}[attention]": 1}), "no test of attention passed on cuda"),
    ],
    ids=["failed", "failed by op", "model failed", "cut short", "not run", "none passed"],
)
def test_tests_that_did_not_pass(tmp_path: Path, tests: Any, wanted: str | None) -> None:
    if wanted is None:
        tests, wanted = {"complete": False}, "the tests of cuda did not run to their end"
    found = entry(tmp_path, report(FAST, tests={"cuda": tests}))
    assert found["backend"] == "triton" and found["why"].startswith(wanted)


@pytest.mark.parametrize(
    "failed", ["tests/gpu/test_rope.py::test_x", f"{HARDWARE}[apply_rope]", f"{HARDWARE}[rms_norm]"]
)
def test_another_ops_failure_does_not_count(tmp_path: Path, failed: str) -> None:
    content = report(FAST, tests={"cuda": passing(failed={failed: ""})})
    assert entry(tmp_path, content)["backend"] == "cuda"


@pytest.mark.parametrize(
    "ops",
    [{"unreached": ["attention causal 2048"]}, {"failed": {"attention full": "x"}}, {"case": "x"}],
)
def test_a_class_measured_in_part(tmp_path: Path, ops: Any) -> None:
    found = entry(tmp_path, report(FAST, **ops))
    assert found["why"] == "not all of its cases were measured" and found["backend"] == "triton"
    other = report(FAST, unreached=["attention_with_kvcache B1 x 9"])
    assert entry(tmp_path, other)["backend"] == "cuda"


def test_tests_and_figures_of_one_commit(tmp_path: Path) -> None:
    content = report(FAST)
    content["parts"]["tests-cuda"]["commit"] = "old"
    assert entry(tmp_path, content)["why"] == "its tests are of commit old, its figures of abc"


def test_right_goes_before_fast(tmp_path: Path) -> None:
    found = entry(tmp_path, report(case("attention", ATTENTION, triton=WRONG, cuda=9e-3)))
    assert (found["backend"], found["times"]) == ("cuda", None)
    assert found["why"] == "triton is wrong at attention s"
    both = entry(tmp_path, report(case("attention", ATTENTION, triton=WRONG, cuda=WRONG)))
    assert both["backend"] == "triton"


def test_classes_are_decided_one_by_one(tmp_path: Path) -> None:
    op, (one, several, one_fp8, _) = (
        "attention_with_kvcache",
        choices.CLASSES["attention_with_kvcache"],
    )
    rows = [case(op, one), case(op, several, cuda=3e-3), case(op, one_fp8), case(op, None)]
    found = chosen(tmp_path, h200=report(*rows))["choices"]["sm_90"]
    assert {i["class"]: i["backend"] for i in found[op]} == {
        one: "cuda",
        several: "triton",
        one_fp8: "cuda",
    }
    assert list(found) == [op]


def test_a_family_is_decided_together(tmp_path: Path) -> None:
    """rms_norm_fp8 gives the bits of rms_norm and quantize_fp8, which holds within a backend."""
    rows = [case(op, "16-bit") for op in ("rms_norm", "add_rms_norm", "rms_norm_fp8")]
    found = chosen(tmp_path, h200=report(*rows))["choices"]["sm_90"]
    assert {op: items[0]["backend"] for op, items in found.items()} == {
        "rms_norm": "cuda",
        "add_rms_norm": "cuda",
        "rms_norm_fp8": "cuda",
    }
    rows[1] = case("add_rms_norm", "16-bit", cuda=4e-3)
    found = chosen(tmp_path, h200=report(*rows))["choices"]["sm_90"]
    assert {items[0]["backend"] for items in found.values()} == {"triton"} and len(found) == 3


def test_reports_of_a_chip_have_to_agree(tmp_path: Path) -> None:
    h100 = {"gpu": "NVIDIA H100 80GB HBM3"}
    less = case("attention", ATTENTION, cuda=1.6e-3)
    made = chosen(tmp_path, h200=report(FAST), h100=report(less, environment=h100))
    (found,) = made["choices"]["sm_90"]["attention"]
    assert (found["backend"], found["times"]) == ("cuda", 1.25)
    assert found["reports"] == ["h100", "h200"] and len(made["reports"]) == 2
    slower = report(case("attention", ATTENTION, cuda=3e-3), environment=h100)
    (found,) = chosen(tmp_path, h100=slower)["choices"]["sm_90"]["attention"]
    assert found["backend"] == "triton" and found["why"].startswith("h100: cuda takes 1.50 times")


def test_chips_are_decided_one_by_one(tmp_path: Path) -> None:
    l4 = {"gpu": "NVIDIA L4", "sm": "sm_89"}
    slow = report(case("attention", ATTENTION, cuda=3e-3), environment=l4)
    made = chosen(tmp_path, h200=report(FAST), l4=slow)["choices"]
    assert {sm: by_op["attention"][0]["backend"] for sm, by_op in made.items()} == {
        "sm_89": "triton",
        "sm_90": "cuda",
    }


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, to = tmp_path / "results", tmp_path / "out.json"
    chosen(results, h200=report(FAST))
    options = ["--choose", "--results", str(results), "--to", str(to)]
    assert main([*options, "--check"]) == 1 and not to.exists()
    assert main(options) == 0 and main([*options, "--check"]) == 0
    assert choices.load(to).by_chip["sm_90"]["attention"][ATTENTION].backend == "cuda"
    assert "cuda    2.00x   right and faster in 1 cases" in capsys.readouterr().out
    (results / "none").mkdir()
    broken = report(FAST, environment={"sm": None})
    (results / "none" / "report.json").write_text(json.dumps(broken))
    assert main(options) == 2
    assert "none/report.json: its environment lacks sm" in capsys.readouterr().err
