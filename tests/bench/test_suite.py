"""Tests of the benchmark suite on tiny shapes: what it writes, prints and refuses."""

from __future__ import annotations

import json
import math
import socket
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import llama_fast as lf
from llama_fast import reference
from llama_fast.bench import cases, peers, suite
from llama_fast.bench.__main__ import main
from llama_fast.bench.cases import Plan, case, elementwise, measured, shapes
from llama_fast.bench.results import files
from llama_fast.bench.timing import CPU, clock, memory

from .runs import TINY, Bench


def test_figures_of_every_op(bench: Bench) -> None:
    status, document = bench("--threads", "1", "--no-plot")
    assert status == 0 and document["complete"] and document["environment"]["threads"] == 1
    assert {r["op"] for r in document["ops"]} == set(cases.OPS) - set(cases.FOR_GPUS)
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
            assert clock.SLOW_ROUNDS <= t["rounds"] <= clock.MIN_ROUNDS + 1  # in two passes
            if name != "ours":
                assert t["ratio"]["error"] >= 0 and math.isfinite(t["ratio"]["log"])
        for name, value in r["times"].items():
            seconds = r["seconds"]
            assert value == seconds[name]["median"] / seconds["ours"]["median"], label
        assert set(r["met"]) == set(r["targets"]), label


def test_every_row_of_the_targets_is_measured() -> None:
    """Require every baseline with a target among what the case is compared with."""
    for plan in cases.plan(cases.spec("tiny"), every=True):
        made = plan.make()
        offered = {
            "limit",
            *made.baselines,
            "torch._scaled_mm",
        }  # not in every torch
        assert set(made.targets) <= offered, plan.name
        assert set(made.baselines) <= set(cases.BASELINES), plan.name


@pytest.mark.parametrize("tp", (1, 2, 4, 8))
@pytest.mark.parametrize("model", ("8b", "70b", "405b"))
def test_shapes_of_a_rank(model: str, tp: int) -> None:
    """Sum the ranks' weights: they make up the layer, except that key/value heads repeat."""
    whole, rank = shapes.layer_shapes(model), shapes.layer_shapes(model, tp)
    for name in ("gate_up", "down", "output"):
        n, k = rank.linears[name]
        assert tp * n * k == whole.linears[name][0] * whole.linears[name][1]
    assert rank.heads * tp == whole.heads and rank.heads % rank.kv_heads == 0


def test_full_covers_its_ranges() -> None:
    """Cover M from 1 to 16384, attention to 131072, batches to 64."""
    gpu = shapes.sweep("8b", torch.device("cuda"), "full")
    assert {1, 16384} <= set(gpu.tokens) and {1, 16384} <= set(gpu.rows)
    assert {128, 131072} <= set(gpu.prompts) and (64, 4096) in gpu.caches
    cpu = shapes.sweep("8b", torch.device("cpu"), "full")
    assert {1, 16384} <= set(cpu.tokens) and (1, 131072) in cpu.caches
    assert max(batch for batch, _ in cpu.caches) == 64


def test_what_does_not_fit_is_skipped_by_name(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measured, "free_memory", lambda device: 1e5)
    status, document = bench("--op", "rms_norm,linear", "--no-plot")
    assert status == 0 and [r["op"] for r in document["ops"]] == ["rms_norm"]
    assert "linear M=1, 128 x 64: skipped, needs about" in capsys.readouterr().out
    assert "GiB of memory" in document["skipped"]["linear M=1, 128 x 64"]


