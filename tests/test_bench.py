"""The benchmark suite on tiny shapes: what it writes, prints, compares and refuses."""

from __future__ import annotations

import csv
import json
import math
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import llama_fast as lf
from llama_fast import _cpu
from llama_fast.bench import case, cases, compare, end_to_end, models, peers, shapes, suite, timing
from llama_fast.bench.__main__ import main
from llama_fast.bench.case import Plan

TINY = ["--quick", "--model", "tiny", "--peers", "none"]
Bench = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """bench(options) -> exit status, the JSON file. A few rounds of each case."""
    monkeypatch.setattr(timing, "MAX_ROUNDS", timing.MIN_ROUNDS)

    def run(*options: str) -> tuple[int, dict[str, Any]]:
        path = tmp_path / "figures.json"
        status = main([*TINY, "--json", str(path), *options])
        return status, json.loads(path.read_text())

    return run


def test_figures_of_every_op(bench: Bench) -> None:
    status, document = bench("--threads", "1", "--no-plot")
    assert status == 0 and document["complete"] and document["environment"]["threads"] == 1
    assert {r["op"] for r in document["ops"]} == set(cases.OPS)
    for r in document["ops"]:
        label = f"{r['op']} {r['shape']}"
        assert r["unit"] in ("GB/s", "TFLOP/s") and r["work"] > 0, label
        assert r["work"] == r["bytes" if r["unit"] == "GB/s" else "flops"], label
        assert r["rate"] > 0 and r["limit_rate"] > 0 and r["axes"], label
        assert r["of_limit"] == pytest.approx(r["rate"] / r["limit_rate"]), label
        assert 0 <= r["error"] < 0.1 and 0 <= r["eager_error"] < 0.1 and not r["wrong"], label
        assert set(r["errors"]) | {"limit"} == set(r["seconds"]), label
        assert {"ours", "limit"} < set(r["seconds"]), label
        for name, t in r["seconds"].items():
            assert 0 < t["p10"] <= t["median"] <= t["p90"], f"{label} {name}"
            assert timing.SLOW_ROUNDS <= t["rounds"] <= timing.MIN_ROUNDS
            if name != "ours":
                assert t["ratio"]["error"] >= 0 and math.isfinite(t["ratio"]["log"])
        for name, value in r["times"].items():
            seconds = r["seconds"]
            assert value == seconds[name]["median"] / seconds["ours"]["median"], label
        assert set(r["met"]) == set(r["targets"]), label


def test_every_row_of_the_targets_is_measured() -> None:
    """What each case is compared with includes everything that it has a target against."""
    for plan in cases.plan(cases.spec("tiny")):
        made = plan.make()
        offered = {"limit", *made.baselines, "torch._scaled_mm"}  # which not every torch has
        assert set(made.targets) <= offered, plan.name
        assert set(made.baselines) <= set(cases.BASELINES), plan.name


@pytest.mark.parametrize("tp", shapes.TP)
@pytest.mark.parametrize("model", ("8b", "70b", "405b"))
def test_shapes_of_a_rank(model: str, tp: int) -> None:
    """Together the ranks hold the layer's weights, key/value heads aside, which are repeated."""
    whole, rank = shapes.shapes(model), shapes.shapes(model, tp)
    for name in ("gate_up", "down", "output"):
        n, k = rank.linears[name]
        assert tp * n * k == whole.linears[name][0] * whole.linears[name][1]
    assert rank.heads * tp == whole.heads and rank.heads % rank.kv_heads == 0


def test_full_covers_what_it_says() -> None:
    """M from 1 to 16384, attention to 131072, batches to 64."""
    gpu = shapes.sweep("8b", torch.device("cuda"), "full")
    assert {1, 16384} <= set(gpu.tokens) and {1, 16384} <= set(gpu.rows)
    assert {128, 131072} <= set(gpu.prompts) and (64, 4096) in gpu.caches
    cpu = shapes.sweep("8b", torch.device("cpu"), "full")
    assert {1, 16384} <= set(cpu.tokens) and (1, 131072) in cpu.caches
    assert max(batch for batch, _ in cpu.caches) == 64


def test_what_does_not_fit_is_skipped_by_name(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "free_memory", lambda device: 1e5)
    status, document = bench("--op", "rms_norm,linear", "--no-plot")
    assert status == 0 and [r["op"] for r in document["ops"]] == ["rms_norm"]
    assert "linear M=1, 128 x 64: skipped, needs about" in capsys.readouterr().out
    assert "GiB of memory" in document["skipped"]["linear M=1, 128 x 64"]


