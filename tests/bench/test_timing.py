"""Tests of how the suite measures on a CPU: turns, passes, ratios, places in memory, limits."""

from __future__ import annotations

import ctypes
import functools
import math
import operator
import subprocess
import sys
import time

import pytest
import torch

from llama_fast import _cpu
from llama_fast.bench import cases, timing
from llama_fast.bench.cases import case
from llama_fast.bench.timing import clock, memory, read_probe


def test_measure_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm each run up on another buffer, which is not timed."""
    monkeypatch.setattr(clock, "MAX_ROUNDS", clock.MIN_ROUNDS)
    monkeypatch.setattr(clock, "WARM", 0.0)
    order: list[tuple[str, int]] = []
    runs = {name: lambda i, name=name: order.append((name, i)) for name in "ab"}
    result = timing.measure(runs, 1.0)
    assert order[4:12] == [(n, i) for i, n in enumerate("baab") for i in (i // 2 + 1, i // 2)]
    assert {t.rounds for t in result.values()} == {clock.MIN_ROUNDS}


def test_waits_for_threads_of_the_previous_run() -> None:
    """Let a run's threads spin on for 2 ms. They are done when the next run is timed."""
    until = [0.0]

    def spinner(i: int) -> None:
        until[0] = time.perf_counter() + 2e-3

    def late(i: int) -> None:
        while time.perf_counter() < until[0]:
            pass

    result = timing.measure({"ours": late, "spinner": spinner}, 0.1)
    assert result["ours"].p10 < 5e-4  # not the median: other tests run beside this one


def test_a_slow_baseline_has_a_budget_of_its_own() -> None:
    """Measure slow baselines. They must not cost the others rounds."""
    pauses = {"ours": 1e-4, "near": 3e-4, "slow": 0.05, "slower": 0.25}
    runs = {name: lambda i, s=s: time.sleep(s) for name, s in pauses.items()}
    result = timing.measure(runs, 0.4)
    assert result["slower"].rounds == clock.SLOW_ROUNDS
    assert clock.SLOW_ROUNDS < result["slow"].rounds <= 8
    assert result["ours"].rounds == result["near"].rounds > result["slow"].rounds


def test_all_have_few_rounds_if_ours_is_slow() -> None:
    runs = {"ours": lambda i: time.sleep(0.02), "other": lambda i: time.sleep(0.04)}
    assert {t.rounds for t in timing.measure(runs, 0.01).values()} == {clock.SLOW_ROUNDS}


def test_ratio_is_taken_within_rounds() -> None:
    """Slow both down, as a machine does. Their ratio then has no error."""
    drift = [1.0 + 0.1 * i for i in range(40)]
    found = timing.ratio(timing.Timing((drift,)), timing.Timing(([2 * t for t in drift],)))
    assert found["log"] == pytest.approx(math.log(2)) and found["error"] < 1e-12


def test_ratio_sees_what_changes_between_passes() -> None:
    """Let rounds agree within each pass and differ between passes."""
    ours = timing.Timing(
        (
            [1.0] * 20,
            [1.5] * 20,
            [1.0] * 20,
        )
    )
    other = timing.Timing(tuple([[2.0] * 20] * 3))
    found = timing.ratio(ours, other)
    assert found["log"] == pytest.approx(math.log(2)) and found["error"] > 0.1


def test_preparing_is_not_timed() -> None:
    def run(i: int) -> None: ...

    run.prepare = lambda: time.sleep(5e-3)  # type: ignore[attr-defined]
    assert max(*timing.measure({"ours": run}, 0.05)["ours"].passes[0]) < 5e-3


def test_passes_share_the_rounds_and_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "MAX_ROUNDS", clock.MIN_ROUNDS)
    runs = {"ours": lambda i: time.sleep(1e-3), "other": lambda i: time.sleep(2e-3)}
    passes = [timing.measure(runs, 0.3, passes=3) for _ in range(3)]
    assert [p["ours"].rounds for p in passes] == [3, 3, 3]  # 9 rounds in 3 passes
    found = timing.joined(passes)
    assert found["ours"].rounds == 9
    assert found["ours"].passes == tuple(p["ours"].passes[0] for p in passes)
    assert found["ours"].to_json()["passes"] == [p["ours"].p10 for p in passes]


def test_runs_that_missed_a_pass_are_left_out() -> None:
    one, two = timing.Timing(([1.0],)), timing.Timing(([2.0],))
    assert set(timing.joined([{"ours": one, "flaky": one}, {"ours": two}])) == {"ours"}


def test_activations_begin_at_many_places_of_one_buffer() -> None:
    """Shift by cache lines, within a page beyond one tensor. The op gives the same at each."""
    spec = cases.spec("tiny")
    views = spec.rotating(8, 64)
    places = [t.data_ptr() for t in views]
    assert len(set(places)) > 4 and max(places) - min(places) < case.PAGE
    assert all((p - places[0]) % case.LINE == 0 for p in places)
    assert len({t.untyped_storage().data_ptr() for t in views}) == 1
    for plan in cases.plan(spec, ["rms_norm", "add_rms_norm", "apply_rope", "silu_and_mul"]):
        made = plan.make()
        addresses = {made.arguments(i)[0].data_ptr() for i in range(case.PLACES)}
        assert len(addresses) > 1, plan.name


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_kept_memory_costs_no_page_faults() -> None:
    """Free three times 24 MiB, more than glibc keeps by default, in another process, because
    malloc's options hold for a whole process."""
    program = """
import resource, torch
from llama_fast.bench.timing import memory
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def cost():
    before = faults()
    kept = [torch.ones(6 << 20) for _ in range(3)]
    return faults() - before
cost()
lost = cost()
assert memory.keep_freed()
for _ in range(5):
    cost()  # until the heap has room for all three, wherever the first came to lie
print(lost, cost())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lost, kept = map(int, done.stdout.split())
    assert kept < 100 < lost


@pytest.mark.parametrize("words", [0, 1, 7, 8, 9, 63, 64, 65, 32768 + 5, 200_001])
@pytest.mark.parametrize("threads", [1, 3])
def test_read_probe_reads_every_word(words: int, threads: int, isa: str) -> None:
    data = torch.randint(-(2**62), 2**62, (words + 2,))
    expected = 0
    for word in data[1:-1].tolist():
        expected ^= word
    address = data.data_ptr() + 8
    assert _cpu.read_bandwidth_probe(address, 8 * words, threads) == expected % 2**64


@pytest.mark.parametrize("words", [1, 4095, 65536, 70001])
def test_a_gpus_read_probe_reads_every_word(words: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = torch.randint(-(2**31), 2**31 - 1, (words,), dtype=torch.int32, device=device)
    sums = read_probe.checksums(data)
    total = functools.reduce(operator.xor, sums.tolist())
    assert total == functools.reduce(operator.xor, data.tolist())
    assert sums.numel() == -(-words // (read_probe.BLOCK * read_probe.STEPS))


def test_peak_memory_counts_freed_memory() -> None:
    with memory.peak_memory(torch.device("cpu")) as nothing:
        pass
    with memory.peak_memory(torch.device("cpu")) as some:
        torch.ones(16 << 20)
    assert nothing.bytes < 8 << 20 and 60 << 20 <= some.bytes < 96 << 20
