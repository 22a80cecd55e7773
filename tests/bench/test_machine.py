"""Tests of how the suite adapts to a machine: its speed, smaller cases, a product's limit."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast import _cpu, cpu
from llama_fast.bench import cases, suite, timing
from llama_fast.bench.__main__ import main
from llama_fast.bench.cases import measured, shapes
from llama_fast.bench.model import forward, jobs, models
from llama_fast.bench.results import compare, page, report
from llama_fast.bench.timing import CPU, clock, limits, machine
from llama_fast.bench.timing.machine import Speed

from .runs import Bench

# Processors of about two cores each. T: 1e12 operations a second.
T, G = 1e12, 1e9
ZEN4 = Speed(bf16=0.4 * T, fp32=0.2 * T, fma=0.235 * T, fma_bf16=0.47 * T, read=43 * G)
SKYLAKE_X = Speed(bf16=0.15 * T, fp32=0.15 * T, fma=0.2 * T, fma_bf16=0.2 * T, read=20 * G)
ZEN3 = Speed(bf16=0.022 * T, fp32=0.11 * T, fma=0.22 * T, fma_bf16=0.22 * T, read=35 * G)
AMX = Speed(bf16=1.5 * T, fp32=0.15 * T, fma=0.2 * T, fma_bf16=0.4 * T, read=30 * G)
OLD = Speed(bf16=0.005 * T, fp32=0.03 * T, fma=0.03 * T, fma_bf16=0.03 * T, read=8 * G)


@pytest.mark.parametrize(
    "speed, slow", [(ZEN4, False), (AMX, False), (SKYLAKE_X, True), (ZEN3, True), (OLD, True)]
)
def test_fp32_is_measured_where_bf16_is_no_faster(speed: Speed, slow: bool) -> None:
    """Decide by the measured products, not by the processor's instruction sets."""
    assert speed.bf16_is_slow == slow
    columns = {
        "attention": {"eager fp32", "SDPA fp32"},
        "attention_with_kvcache": {"eager fp32", "SDPA fp32"},
        "fp8_linear": {"eager fp32", "F.linear fp32"},
        "linear": {"F.linear fp32"},
    }
    with torch.inference_mode():
        for plan in cases.plan(cases.spec("tiny", speed=speed)):
            made = plan.make()
            fp32 = {name for name in made.baselines if name.endswith(" fp32")}
            plain = not any(kind in plan.shape for kind in ("packed", "paged", "FP8 cache"))
            assert fp32 == (columns.get(plan.op, set()) if slow and plain else set()), plan.name
            assert set(made.baselines) <= set(cases.BASELINES), plan.name
            exact = made.exact()
            for name in fp32:
                error = cases.relative_error(made.value(made.baselines[name](0)), exact)
                # The same result with fp32's error: 2^-24 times sums of 64 to 128 terms. But the
                # weights of F.linear have not been rounded to FP8, which keeps them to 2^-4.
                fp8 = plan.op == "fp8_linear" and name == "F.linear fp32"
                assert error < (2.0**-4 if fp8 else 1e-5), f"{plan.name}: {name}"
    for spec in (
        cases.spec("tiny", torch.float32, speed=speed),
        cases.spec("tiny", device=torch.device("cuda"), speed=speed),
    ):
        assert not spec.fp32_too


@pytest.mark.parametrize(
    "speed, dtype, wanted",
    [
        (ZEN4, torch.bfloat16, ("fma", 0.47 * T)),
        (ZEN4, torch.float32, ("fma", 0.235 * T)),
        (ZEN3, torch.bfloat16, ("fma", 0.22 * T)),
        (AMX, torch.bfloat16, ("bf16", 1.5 * T)),
        # Our kernels are held to fewer instructions than PyTorch's.
        (
            dataclasses.replace(ZEN4, fma=0.08 * T, fma_bf16=0.08 * T),
            torch.float32,
            ("fp32", 0.2 * T),
        ),
        # A neighbor ran during the loop: no product is faster than the registers allow.
        (dataclasses.replace(ZEN3, fp32=0.23 * T), torch.bfloat16, ("fma", 0.22 * T)),
    ],
)
def test_the_limit_is_the_fastest_means(
    speed: Speed, dtype: torch.dtype, wanted: tuple[str, float]
) -> None:
    assert speed.fastest(dtype) == (wanted[0], pytest.approx(wanted[1]))
    run, work, name = limits.compute(dtype, CPU, speed)
    assert name == ("fma" if wanted[0] == "fma" else "matmul") and work > 1e8
    product = run(0)
    if name == "matmul":
        assert product.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[wanted[0]]  # type: ignore[attr-defined]
    for op in ("attention", "fp8_linear"):
        with torch.inference_mode():
            last = cases.plan(cases.spec("tiny", dtype, speed=speed), [op])[-1].make()
        assert last.limit.name == name and last.limit.computes


