"""Tests of the benchmark's plots: what they show, and that the same figures give the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_fast.bench.results import plot
from llama_fast.bench.results.plot import color, short

from .runs import example


def test_same_figures_same_bytes(tmp_path: Path) -> None:
    """Draw a plot twice. The second must not show up in a diff."""
    files = [plot.all_of(example(), tmp_path / name / "x.svg") for name in ("a", "b")]
    assert [p.name for p in files[0]] == [
        f"x{name}.{kind}"
        for name in ("", "-roofline", "-context", "-scaling")
        for kind in ("png", "svg")
    ]
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_every_kernel_is_on_the_roofline(tmp_path: Path) -> None:
    plot.planned(example())["roofline"]([tmp_path / "x.svg"])
    text = (tmp_path / "x.svg").read_text()
    for label in ("rms_norm 1", "rms_norm 16", "linear M=1, 8 x 4", "copy 5 GB/s", "read 5 GB/s"):
        assert f"<!-- {label} -->" in text, label


def test_bars_leave_out_our_own_other_weights() -> None:
    panels = plot.panels(example()["ops"] + example()["end_to_end"]["rows"])
    assert [name for name, _ in panels] == ["rms_norm   n x 4096", "linear", "forward pass"]
    assert panels[0][1][0] == ("1", {"eager": 8.0, "torch.compile": 0.5})
    assert panels[-1][1] == [
        ("tg16 @ d512, FP8", {"transformers": 4.0}),
        ("tg16 @ d4096, FP8", {"transformers": 4.0}),
    ]


def test_one_color_an_implementation() -> None:
    names = ("ours", "eager", "torch.compile", "SDPA", "F.rms_norm", "F.linear", "transformers")
    assert len({color(name) for name in names}) == len(names)
    assert color("FP8") == color("ours") and color("bf16 F.linear") == color("F.linear")
    assert color("a user's kernel") == color("a user's kernel")


@pytest.mark.parametrize(
    "shapes, labels, rest",
    [
        (["512 x 4096"], ["512 x 4096"], ""),
        (["1 x 4096", "16 x 4096"], ["1", "16"], "n x 4096"),
        (["M=1, 8 x 4", "M=2, 8 x 4"], ["M=1", "M=2"], "8 x 4"),
        (["M=1, 8 x 4", "M=1, 6 x 4"], ["M=1, 8", "M=1, 6"], "n x 4"),
        (["a, b", "a, c"], ["a, b", "a, c"], ""),
    ],
)
def test_shapes_without_their_common_part(shapes: list[str], labels: list[str], rest: str) -> None:
    assert short(shapes) == (labels, rest)


def test_contexts_are_averages_of_what_is_in_the_cache() -> None:
    rows = example()["end_to_end"]["rows"]
    found = plot.contexts(rows)
    assert found == {
        "tg": {
            "FP8": ([520.0, 4104.0], [16.0, 16.0]),
            "bf16": ([520.0, 4104.0], [8.0, 8.0]),
            "transformers": ([520.0, 4104.0], [4.0, 4.0]),
        }
    }
    assert plot.contexts(rows[:2]) == {}  # one context makes no curve
