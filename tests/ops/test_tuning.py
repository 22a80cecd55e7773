"""Tests of the choice of a configuration: measured once, stored, read back, and never blocking."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import triton

import llama_fast as lf
from llama_fast import tune
from llama_fast.kernels import common, tuning
from llama_fast.kernels.common import Config, Tuner

ROOT = Path(__file__).resolve().parents[2]
CHIP = common.Chip("A Fast GPU", "cuda", 90, 4, 232448)
OFFERED = [Config.of(BLOCK=n) for n in (16, 32, 64)]
X = torch.empty(0)
KERNELS = sorted((ROOT / "kernels").glob("*.py"))


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start without choices. Restore those of the process afterwards."""
    folders = list(tuning._folders)
    common.load_choices()
    yield
    monkeypatch.undo()
    common.load_choices(*folders)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Simulate a GPU on which the larger block is faster. List what is measured on it."""
    log: list[tuple[str, int]] = []

    def milliseconds(run: Callable[[Config], object], config: Config) -> float:
        time.sleep(0.002)  # lets other threads run in between
        run(config)
        log.append((threading.current_thread().name, config["BLOCK"]))
        return 1.0 / config["BLOCK"]

    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "chip_of", lambda t: CHIP)
    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    return log


def tuner(offered: list[Config] = OFFERED) -> Tuner:
    return Tuner("demo", lambda chip, *key: offered)


def nothing(config: Config) -> None:
    pass


def stored(folder: Path) -> dict[str, dict[str, dict[str, int]]]:
    content = json.loads((folder / "a-fast-gpu.json").read_text())
    assert content["gpu"] == CHIP.name
    assert content["triton"] == triton.__version__
    return content["choices"]


def test_the_first_one_is_taken_unless_tuning(measured: list[tuple[str, int]]) -> None:
    assert tuner().choose(X, ("bf16", 128), nothing) == OFFERED[0]
    assert not measured


def test_tuning_measures_a_key_once(measured: list[tuple[str, int]]) -> None:
    t = tuner()
    with common.tuning():
        assert t.choose(X, (1,), nothing) == OFFERED[-1]
        assert t.choose(X, (1,), nothing) == OFFERED[-1]
        assert [block for _, block in measured] == [16, 32, 64]
        t.choose(X, (2,), nothing)
        assert len(measured) == 6
    assert t.choose(X, (1,), nothing) == OFFERED[-1]
    assert t.choose(X, (3,), nothing) == OFFERED[0]


def test_what_was_decided_before_tuning_is_forgotten(measured: list[tuple[str, int]]) -> None:
    t = tuner()
    assert t.choose(X, (1,), nothing) == OFFERED[0]
    with common.tuning():
        t.choose(X, (1,), nothing)
    assert t.choose(X, (1,), nothing) == OFFERED[-1]


def test_without_run_nothing_is_measured(measured: list[tuple[str, int]]) -> None:
    with common.tuning():
        assert tuner().choose(X, (1,)) == OFFERED[0]
    assert not measured


def test_choices_survive_the_process(measured: list[tuple[str, int]], tmp_path: Path) -> None:
    with common.tuning():
        tuner().choose(X, ("bf16", True, 128), nothing)
    path = common.save_choices(CHIP.name, tmp_path)
    assert path.name == "a-fast-gpu.json"
    assert stored(tmp_path) == {
        "demo": {"bf16,True,128": {"BLOCK": 64, "num_warps": 4, "num_stages": 2}}
    }
    common.load_choices()
    assert tuner().choose(X, ("bf16", True, 128), nothing) == OFFERED[0]
    common.load_choices(tmp_path)
    assert tuner().choose(X, ("bf16", True, 128), nothing) == OFFERED[-1]
    assert tuner().choose(X, ("bf16", True, 64), nothing) == OFFERED[0]


def test_a_users_choice_wins_over_the_packages(
    measured: list[tuple[str, int]], tmp_path: Path
) -> None:
    for folder, block in (("package", 32), ("user", 64)):
        tuning._measured[CHIP.name] = {"demo": {"1": Config.of(BLOCK=block)}}
        common.save_choices(CHIP.name, tmp_path / folder)
    common.load_choices(tmp_path / "package", tmp_path / "user", tmp_path / "nowhere")
    assert tuner().choose(X, (1,)) == OFFERED[2]
    common.load_choices(tmp_path / "user", tmp_path / "package")
    assert tuner().choose(X, (1,)) == OFFERED[1]


def test_saving_adds_only_what_was_measured(
    measured: list[tuple[str, int]], tmp_path: Path
) -> None:
    """Save only measured choices. A newer package's would lose to copies of the old package's."""
    tuning._measured[CHIP.name] = {"demo": {"1": OFFERED[1]}}
    common.save_choices(CHIP.name, tmp_path / "package")
    common.load_choices(tmp_path / "package")
    with common.tuning():
        tuner().choose(X, (2,), nothing)
    common.save_choices(CHIP.name, tmp_path / "user")
    assert list(stored(tmp_path / "user")["demo"]) == ["2"]
    common.save_choices(CHIP.name, tmp_path / "package")
    assert list(stored(tmp_path / "package")["demo"]) == ["1", "2"]


def test_tuning_measures_what_is_stored_too(
    measured: list[tuple[str, int]], tmp_path: Path
) -> None:
    tuning._measured[CHIP.name] = {"demo": {"1": OFFERED[1]}}
    common.save_choices(CHIP.name, tmp_path)
    common.load_choices(tmp_path)
    with common.tuning():
        assert tuner().choose(X, (1,), nothing) == OFFERED[2]
    common.save_choices(CHIP.name, tmp_path)
    assert stored(tmp_path)["demo"]["1"]["BLOCK"] == 64


def test_a_stale_choice_is_ignored(measured: list[tuple[str, int]], tmp_path: Path) -> None:
    tuning._measured[CHIP.name] = {"demo": {"1": Config.of(BLOCK=64, OLD=1)}}
    common.save_choices(CHIP.name, tmp_path)
    common.load_choices(tmp_path)
    assert tuner().choose(X, (1,)) == OFFERED[0]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"gpu": 1}', '{"choices": {"demo": 3}}', '{"choices": {"demo": {"1": [16]}}}'],
)
def test_a_broken_file_is_an_error_that_names_it(
    text: str, measured: list[tuple[str, int]], tmp_path: Path
) -> None:
    path = tmp_path / "a-fast-gpu.json"
    path.write_text(text)
    common.load_choices(tmp_path)
    for attempt in (
        lambda: tuner().choose(X, (1,)),
        lambda: common.save_choices(CHIP.name, tmp_path),
    ):
        with pytest.raises(ValueError, match=r"a-fast-gpu\.json.*delete it"):
            attempt()
    assert path.read_text() == text
    assert not list(tmp_path.glob("*.partial"))


def test_another_gpus_file_is_not_read(measured: list[tuple[str, int]], tmp_path: Path) -> None:
    (tmp_path / "another-gpu.json").write_text("{")
    common.load_choices(tmp_path)
    assert tuner().choose(X, (1,)) == OFFERED[0]


def test_nothing_offered_is_an_error(measured: list[tuple[str, int]]) -> None:
    with pytest.raises(ValueError, match="demo: no configuration fits A Fast GPU for bf16,1"):
        tuner([]).choose(X, ("bf16", 1))


def test_nothing_that_launches_is_an_error_and_not_stored(
    measured: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_milliseconds", lambda run, config: float("inf"))
    with (
        common.tuning(),
        pytest.raises(RuntimeError, match="demo: no configuration for 1 launches"),
    ):
        tuner().choose(X, (1,), nothing)
    assert tuner().choose(X, (1,)) == OFFERED[0]


def test_force(measured: list[tuple[str, int]]) -> None:
    other = Config.of(BLOCK=8)
    t = tuner()
    t.choose(X, (1,))
    with common.force("demo", other):
        assert t.choose(X, (1,)) == other
        with common.force("demo", OFFERED[1]):
            assert t.choose(X, (1,)) == OFFERED[1]
        assert t.choose(X, (1,)) == other
    assert t.choose(X, (1,)) == OFFERED[0]


def test_recording_walks_through_the_offers() -> None:
    for index, wanted in enumerate((*OFFERED, OFFERED[-1])):
        with common.record(CHIP, index) as recording:
            assert tuner().choose(X, (1,)) == wanted
        assert recording.offers == {"demo": OFFERED}


def test_launch_finds_the_tensor_and_skips_empty_grids() -> None:
    with common.record(CHIP) as recording:
        common.launch(None, (4,), X, 3, config=OFFERED[0], K=1)
        common.launch(None, (4, 0), X, config=OFFERED[0])
    (launch,) = recording.launches
    assert (launch.grid, launch.constants, launch.config) == ((4,), {"K": 1}, OFFERED[0])
    with pytest.raises(TypeError, match="want a tensor"):
        common.launch(None, (1,), 3, config=OFFERED[0])


def test_f34_eight_threads_with_a_cold_cache(measured: list[tuple[str, int]]) -> None:
    """Measure each key in one thread, and never in two threads at once."""
    a, b = tuner(), Tuner("other", lambda chip, *key: OFFERED)
    start = threading.Barrier(8)

    def choose(index: int) -> list[Config]:
        start.wait()
        return [t.choose(X, (key,), nothing) for key in range(4) for t in (a, b)]

    with common.tuning(), ThreadPoolExecutor(8) as pool:
        chosen = list(pool.map(choose, range(8)))
    assert chosen == [[OFFERED[-1]] * 8] * 8
    assert [block for _, block in measured] == [16, 32, 64] * 8
    groups = [measured[i : i + 3] for i in range(0, len(measured), 3)]
    assert all(len({name for name, _ in group}) == 1 for group in groups)
    with ThreadPoolExecutor(8) as pool:  # reading, too, with nothing loaded
        common.load_choices()
        assert set(pool.map(lambda _: a.choose(X, (0,)), range(64))) == {OFFERED[0]}


def test_f34_a_tuner_within_a_tuner(measured: list[tuple[str, int]]) -> None:
    """Let run() call a launcher that asks another Tuner."""
    inner, outer = tuner(), Tuner("outer", lambda chip, *key: OFFERED)
    chosen: list[Config] = []

    def choose() -> None:
        chosen.append(outer.choose(X, (1,), lambda config: inner.choose(X, (1,), nothing)))

    threads = [threading.Thread(target=choose, daemon=True) for _ in range(4)]
    with common.tuning():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert chosen == [OFFERED[-1]] * 4


def test_f32_tuning_a_kernel_that_works_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run each op before, during (with a cold cache) and after tuning, with one result. While it
    tunes, every configuration runs several times, into memory of its own."""
    monkeypatch.setattr(tuning, "_can_measure", lambda t: True)
    runs = []

    def milliseconds(run: Callable[[Config], object], config: Config) -> float:
        runs.append(config)
        run(config)
        run(config)
        return 1.0 / len(runs)  # the last one wins, not the one that serves without tuning

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    torch.manual_seed(0)
    x, residual, weight = torch.randn(3, 64), torch.randn(3, 64), torch.randn(64)
    q, k, v = torch.randn(3, 4, 16), torch.randn(3, 2, 16), torch.randn(3, 2, 16)
    table = lf.rope_table(1e4, 16, head_dim=16)
    at, slots = torch.tensor([0, 5, 7]), torch.tensor([1, -1, 6])

    def every_op() -> list[torch.Tensor]:
        caches = torch.full((2, 2, 4, 2, 16), 7.0)
        a, r, w = x.clone(), residual.clone(), weight.clone()
        out = [
            *lf.add_rms_norm(a, r, w),
            *(t.float() for t in lf.rms_norm_fp8(a, w, residual=r)),
            lf.apply_rope_and_append(q, k, v, at, table, *caches, slots),
            *caches,
            lf.attention_with_kvcache(q[:2, None], *caches, torch.tensor([4, 3]).int()),
        ]
        assert torch.equal(a, x) and torch.equal(r, residual) and torch.equal(w, weight)
        return out

    with lf.use_backend("triton"):
        before = every_op()
        with common.tuning():
            cold = every_op()
            warm = every_op()
        after = every_op()
    for other in (cold, warm, after):
        for a, b in zip(before, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


TINY = dataclasses.replace(
    lf.LlamaConfig.llama_3_1_8b(),
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rope_scaling=None,
)


def test_tune_reaches_every_tuner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run llama-fast tune at tiny shapes. It must measure every choice."""
    seen = set()

    def milliseconds(run: Callable[[Config], object], config: Config) -> float:
        seen.add(config)
        return 1.0

    monkeypatch.setattr(tuning, "_can_measure", lambda t: True)
    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    with lf.use_backend("triton"), torch.inference_mode(), common.tuning():
        for _, call in tune.calls(TINY, torch.device("cpu"), (1, 70), ((2, 150),), 130):
            call()
    modules = [importlib.import_module(f"llama_fast.kernels.{p.stem}") for p in KERNELS]
    tuners = {t.name for m in modules for t in vars(m).values() if isinstance(t, Tuner)}
    (chip,) = tuning._measured
    assert len(tuners) >= 9 and set(tuning._measured[chip]) == tuners
    path = common.save_choices(chip, tmp_path)
    assert set(json.loads(path.read_text())["choices"]) == tuners


def race(kind: str, folder: Path) -> list[str]:
    ambient = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.static.race", kind, folder],
        cwd=ROOT,
        env=ambient,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_f35_processes_with_one_fresh_compile_cache(tmp_path: Path) -> None:
    hashes = race("compile", tmp_path)
    assert len(hashes) == 2 * 4 and len(set(hashes)) == 1
    assert not list(tmp_path.rglob("*.tmp*"))


def test_f35_processes_save_to_one_file(tmp_path: Path) -> None:
    assert len(race("save", tmp_path)) == 4
    choices = json.loads((tmp_path / "a-gpu.json").read_text())["choices"]["race"]
    assert set(choices) == {f"{i},{step}" for i in range(4) for step in range(8)}
    assert not list(tmp_path.glob("*.partial"))