def test_multiply_adds_are_done(isa: str) -> None:
    """Require as many operations as the loop reports: if the compiler had emptied it, it would be
    faster than any processor (two vectors a cycle at 6.5 GHz)."""
    lanes = {"generic": 8, "avx2": 8}.get(isa, 16)
    for pairs in (False, True):
        each = 2 * lanes * (2 if pairs and isa == "avx512_bf16" else 1)
        assert _cpu.multiply_add_probe(pairs, 1.0, 1) % each == 0
        start = time.perf_counter()
        done = _cpu.multiply_add_probe(pairs, 1e8, 1)
        assert 1e8 <= done < 1.1e8
        assert done / (time.perf_counter() - start) < 2 * each * 6.5e9
        few, many = (_cpu.multiply_add_probe(pairs, 5e7, threads) for threads in (1, 3))
        assert few == many


def test_speed_is_measured() -> None:
    found = machine.measure()
    for name, value in dataclasses.asdict(found).items():
        assert 1e8 < value < 1e15, name
    assert "TFLOP/s" in str(found) and "stand beside" in str(ZEN3) and "slow" not in str(ZEN4)


def test_a_fast_machine_runs_everything() -> None:
    for speed in (ZEN4, machine.UNBOUND):
        assert cases.spec("8b", speed=speed).sweep == shapes.sweep("8b", CPU, "default")
        sizes = jobs.plan("default", speed)
        assert sizes.jobs == jobs.JOBS["default"] and sizes.config == models.shape()
        assert sizes.part == 1 and sizes.checked == jobs.CHECKED


@pytest.mark.parametrize("speed", [ZEN4, SKYLAKE_X, ZEN3, AMX, OLD])
def test_jobs_fit_the_machine(speed: Speed) -> None:
    """Choose jobs by the measured speed: the seconds of the fewest calls of all jobs."""
    sizes = jobs.plan("default", speed)
    prefill, decode = sizes.jobs
    flops = models.prefill_flops(sizes.config, prefill.tokens)
    rival = speed.fp32 if speed.bf16_is_slow else speed.bf16
    seconds = 2 * flops / speed.ours + flops / rival
    if speed.bf16_is_slow:
        seconds += flops / speed.bf16 / sizes.part
        assert flops / speed.bf16 / sizes.part < 5.0
    assert (jobs.FEW + jobs.BESIDE) * seconds < 1.2 * jobs.PROMPTS
    assert decode.depth == prefill.tokens and decode.tokens >= 2
    assert prefill.tokens % sizes.part == 0
    assert jobs.plan("full", speed).jobs == jobs.JOBS["full"]


def test_a_slow_machine_runs_less() -> None:
    zen3, old = (jobs.plan("default", speed) for speed in (ZEN3, OLD))
    assert old.jobs[0].tokens < zen3.jobs[0].tokens < models.PREFILL
    assert zen3.part > 1 and zen3.rounds == jobs.FEW
    assert old.config.num_hidden_layers < zen3.config.num_hidden_layers == 4
    sizes, layer = cases.spec("8b", speed=OLD).sweep, shapes.layer_shapes("8b")
    assert sizes.prompts == (1024,) and sizes.rows == (1, 16, 128)
    n, k = layer.linears["up"]
    for work in (2.0 * 1024**2 * 4096, 2.0 * 128 * n * k):
        assert work < shapes.CALL * OLD.ours
    full = cases.spec("8b", level="full", speed=OLD).sweep
    assert full == shapes.sweep("8b", CPU, "full")


def test_a_part_is_scaled_to_the_whole() -> None:
    runs = {"ours": lambda i: time.sleep(2e-3), "part": timing.Part(lambda i: time.sleep(5e-3), 4)}
    found = timing.measure(runs, 0.1)
    assert found["part"].p10 >= 0.02 and found["ours"].p10 < found["part"].p10


def test_a_long_first_call_counts_as_a_round() -> None:
    called = []
    runs = {"ours": lambda i: called.append(i) or time.sleep(0.03)}
    assert timing.measure(runs, 0.1, least=2)["ours"].rounds == len(called)


