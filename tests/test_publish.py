"""The pages that are cut from committed runs, and the plots."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_fast.bench import plot, plot_curves, publish, results_page
from llama_fast.bench.plot_style import colour, short

ROOT = Path(__file__).resolve().parent.parent
Pages = Callable[[], dict[str, str]]


def seconds(median: float, ours: float) -> dict[str, Any]:
    log = {"log": math.log(median / ours), "error": 0.01}
    return {"median": median, "p10": median, "p90": median, "rounds": 5, "ratio": log}


def op(name: str, shape: str, times: dict[str, float], limit: str = "copy") -> dict[str, Any]:
    ours = 1e-3
    return {
        "op": name,
        "shape": shape,
        "axes": {},
        "unit": "GB/s",
        "bytes": 4e6,
        "flops": 8e6,
        "rate": 4.0,
        "limit": limit,
        "limit_rate": 5.0,
        "of_limit": 0.8,
        "times": times,
        "targets": {"limit": 0.9},
        "met": {"limit": False},
        "error": 1e-3,
        "errors": {"ours": 1e-3, "eager": 2e-3, "llama.cpp Q8_0": 0.03},
        "eager_error": 2e-3,
        "wrong": False,
        "seconds": {
            "ours": {"median": ours},
            **{n: seconds(x * ours, ours) for n, x in times.items()},
        },
    }


def job(name: str, tokens: int, whose: str) -> dict[str, Any]:
    times = {"bf16": 2.0, "transformers": 4.0} if whose == "FP8" else {"FP8": 0.5}
    took = {"FP8": {"median": 1.0}, "bf16": {"median": 2.0}, "transformers": {"median": 4.0}}
    return {
        "op": name,
        "shape": whose,
        "ours": whose,
        "tokens_per_s": float(tokens),
        "limit": "read",
        "of_limit": 0.9,
        "times": times,
        "targets": {},
        "met": {},
        "all_layers_tokens_per_s": tokens / 8,
        "seconds": took,
    }


def example() -> dict[str, Any]:
    """A small run with everything in it."""
    return {
        "schema": 2,
        "environment": {
            "cpu": "a CPU",
            "threads": 2,
            "isa": "avx2",
            "torch": "2.13.0",
            "gpu": None,
            "commit": "abc",
        },
        "options": {"model": "8b", "tp": 1, "dtype": "bf16", "level": "default"},
        "peers": {"llama.cpp": "0.3"},
        "complete": True,
        "ops": [
            op("rms_norm", "1 x 4096", {"eager": 8.0, "torch.compile": 0.5}),
            op("rms_norm", "16 x 4096", {"eager": 9.0, "torch.compile": 0.99}),
            op("linear", "M=1, 8 x 4", {"F.linear": 2.0, "llama.cpp Q8_0": 3.0}, "read"),
        ],
        "end_to_end": {
            "what": "two layers",
            "rows": [
                job(name, 16, whose)
                for name in ("tg16 @ d512", "tg16 @ d4096")
                for whose in ("bf16", "FP8")
            ],
            "logits": {"FP8": 0.01, "transformers": 0.002},
            "memory": {"FP8": {"weights_gib": 1.0, "prompt_gib": 0.25}},
        },
        "scaling": {
            "curves": [
                {
                    "name": "prefill attention",
                    "what": "4/1 x 128",
                    "axis": "tokens",
                    "lines": {
                        "ours": {
                            "points": [
                                {"size": n, "seconds": 1e-9 * n**2, "bytes": 1024.0 * n}
                                for n in (1024, 2048, 4096)
                            ],
                            "seconds_fit": FIT,
                            "bytes_fit": {**FIT, "exponent": 1.0},
                        }
                    },
                    "linear_memory": {
                        "linear": True,
                        "to": 4096,
                        "from": 2048,
                        "bytes_per_token": [1024.0, 1024.0],
                    },
                }
            ]
        },
    }


FIT = {"exponent": 2.0, "error": 0.01, "local": 2.0, "start": 1024, "points": 3}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A README and one machine's run."""
    (tmp_path / "README.md").write_text("before\n<!-- bench:begin -->\n<!-- bench:end -->\nafter\n")
    folder = tmp_path / "bench" / "results" / "machine"
    folder.mkdir(parents=True)
    (folder / "bench.json").write_text(json.dumps(example()))
    return tmp_path


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that are about the pages: drawing takes a second."""
    monkeypatch.setattr(publish, "_draw", lambda root: [])


def page(checkout: Path) -> str:
    return publish.pages(checkout)[publish.RESULTS]


def test_committed_pages_are_cut_from_the_committed_runs() -> None:
    """After a new run in bench/results: python -m bench --publish."""
    for path, text in publish.pages(ROOT).items():
        assert (ROOT / path).read_text() == text, f"{path}: run python -m bench --publish"
    missing = [str(path) for path in publish.plots(ROOT) if not (ROOT / path).exists()]
    assert not missing, "run python -m bench --publish"


def test_publish_writes_pages_and_plots(checkout: Path) -> None:
    told: list[str] = []
    assert publish.main(checkout, told.append) == 0
    readme = (checkout / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("<!-- bench:end -->\nafter\n")
    assert "| rms_norm | 1 x 4096 | 1 ms | 4 GB/s | 80% of copy | eager 8.0x" in readme
    text = (checkout / "docs" / "results.md").read_text()
    assert text == page(checkout)
    pictures = ["bench.svg", "bench-roofline.svg", "bench-context.svg", "bench-scaling.svg"]
    for name in pictures:
        link = f"../bench/results/machine/{name}"
        assert f"({link})" in text and (checkout / "docs" / link).exists()
    assert sorted(p.name for p in (checkout / "bench/results/machine").glob("*.svg")) == sorted(
        pictures
    )


def test_an_edited_page_is_noticed(checkout: Path, no_plots: None) -> None:
    publish.main(checkout, lambda line: None)
    before = publish.pages(checkout)
    readme = checkout / "README.md"
    readme.write_text(readme.read_text().replace("8.0x", "80x"))
    assert publish.pages(checkout)[publish.README] == before[publish.README] != readme.read_text()
    run = checkout / "bench/results/machine/bench.json"
    run.write_text(run.read_text().replace('"of_limit": 0.8', '"of_limit": 0.7'))
    after = publish.pages(checkout)
    assert all(after[path] != before[path] for path in before)


def test_where_ours_is_behind(checkout: Path, no_plots: None) -> None:
    notes = {
        "rms_norm 1 x 4096: torch.compile": "one row is one thread's",
        "rms_norm 7 x 4096": "an old one",
    }
    (checkout / "bench/results/machine/notes.json").write_text(json.dumps(notes))
    _, _, behind = page(checkout).partition("### Where ours is behind")
    rows = [line for line in behind.splitlines() if line.startswith("| bench.json")]
    assert rows == [
        "| bench.json | rms_norm 1 x 4096 | torch.compile | 100% | one row is one thread's |",
        "| bench.json | rms_norm 16 x 4096 | torch.compile | 1%, within the noise |  |",
    ]  # and not bf16 behind FP8: both are ours
    told: list[str] = []
    publish.main(checkout, told.append)
    assert any("rms_norm 7 x 4096" in line and "nobody is faster" in line for line in told)


def test_page_has_every_figure(checkout: Path) -> None:
    text = page(checkout)
    for wanted in (
        "Targets met: 0 of 3.",
        "| 8 ms, 8.0x | 0.5 ms, 0.50x |",
        "F.linear: 2 ms, 2.0x | llama.cpp Q8_0: 3 ms, 3.0x, error 3.0e-02 |",
        "1.0e-03 (2.0e-03)",
        "limit 0.9: **missed**",
        "| tg16 @ d512 | FP8 | 16.0 | 4.0 (4.0x) | 90% of read | 2.00 |  |",
        "| FP8 | 1.00 GiB | 0.25 GiB | 1.0e-02 |",
        "| prefill attention | ours | 4096 tokens | 16.8 ms | 2.00 +- 0.01 | 4.0 MiB | 1.00 +-",
        "linear memory to 4096 tokens: yes (1.00 KiB a token at 2048, 1.00 at 4096)",
    ):
        assert wanted in text, wanted


@pytest.mark.parametrize("part", ["options", "peers", "end_to_end", "scaling", "complete"])
def test_a_run_may_lack_parts(checkout: Path, part: str) -> None:
    run = example()
    del run[part]
    (checkout / "bench/results/machine/bench.json").write_text(json.dumps(run))
    assert "rms_norm" in page(checkout)


def test_gpu_report_is_told(checkout: Path) -> None:
    report = {
        "environment": {"gpu": "NVIDIA H100", "torch": "2.13.0"},
        "parts": {"ops": {"rows": [{"op": "rms_norm", "tag": "norm"}]}},
        "targets": [
            {"what": "RMSNorm", "wanted": 5.0, "unit": "x", "got": 6.5, "verdict": "met"},
            {"what": "RoPE", "wanted": 9.0, "unit": "x", "got": None, "verdict": "not measured"},
        ],
    }
    folder = checkout / "bench" / "results" / "h100"
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report))
    text = page(checkout)
    assert "## NVIDIA H100 (h100)" in text and "| RMSNorm | 5 x | 6.5 | met |" in text
    assert "| RoPE | 9 x |  | not measured |" in text
    assert "(../bench/results/h100/roofline.svg)" in text


def test_broken_run_is_named(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "bench/results/machine/bench.json").write_text("{")
    assert publish.main(checkout) == publish.USAGE
    assert "bench.json: not JSON" in capsys.readouterr().err
    assert publish.main(checkout / "docs") == publish.USAGE


def test_same_figures_same_bytes(tmp_path: Path) -> None:
    """A plot drawn again does not show up in a diff."""
    files = [plot.all_of(example(), tmp_path / name / "x.svg") for name in ("a", "b")]
    assert [p.name for p in files[0]] == [
        f"x{name}.{kind}"
        for name in ("", "-roofline", "-context", "-scaling")
        for kind in ("png", "svg")
    ]
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_every_kernel_is_on_the_roofline(tmp_path: Path) -> None:
    _, svg = plot.planned(example())["roofline"](tmp_path / "x.svg")
    text = svg.read_text()
    for label in ("rms_norm 1", "rms_norm 16", "linear", "copy 5 GB/s", "read 5 GB/s"):
        assert f"<!-- {label} -->" in text, label


def test_bars_leave_out_our_own_other_weights() -> None:
    panels = plot._panels(example()["ops"] + example()["end_to_end"]["rows"])
    assert [p.name for p in panels] == ["rms_norm   n x 4096", "linear", "forward pass"]
    assert panels[0].cases[0] == ("1", {"eager": 8.0, "torch.compile": 0.5})
    assert panels[-1].cases == [
        ("tg16 @ d512, FP8", {"transformers": 4.0}),
        ("tg16 @ d4096, FP8", {"transformers": 4.0}),
    ]


def test_one_colour_an_implementation() -> None:
    names = ("ours", "eager", "torch.compile", "SDPA", "F.rms_norm", "F.linear", "transformers")
    assert len({colour(name) for name in names}) == len(names)
    assert colour("FP8") == colour("ours") and colour("bf16 F.linear") == colour("F.linear")
    assert colour("somebody's kernel") == colour("somebody's kernel")


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
def test_shapes_without_what_they_share(shapes: list[str], labels: list[str], rest: str) -> None:
    assert short(shapes) == (labels, rest)


def test_contexts_are_averages_of_what_is_in_the_cache() -> None:
    rows = example()["end_to_end"]["rows"]
    found = plot_curves.contexts(rows)
    assert found == {
        "tg": {
            "FP8": ([520.0, 4104.0], [16.0, 16.0]),
            "bf16": ([520.0, 4104.0], [8.0, 8.0]),
            "transformers": ([520.0, 4104.0], [4.0, 4.0]),
        }
    }
    assert plot_curves.contexts(rows[:2]) == {}  # one context is no curve


def test_labels_are_pushed_apart() -> None:
    assert plot_curves.apart_by({"a": 5.0, "b": 0.0, "c": 6.0}, 4.0) == {
        "b": 0.0,
        "a": 5.0,
        "c": 9.0,
    }


def test_noise_decides_who_is_surely_faster() -> None:
    run = copy.deepcopy(example())
    found = {(case, who): sure for case, who, _, sure in results_page.slower(run)}
    assert found == {
        ("rms_norm 1 x 4096", "torch.compile"): True,
        ("rms_norm 16 x 4096", "torch.compile"): False,
    }
