"""Tests of the pages that are generated from committed runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from llama_fast.bench.results import page as pages
from llama_fast.bench.results import publish

from .runs import example

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a checkout with a README and one machine's run."""
    (tmp_path / "README.md").write_text("before\n<!-- bench:begin -->\n<!-- bench:end -->\nafter\n")
    folder = tmp_path / "bench" / "results" / "machine"
    folder.mkdir(parents=True)
    (folder / "bench.json").write_text(json.dumps(example()))
    return tmp_path


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the plots in tests of pages: drawing takes a second."""
    monkeypatch.setattr(publish, "plots", lambda root: {})


def page(checkout: Path) -> str:
    return publish.pages(checkout)[publish.RESULTS]


def test_committed_pages_are_cut_from_the_committed_runs() -> None:
    """Compare. If this fails after a new run in bench/results: python -m bench --publish."""
    for path, text in publish.pages(ROOT).items():
        assert (ROOT / path).read_text() == text, f"{path}: run python -m bench --publish"
    missing = [str(path) for path in publish.plots(ROOT) if not (ROOT / path).exists()]
    assert not missing, "run python -m bench --publish"


def test_publish_writes_pages_and_plots(checkout: Path) -> None:
    assert publish.main(checkout) == 0
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
    publish.main(checkout)
    before = publish.pages(checkout)
    readme = checkout / "README.md"
    readme.write_text(readme.read_text().replace("8.0x", "80x"))
    assert publish.pages(checkout)[publish.README] == before[publish.README] != readme.read_text()
    run = checkout / "bench/results/machine/bench.json"
    run.write_text(run.read_text().replace('"of_limit": 0.8', '"of_limit": 0.7'))
    after = publish.pages(checkout)
    assert all(after[path] != before[path] for path in before)


def test_where_ours_is_behind(checkout: Path, no_plots: None) -> None:
    _, _, behind = page(checkout).partition("### Where ours is behind")
    rows = [line for line in behind.splitlines() if line.startswith("| bench.json")]
    assert rows == [
        "| bench.json | rms_norm 1 x 4096 | torch.compile | 100% |",
        "| bench.json | rms_norm 16 x 4096 | torch.compile | 1%, within the noise |",
    ]  # not bf16 behind FP8: both are ours


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


def test_a_gpus_run_is_one_more_machine(checkout: Path) -> None:
    run = example()
    run["environment"] |= {"gpu": "NVIDIA H100", "sm": "sm_90"}
    folder = checkout / "bench" / "results" / "h100"
    folder.mkdir()
    (folder / "bench.json").write_text(json.dumps(run))
    (folder / "tests-cuda.json").write_text('{"backend": "cuda", "files": {}}')
    assert "## NVIDIA H100 (h100)" in page(checkout)


def test_broken_run_is_named(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "bench/results/machine/bench.json").write_text("{")
    assert publish.main(checkout) == publish.USAGE
    assert "bench.json: not JSON" in capsys.readouterr().err
    assert publish.main(checkout / "docs") == publish.USAGE


def test_noise_decides_which_is_surely_faster() -> None:
    run = copy.deepcopy(example())
    found = {(case, name): sure for case, name, _, sure in pages.slower(run)}
    assert found == {
        ("rms_norm 1 x 4096", "torch.compile"): True,
        ("rms_norm 16 x 4096", "torch.compile"): False,
    }