def test_a_slow_baseline_is_measured_smaller_and_labeled(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(measured.BUDGETS, "quick", 1e-9)  # nothing is fast enough
    monkeypatch.setattr(cpu, "INT16_ROWS", 2**31)  # no further column on AVX2
    status, document = bench("--op", "fp8_linear", "--no-plot")
    assert status == 0
    for r in document["ops"]:
        assert {"eager, 1/8 of it", "bf16 F.linear, 1/8 of it"} <= set(r["times"])
        assert "eager" not in r["times"] and set(r["errors"]) == {"ours"}
        assert "bf16 F.linear" not in r["targets"]
        line = report.line(r, targets=True)
        assert "eager, 1/8 of it" in line and "1/n of it" in report.LEGEND
        (head, _, row) = page.ops([r])
        assert " eager " in head and "eager, 1/8 of it:" in row and " peers " not in head


def test_a_part_computes_a_share_of_the_columns() -> None:
    with torch.inference_mode():
        for plan in cases.plan(cases.spec("tiny", speed=ZEN3), ["fp8_linear"]):
            made = plan.make()
            for name, less in made.parts.items():
                out: Any = less(8)(0)
                assert 8 * out.shape[-1] == made.ours(0).shape[-1], name  # type: ignore[attr-defined]


@pytest.mark.parametrize("seconds", [0.0, 0.01])  # the first pass takes longer
def test_no_pass_begins_that_cannot_end(
    seconds: float,
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(suite.OPS_SECONDS, "quick", seconds)
    status, document = bench("--op", "rms_norm,linear", "--no-plot")
    assert status == 0 and document["complete"]
    for r in document["ops"]:
        assert all(len(t["passes"]) == 1 for t in r["seconds"].values())
    assert (
        sum(line[:8] in ("rms_norm", "linear  ") for line in capsys.readouterr().out.splitlines())
        == 2
    )


def test_a_pass_of_the_forward_pass_begins_only_if_it_can_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[str] = []
    monkeypatch.setattr(
        forward,
        "measure",
        lambda runs, *_, **__: taken.append("") or {"a": timing.Timing(([1.0],))},
    )
    sizes = jobs.plan("default", machine.UNBOUND)
    for within, passes in ((float("inf"), 3), (-1.0, 1)):
        taken.clear()
        asked = forward.Asked("default", passes=3)
        assert list(forward._passes(asked, sizes, 3, lambda job: {}, within))
        assert len(taken) == passes * len(sizes.jobs)


def test_torch_compile_has_its_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert suite.OPS_SECONDS["default"] + jobs.ALL <= 240.0  # of 300, with a pass that overran
    monkeypatch.setattr(measured, "COMPILE_SECONDS", -1.0)
    monkeypatch.setattr(clock, "MAX_ROUNDS", clock.MIN_ROUNDS)
    file = tmp_path / "a.json"
    options = ["--model", "tiny", "--peers", "none", "--op", "rms_norm", "--no-plot"]
    assert main([*options, "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["ops"]
    assert "eager" in row["times"] and "torch.compile" not in row["times"]


def test_a_restricted_run_is_marked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Print a warning, and refuse to compare such a run with one that is not held down. Older
    files, which lack the entry, still compare."""
    _, free = bench("--op", "rms_norm", "--no-plot")
    assert free["environment"]["torch_isa"] == torch.backends.cpu.get_cpu_capability()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    capsys.readouterr()
    _, held = bench("--op", "rms_norm", "--no-plot")
    heading = capsys.readouterr().out.splitlines()[0]
    for entry in (f"isa {_cpu.isa()}", "torch_isa DEFAULT", "onednn_max_isa AVX2"):
        assert entry in heading
    with pytest.raises(ValueError, match="torch_isa"):
        compare.check(free, held)
    old = json.loads(json.dumps(free))
    for name in ("torch_isa", "onednn_max_isa"):
        del old["environment"][name]
    compare.check(old, held)


def test_limits_of_two_kinds_are_not_compared() -> None:
    """Ignore the limit if one run bounds a row by a product and the other by multiply-adds."""
    seconds = {name: {"passes": [t]} for name, t in {"ours": 1.0, "limit": 2.0}.items()}
    old = {"op": "a", "shape": "", "limit": "matmul", "seconds": seconds}
    new = {**old, "limit": "fma", "seconds": {**seconds, "limit": {"passes": [0.1]}}}
    assert compare.change("a", old, old) is not None
    assert compare.change("a", old, new) is None