def test_memory_estimates_hold() -> None:
    """A case takes no more than it says; what it says is within reason."""
    assert case.free_memory(case.CPU) > 1e8
    for plan in cases.plan(cases.spec("8b"), ["rms_norm", "attention_with_kvcache", "linear"]):
        assert 1e6 < plan.memory < 8e9, plan.name


def test_report(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench("--op", "rms_norm", "--plot", str(tmp_path / "plot.png"))
    out = capsys.readouterr().out
    for wanted in ("median (p10-p90) ms", "of limit", "x eager", "targets met:", "torch 2"):
        assert wanted in out
    for name in ("figures.json", "plot.png", "plot.svg"):
        assert (tmp_path / name).stat().st_size > 500 and str(tmp_path / name) in out


def test_csv(bench: Bench, tmp_path: Path) -> None:
    _, document = bench("--op", "rms_norm", "--no-plot", "--csv", str(tmp_path / "sub" / "a.csv"))
    with (tmp_path / "sub" / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    (figures,) = document["ops"]
    assert [r["implementation"] for r in rows] == ["ours", "eager", "F.rms_norm"]
    for r in rows:
        name = r["implementation"]
        assert float(r["median_s"]) == figures["seconds"][name]["median"]
        assert float(r["error"]) == figures["errors"][name]
        if name != "ours":
            assert float(r["ours_is_times_faster"]) == pytest.approx(figures["times"][name])


def test_no_host_name(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    _, document = bench("--op", "rms_norm", "--no-plot")
    assert socket.gethostname() not in (capsys.readouterr().out + json.dumps(document)).split()


@pytest.mark.parametrize(
    "options, wanted",
    [
        (["--op", "rms_norn"], "--op: got rms_norn, want any of rms_norm, add_rms_norm, "),
        (["--threads", "0"], "--threads: got 0, want at least 1"),
        (["--tp", "3"], "--tp: got 3, want a divisor of tiny's 8 heads"),
        (["--baseline", "eagre"], "--baseline: got eagre, want any of eager, torch.compile, "),
        (["--peers", "vllm"], "peers: got vllm, want some of llama.cpp, "),
        (["--peers", "flash-attn"], "peer flash-attn: "),
        (["--backend", "triton", "--op", "nothing"], "--op: got nothing"),
        (["--compare", "absent.json"], "absent.json: no such file"),
        (["--csv", "."], "--csv: got a folder, ., want a file"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_bad_options_are_one_line(
    options: list[str],
    wanted: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"bench: {wanted}") and captured.err.count("\n") == 1
    assert not captured.out and not list(tmp_path.iterdir())


def test_a_missing_peer_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(timing, "MAX_ROUNDS", timing.MIN_ROUNDS)
    monkeypatch.setattr(peers.Peer, "missing", lambda self: f"{self.package} is not installed")
    file = tmp_path / "a.json"
    options = ["--quick", "--model", "tiny", "--op", "rms_norm", "--no-plot", "--json", str(file)]
    assert main(options) == 0
    assert "without llama.cpp: llama-cpp-python is not installed" in capsys.readouterr().out
    assert json.loads(file.read_text())["skipped"]["llama.cpp"].endswith("is not installed")


def test_a_peers_runs_stand_beside_ours(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that refuses is named; one that fails costs nobody else."""

    class Stand:
        name = "stand-in"

        def version(self) -> str:
            return "1.0"

        def ops(self, op: str, inputs: Any) -> dict[str, Any]:
            if op == "apply_rope":
                raise peers.Unsupported("no rope here")
            if op == "silu_and_mul":
                return {"stand-in": lambda i: 1 / 0}
            if op == "rms_norm":
                return {"stand-in": lambda i: lf.rms_norm(inputs["x"], inputs["weight"])}
            return {}

    monkeypatch.setattr(suite.peers, "wanted", lambda names, device: ([Stand()], {}))
    status, document = bench("--op", "rms_norm,apply_rope,silu_and_mul", "--no-plot")
    assert status == 0 and document["peers"] == {"stand-in": "1.0"}
    norm = document["ops"][0]
    assert norm["errors"]["stand-in"] == norm["errors"]["ours"] and "stand-in" in norm["times"]
    skipped = document["skipped"]
    assert skipped["apply_rope 8 x 8/4 x 16: stand-in"] == "no rope here"
    assert "zero" in skipped["silu_and_mul 8 x 2*128: stand-in"]


def test_somebody_elses_kernel(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_norms.py").write_text(
        "import llama_fast as lf\ndef fast(x, w, eps): return lf.rms_norm(x, w, eps)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    _, document = bench("--op", "rms_norm", "--no-plot", "--kernel", "rms_norm=my_norms:fast")
    (r,) = document["ops"]
    assert r["errors"]["fast"] == r["errors"]["ours"] and "fast" in r["times"]


@pytest.mark.parametrize(
    "option, wanted",
    [
        ("rms_norm", "want OP=MODULE:FUNCTION"),
        ("norm=math:sqrt", "got op 'norm'"),
        ("rms_norm=no_such_module:f", "No module named"),
        ("rms_norm=math:no_such", "no attribute"),
        ("rms_norm=my.module:ours", "got a function called 'ours'"),
    ],
)
def test_somebody_elses_kernel_that_is_not_there(
    option: str, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main([*TINY, "--kernel", option])
    assert left.value.code == 2 and wanted in capsys.readouterr().err


def test_somebody_elses_kernel_that_fails_costs_its_column(bench: Bench) -> None:
    status, document = bench("--op", "rms_norm", "--no-plot", "--kernel", "rms_norm=math:sqrt")
    assert status == 0 and "sqrt" not in document["ops"][0]["times"]
    assert document["skipped"]["rms_norm 8 x 64: sqrt"].startswith("TypeError: ")


def test_baselines_can_be_chosen(bench: Bench) -> None:
    _, document = bench("--op", "rms_norm", "--no-plot", "--baseline", "torch.compile")
    assert list(document["ops"][0]["times"]) == ["torch.compile"]
    status, document = bench("--no-plot", "--baseline", "none")
    assert status == 0 and {r["op"] for r in document["ops"]} == set(cases.OPS)
    for r in document["ops"]:  # held against eager's error all the same
        assert not r["times"] and r["of_limit"] > 0 and not r["wrong"] and r["eager_error"] > 0


def test_backend_can_be_chosen(bench: Bench) -> None:
    _, document = bench("--op", "rms_norm", "--no-plot", "--backend", "reference")
    (r,) = document["ops"]
    assert document["options"]["backend"] == "reference" and r["error"] == r["eager_error"]


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--peers", "none"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert list(dict.fromkeys(line.split()[0] for line in lines)) == list(cases.OPS)
    assert main(["--list", "--peers", "none", "--full"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 2 * len(lines)


def test_threads_are_restored(bench: Bench, threads: None) -> None:
    torch.set_num_threads(2)
    bench("--op", "rms_norm", "--threads", "1", "--no-plot")
    assert torch.get_num_threads() == 2


def test_interrupted_run_keeps_what_it_has(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> case.Case:
        raise KeyboardInterrupt

    def activations(spec: case.Spec) -> Iterator[Plan]:
        yield Plan("silu_and_mul", "", 0.0, interrupted)

    groups = (*cases.GROUPS[:2], activations, *cases.GROUPS[3:])
    monkeypatch.setattr(cases, "GROUPS", groups)
    status, document = bench("--no-plot")
    assert status == 130 and not document["complete"]
    assert [r["op"] for r in document["ops"]] == ["rms_norm", "add_rms_norm", "apply_rope"]


@pytest.mark.parametrize("factor", [1.05, float("nan")], ids=["five percent off", "NaN"])
def test_wrong_kernel_is_noticed(
    bench: Bench,
    factor: float,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = lf.rms_norm
    monkeypatch.setattr(lf, "rms_norm", lambda *args: right(*args) * factor)
    status, document = bench("--op", "rms_norm", "--no-plot")
    assert status == 1 and document["ops"][0]["wrong"]
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("op", cases.OPS)
def test_every_truth_can_tell(op: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each op is held against is no copy of its own result: a last row doubled is seen."""
    right = getattr(lf, op)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = right(*args, **kwargs)
        out = result[-1] if op == "quantize_fp8" else result
        out = out[0] if isinstance(out, tuple) else out
        out[-1] *= 2
        return result

    with torch.inference_mode():
        for plan in cases.plan(cases.spec("tiny"), [op])[:1]:
            made = plan.make()
            monkeypatch.setattr(lf, op, wrong)
            exact = made.exact()
            assert case.relative_error(made.value(made.ours(0)), exact) > 0.1, plan.name


def test_no_matplotlib(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench("--op", "rms_norm")[0] == 0
    assert "llama_fast[bench]" in capsys.readouterr().err


def test_measure_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each warmed up on another buffer, which is not timed."""
    monkeypatch.setattr(timing, "MAX_ROUNDS", timing.MIN_ROUNDS)
    monkeypatch.setattr(timing, "WARM", 0.0)
    order: list[tuple[str, int]] = []
    runs = {name: lambda i, name=name: order.append((name, i)) for name in "ab"}
    result = timing.measure(runs, 1.0)
    assert order[4:12] == [(n, i) for i, n in enumerate("baab") for i in (i // 2 + 1, i // 2)]
    assert {t.rounds for t in result.values()} == {timing.MIN_ROUNDS}


def test_threads_of_the_one_before_are_waited_for() -> None:
    """Somebody's threads that spin on for 2 ms are done when the next one is timed."""
    until = [0.0]

    def spinner(i: int) -> None:
        until[0] = time.perf_counter() + 2e-3

    def late(i: int) -> None:
        while time.perf_counter() < until[0]:
            pass

    result = timing.measure({"ours": late, "spinner": spinner}, 0.1)
    assert result["ours"].median < 5e-4


def test_a_slow_baseline_costs_few_rounds() -> None:
    runs = {"ours": lambda i: None, "slow": lambda i: time.sleep(0.03)}
    result = timing.measure(runs, 0.02)
    assert result["slow"].rounds == timing.SLOW_ROUNDS
    assert result["ours"].rounds >= timing.MIN_ROUNDS


def test_ratio_is_taken_within_rounds() -> None:
    """A machine that slows down slows both: their ratio has no error then."""
    drift = [1.0 + 0.1 * i for i in range(40)]
    found = timing.ratio(drift, [2 * t for t in drift])
    assert found.log == pytest.approx(math.log(2)) and found.error < 1e-12


def test_ratio_knows_its_error() -> None:
    """About nine in ten intervals of two standard errors hold the truth, with heavy tails too."""
    generator = torch.Generator().manual_seed(0)
    held, errors = 0, []
    for _ in range(200):
        noise = torch.randn(60, generator=generator) * 0.2
        noise[::7] *= 5
        found = timing.ratio([1.0] * 60, (1.1 * noise.exp()).tolist())
        held += abs(found.log - math.log(1.1)) < 2 * found.error
        errors.append(found.error)
    assert held / 200 > 0.85 and 0.02 < sum(errors) / 200 < 0.08


@pytest.mark.parametrize("words", [0, 1, 7, 8, 9, 63, 64, 65, 32768 + 5, 200_001])
@pytest.mark.parametrize("threads", [1, 3])
def test_read_probe_reads_every_word(words: int, threads: int, isa: str) -> None:
    data = torch.randint(-(2**62), 2**62, (words + 2,))
    expected = 0
    for word in data[1:-1].tolist():
        expected ^= word
    address = data.data_ptr() + 8
    assert _cpu.read_bandwidth_probe(address, 8 * words, threads) == expected % 2**64


def narrow() -> lf.LlamaConfig:
    return replace(
        lf.LlamaConfig.llama_3_1_8b(),
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_hidden_layers=2,
        vocab_size=256,
    )


@pytest.mark.parametrize("level", ["default", "full"])
def test_end_to_end(level: str, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """The main job on two narrow layers."""
    jobs = {
        "default": end_to_end.JOBS["default"],
        "full": (end_to_end.Job("tg", 4), end_to_end.Job("pp", 8, 24), end_to_end.Job("tg", 4, 24)),
    }
    monkeypatch.setattr(end_to_end, "JOBS", jobs)
    monkeypatch.setattr(end_to_end, "BUDGETS", dict.fromkeys(jobs, 0.0))
    monkeypatch.setattr(models, "shape", narrow)
    monkeypatch.setattr(timing, "MAX_ROUNDS", timing.MIN_ROUNDS)
    found = end_to_end.run(level, lambda text: None)
    rows = {(r["op"], r["shape"]): r for r in found["rows"]}
    assert set(rows) == {(job.name, w) for job in jobs[level] for w in ("bf16", "FP8")}
    for r in rows.values():
        assert r["tokens_per_s"] == pytest.approx(1e3 / r["ms_per_token"]) and r["of_limit"] > 0
        assert "transformers" in r["times"] and f"of {r['limit']}" in end_to_end.line(r)
        assert r["all_layers_tokens_per_s"] < r["tokens_per_s"] / 8
        assert "ratio" not in r["seconds"][r["shape"]] and "ratio" in r["seconds"]["transformers"]
    logits = found["logits"]
    assert logits["bf16"] <= 2 * logits["transformers"] + 2**-8
    assert logits["FP8"] < 0.2
    text = end_to_end.table(found)
    assert "extrapolated, not run" in text and ("time to first token" in text) == (
        level == "default"
    )
    for name, m in found["memory"].items():
        assert m["weights_gib"] > 0 and m["prompt_gib"] >= 0, name
    memory = found["memory"]
    assert memory["FP8"]["weights_gib"] < 0.75 * memory["bf16"]["weights_gib"]


def test_extrapolation_counts_what_is_not_run() -> None:
    """32 layers and the whole vocabulary, against 4 and 32,000: by flops, and by bytes."""
    config = models.shape()
    whole = end_to_end.whole_config(config)
    assert (whole.num_hidden_layers, whole.vocab_size) == (32, 128256)
    layer = 4096 * (4096 * 2 + 1024 * 2 + 3 * 14336)
    wanted = (4 * layer + 4096 * 32000) / (32 * layer + 4096 * 128256)
    assert end_to_end._bytes_share(config) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("implementation", ["ours", "transformers"])
def test_each_round_decodes_from_the_same_context(implementation: str, one_thread: None) -> None:
    hf = models.transformers_model(narrow())
    model: Any = models.Transformers(hf)
    if implementation == "ours":
        model = models.Ours("bf16", models.same_weights(hf, torch.device("cpu"))["bf16"])
    prompt = models.prompt(narrow(), 40)
    with torch.inference_mode():
        run = model.extend(prompt[:, :30], prompt[:, 30:])
        once, again = run(0).flatten(), run(1).flatten()
        from_scratch = model.logits(prompt)[:, -1].flatten()
    assert torch.equal(once, again)
    assert (once.float() - from_scratch).abs().max() <= 2**-5 * from_scratch.abs().max()


def row(*ratios: tuple[float, float], limit: float | None = None) -> dict[str, Any]:
    """A case whose ours took 1 s, with (how many times longer, error of the logarithm)."""
    named = {f"other {i}": r for i, r in enumerate(ratios)}
    if limit is not None:
        named["limit"] = (limit, 0.02)
    seconds: dict[str, Any] = {"ours": {"median": 1.0}}
    for name, (times, error) in named.items():
        seconds[name] = {"ratio": {"log": math.log(times), "error": error}}
    return {"op": "op", "shape": "shape", "seconds": seconds}


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


def test_what_a_process_cannot_see_of_itself_is_allowed_for() -> None:
    """An op that is bound by a copy depends on where its output lies."""
    old, new = row((2.0, 0.02), limit=0.5), row((2.0 / 1.4, 0.02), limit=0.5 / 1.4)
    found = compare.change("op shape", old, new | {"limit": "read"})
    assert found is not None and found.verdict == "slower"
    found = compare.change("op shape", old, new | {"limit": "copy"})
    assert found is not None and found.verdict == "too noisy to tell"


def test_nobody_to_compare_with() -> None:
    assert compare.change("op shape", row((2.0, 0.1)), row()) is None


@pytest.mark.parametrize(
    "repeats, slower", [([1.2, 1.2], True), ([1.2, 1.0], False), ([1.0], False)]
)
def test_a_suspect_is_measured_again(repeats: list[float], slower: bool) -> None:
    said: list[str] = []
    measured = iter(repeats)

    def again(name: str) -> dict[str, Any]:
        assert name == "op shape"
        return row((2.0 / next(measured), 0.01))

    changes = compare.compare(
        {"ops": [row((2.0, 0.01))]}, {"ops": [row((2.0 / 1.25, 0.01))]}, again, said.append
    )
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
    assert "want 2: a file of `python -m bench`" in capsys.readouterr().err


def test_slower_kernel_fails_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half as fast again, on purpose, through the command; how fine it is, is measured by hand."""
    options = [*TINY, "--op", "linear", "--no-plot", "--threads", "1", "--json"]
    old = tmp_path / "old.json"
    assert main([*options, str(old)]) == 0
    right = lf.linear

    def slow(*args: Any) -> Any:
        start = time.perf_counter()
        result = right(*args)
        until = start + 2.5 * (time.perf_counter() - start)
        while time.perf_counter() < until:
            pass
        return result

    monkeypatch.setattr(lf, "linear", slow)
    status = main([*options, str(tmp_path / "new.json"), "--compare", str(old)])
    out = capsys.readouterr().out
    assert status == 3 and "measured again" in out and "slower" in out
    document = json.loads((tmp_path / "new.json").read_text())
    assert document["compared"]["changes"][0]["verdict"] == "slower" and document["complete"]


def test_peak_memory_sees_what_is_given_back() -> None:
    from llama_fast.bench.memory import peak_memory

    with peak_memory(torch.device("cpu")) as nothing:
        pass
    with peak_memory(torch.device("cpu")) as some:
        torch.ones(16 << 20)
    assert nothing.bytes < 8 << 20 and 60 << 20 <= some.bytes < 96 << 20