def test_what_no_longer_fits_keeps_its_figures(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = iter([1e12] * 2)  # before trimming and after
    monkeypatch.setattr(measured, "free_memory", lambda device: next(asked, 0.0))
    status, document = bench("--op", "rms_norm", "--no-plot")
    assert status == 0 and [r["op"] for r in document["ops"]] == ["rms_norm"]
    assert not any("rms_norm" in name for name in document["skipped"])


def test_memory_estimates_hold() -> None:
    """Require that each case's estimate of its memory is within reason."""
    assert memory.free_memory(CPU) > 1e8
    for plan in cases.plan(cases.spec("8b"), ["rms_norm", "attention_with_kvcache", "linear"]):
        assert 1e6 < plan.memory < 8e9, plan.name


def test_report(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench("--op", "rms_norm", "--plot", str(tmp_path / "plot.png"))
    out = capsys.readouterr().out
    for wanted in (
        "median (p10-p90) ms",
        "of limit",
        "x eager",
        "1 cases, nothing was wrong",
        "torch 2",
    ):
        assert wanted in out
    assert "target" not in out and ">=" not in out
    for name in ("figures.json", "plot.png", "plot.svg"):
        assert (tmp_path / name).stat().st_size > 500 and str(tmp_path / name) in out


def test_no_host_name(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    _, document = bench("--op", "rms_norm", "--no-plot")
    assert socket.gethostname() not in (capsys.readouterr().out + json.dumps(document)).split()


@pytest.mark.parametrize(
    "options, wanted",
    [
        (["--op", "rms_norn"], "--op: got rms_norn, want any of rms_norm, add_rms_norm, "),
        (["--tp", "3"], "--tp: got 3, want a divisor of tiny's 8 heads"),
        (
            ["--op", "forward"],
            "--op forward: got --model tiny --tp 1 --dtype bf16, want --model 8b ",
        ),
        (["--baseline", "eagre"], "--baseline: got eagre, want any of eager, torch.compile, "),
        (["--peers", "vllm"], "peers: got vllm, want some of llama.cpp, "),
        (["--peers", "flash-attn"], "peer flash-attn: "),
        (["--backend", "triton", "--op", "nothing"], "--op: got nothing"),
        (["--compare", "absent.json"], "absent.json: no such file"),
        (["--plot", "."], "--plot: got a folder, ., want a file"),
        (["--backend", "cpu,rocm"], "--backend: "),
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
    monkeypatch.setattr(clock, "MAX_ROUNDS", clock.MIN_ROUNDS)
    monkeypatch.setattr(peers.Peer, "missing", lambda self: f"{self.package} is not installed")
    file = tmp_path / "a.json"
    options = ["--quick", "--model", "tiny", "--op", "rms_norm", "--no-plot", "--json", str(file)]
    assert main(options) == 0
    assert "without llama.cpp: llama-cpp-python is not installed" in capsys.readouterr().out
    assert json.loads(file.read_text())["skipped"]["llama.cpp"].endswith("is not installed")


def test_a_peers_runs_stand_beside_ours(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name a peer that refuses. One that fails must not cost the others their figures."""

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


def test_a_users_kernel(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        ("rms_norm=my.module:ours", "got 'ours', which is the name"),
    ],
)
def test_a_users_kernel_that_is_not_there(
    option: str, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main([*TINY, "--kernel", option])
    assert left.value.code == 2 and wanted in capsys.readouterr().err


def test_a_users_kernel_that_fails_costs_its_column(bench: Bench) -> None:
    status, document = bench("--op", "rms_norm", "--no-plot", "--kernel", "rms_norm=math:sqrt")
    assert status == 0 and "sqrt" not in document["ops"][0]["times"]
    assert document["skipped"]["rms_norm 8 x 64: sqrt"].startswith("TypeError: ")


def test_baselines_can_be_chosen(bench: Bench) -> None:
    _, document = bench("--op", "rms_norm", "--no-plot", "--baseline", "torch.compile")
    assert list(document["ops"][0]["times"]) == ["torch.compile"]
    status, document = bench("--no-plot", "--baseline", "none")
    assert status == 0 and len({r["op"] for r in document["ops"]}) == 9
    for r in document["ops"]:  # eager still checks the error
        assert not r["times"] and r["of_limit"] > 0 and not r["wrong"] and r["eager_error"] > 0


def test_backends_side_by_side(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Print a column for each further backend. A wrong one is marked as ours would be."""
    options = ("--op", "rms_norm", "--no-plot", "--backend", "reference,cpu")
    status, document = bench(*options)
    (r,) = document["ops"]
    assert status == 0 and document["options"]["backend"] == "reference,cpu"
    assert r["errors"]["ours"] == r["errors"]["eager"] and "cpu" in r["times"]
    right = lf.rms_norm
    on = case.Case.on

    def doubled(self: case.Case, backend: str) -> Any:
        run = on(self, backend)
        return lambda i: 2 * run(i)

    monkeypatch.setattr(case.Case, "on", doubled)
    status, document = bench(*options)
    assert status == 1 and document["ops"][0]["wrong_backends"] == ["cpu"]
    assert lf.rms_norm is right


def test_a_kernel_that_fails_costs_its_own_case(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("misaligned address\nand a trace")

    monkeypatch.setattr(lf, "rms_norm", broken)
    status, document = bench("--op", "rms_norm,silu_and_mul", "--no-plot")
    assert status == 1 and [r["op"] for r in document["ops"]] == ["silu_and_mul"]
    assert document["failed"] == {"rms_norm 8 x 64": "RuntimeError: misaligned address"}
    assert "rms_norm 8 x 64: FAILED, RuntimeError: misaligned" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="misaligned"):
        bench("--op", "rms_norm", "--debug")


def test_ops_for_gpus_run_if_they_are_named(bench: Bench) -> None:
    status, document = bench("--op", ",".join(cases.FOR_GPUS), "--no-plot")
    assert status == 0 and {r["op"] for r in document["ops"]} == set(cases.FOR_GPUS)


def test_targets_are_shown_where_asked_for(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench("--op", "rms_norm", "--no-plot", "--targets")
    out = capsys.readouterr().out
    assert "targets met:" in out and "(>=60)" in out


def test_help_names_the_command_as_called(capsys: pytest.CaptureFixture[str]) -> None:
    """Print, in --help, what every option is for and where the suite writes."""
    for prog, options in (("python -m bench", []), ("llama-fast bench", []), ("x", GPU_REPORT)):
        with pytest.raises(SystemExit):
            main([*options, "--help"], prog)
        out = capsys.readouterr().out
        assert out.startswith(f"usage: {prog} ") and f"\n  {prog} " in out
        others = {"python -m bench", "llama-fast bench"} - {prog}
        assert not any(other in out for other in others)
        words = " ".join(out.split())
        for option in ("--kernel OP=MODULE:FUNCTION one more", "--compare OLD.json hold this"):
            assert (option in words) == (not options)
        if not options:
            assert str(files.default_folder() / "bench.json").replace("/", "") in "".join(
                out.split()
            ).replace("/", "")


GPU_REPORT = ["--gpu-report", "DIR"]


def test_nothing_is_written_into_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Write within the checkout. When installed, write into a folder of the suite's own there."""
    monkeypatch.chdir(tmp_path)
    assert files.default_folder() == files.ROOT / "bench" / "out"
    monkeypatch.setattr(files, "ROOT", tmp_path)
    assert files.default_folder() == Path("llama_fast_bench")


def test_backend_can_be_chosen(bench: Bench) -> None:
    _, document = bench("--op", "rms_norm", "--no-plot", "--backend", "reference")
    (r,) = document["ops"]
    assert document["options"]["backend"] == "reference" and r["error"] == r["eager_error"]


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--peers", "none"]) == 0
    lines = capsys.readouterr().out.splitlines()
    default = [op for op in cases.OPS if op not in cases.FOR_GPUS]
    assert list(dict.fromkeys(line.split()[0] for line in lines)) == [*default, "forward"]
    assert main(["--list", "--peers", "none", "--full"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 2 * len(lines)


def test_threads_are_restored(bench: Bench, threads: None) -> None:
    torch.set_num_threads(2)
    bench("--op", "rms_norm", "--threads", "1", "--no-plot")
    assert torch.get_num_threads() == 2


def test_interrupted_run_keeps_what_it_has(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> case.Case:
        raise KeyboardInterrupt

    def activations(spec: cases.Spec) -> Iterator[Plan]:
        for plan in elementwise.plans(spec):
            yield replace(plan, make=interrupted) if plan.op == "silu_and_mul" else plan

    monkeypatch.setattr(cases, "GROUPS", (activations, *cases.GROUPS[1:]))
    status, document = bench("--no-plot")
    assert status == 130 and not document["complete"]
    assert [r["op"] for r in document["ops"]] == ["rms_norm", "add_rms_norm", "apply_rope"]


def test_interrupted_in_a_later_pass(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keep every case of the first pass, and print it once."""
    made: list[str] = []
    right = elementwise._case

    def case_of(op: str, *rest: Any, **fields: Any) -> case.Case:
        made.append(op)
        if len(made) == 3:
            raise KeyboardInterrupt
        return right(op, *rest, **fields)

    monkeypatch.setattr(elementwise, "_case", case_of)
    status, document = bench("--no-plot", "--op", "rms_norm,add_rms_norm")
    assert status == 130 and len(document["ops"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "rms_norm " in line[:14]][:2] == [
        "rms_norm",
        "add_rms_norm",
    ]


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


def test_a_wrong_baseline_is_not_compared_with(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulate a fault that torch.compile had: half of its elements were never written."""

    def half(op: str, arguments: Any) -> Any:
        def run(i: int) -> torch.Tensor:
            result = getattr(reference, op)(*arguments(i))
            result[..., ::2] = 0
            return result

        return run

    monkeypatch.setattr(elementwise, "compiled", half)
    status, document = bench("--op", "rms_norm", "--baseline", "eager,torch.compile", "--no-plot")
    (row,) = document["ops"]
    assert status == 0 and "eager" in row["times"] and "torch.compile" not in row["times"]
    (why,) = (why for name, why in document["skipped"].items() if "torch.compile" in name)
    assert "wrong" in why


def test_compiled_graphs_are_kept_apart_by_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile for one instruction set, for another and for the first again. PyTorch's own cache
    would return the first graph for the second, which would skip elements."""
    x = torch.randn(4, 256).bfloat16()
    one, other = uuid.uuid4().hex, uuid.uuid4().hex
    hits = []
    for isa in (one, other, one):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda isa=isa: isa)
        counters.clear()
        got = case.compiled("silu_and_mul", lambda i: (x,))(0)
        torch.testing.assert_close(got, reference.silu_and_mul(x), atol=0.05, rtol=0.05)
        hits.append(
            counters["aot_autograd"]["autograd_cache_hit"]
            + counters["inductor"]["fxgraph_cache_hit"]
        )
    assert hits[:2] == [0, 0] and hits[2] > 0


@pytest.mark.parametrize("op", cases.OPS)
def test_every_exact_result_differs_from_a_wrong_one(
    op: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Double the last row of each op's result. It must then differ from the exact result."""
    right = getattr(lf, op)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = right(*args, **kwargs)
        out = result[0] if isinstance(result, tuple) else result
        out = result[1] if op.endswith("_fp8") else out
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
