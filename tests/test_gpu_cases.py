"""Every case that the GPU report measures, in tiny shapes on the CPU; how the suite takes a GPU."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast import _cpu, reference
from llama_fast.bench import (
    baselines,
    cases,
    gpu_attention,
    gpu_case,
    gpu_model,
    gpu_parts,
    gpu_timing,
    models,
    shapes,
    suite,
    targets,
    timing,
)
from llama_fast.bench.files import WRONG, read, write

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> gpu_case.Place:
    """On the CPU, where every baseline that there can be is there."""
    monkeypatch.setattr(timing, "MAX_ROUNDS", timing.MIN_ROUNDS)
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: f)
    return gpu_case.Place(torch.device("cpu"), gpu_case.TINY, baselines.Compiler(60.0))


def with_fp8_caches(f: Any) -> Any:
    """An attention_with_kvcache that takes them, whether f does or not."""

    def attend(
        q: torch.Tensor, *caches: Any, k_scale: Any = None, v_scale: Any = None, **more: Any
    ):
        k, v, lengths = caches
        if k_scale is not None:
            k, v = k.to(q.dtype) * k_scale.to(q.dtype), v.to(q.dtype) * v_scale.to(q.dtype)
        return f(q, k, v, lengths, **more)

    return attend


def part(name: str, out: Path, *more: str) -> tuple[int, dict[str, Any]]:
    arguments = [name, "--out", str(out), "--until", "1e11", "--device", "cpu", "--tiny"]
    status = gpu_parts.main([*arguments, *more])
    return status, read(out / f"{name}.json") or {}


def test_every_target_has_a_case(place: gpu_case.Place) -> None:
    full = gpu_case.Place(place.device, gpu_case.FULL, place.compiler)
    tags = {spec.tag for spec in gpu_parts.specs(full)}
    bench = gpu_model.Work(models.shape())
    tags |= {f"decode {n} {b}" for n in ("bf16", "FP8") for b in bench.batches}
    tags |= {f"prefill {n} {s}" for n in ("bf16", "FP8") for s in bench.prompts}
    assert {target.tag for target in targets.TARGETS} <= tags


def test_targets_come_first(place: gpu_case.Place) -> None:
    tags = [spec.tag for spec in gpu_parts.specs(place)]
    tagged = [tag for tag in tags if tag]
    assert tags[: len(tagged)] == tagged


def test_every_case_runs(
    place: gpu_case.Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu_parts, "Compiler", lambda seconds: place.compiler)
    for module in (gpu_attention.lf, reference):
        patched = with_fp8_caches(module.attention_with_kvcache)
        monkeypatch.setattr(module, "attention_with_kvcache", patched)
    status, found = part("limits", tmp_path)
    assert status == 0 and [r["shape"] for r in found["rows"]] == ["copy", "read", "bf16", "fp8"]
    status, found = part("ops", tmp_path)
    assert status == 0, found["failed"]
    assert found["complete"] and not found["failed"] and not found["skipped"]
    specs = gpu_parts.specs(place)
    assert len(found["rows"]) == len(specs) and {r["tag"] for r in found["rows"]} == {
        spec.tag for spec in specs
    }
    for r in found["rows"]:
        label = f"{r['op']} {r['shape']}"
        assert r["rate"] > 0 and r["of_limit"] > 0 and not r["wrong"], label
        assert r["backend"] == "cpu" and r["bytes"] > 0 and r["flops"] > 0, label
        assert len(r["seconds"]) == len(r["times"]) + 1 and list(r["backends"]) == ["cpu"], label
        if r["op"] in ("rms_norm", "add_rms_norm", "apply_rope", "silu_and_mul", "quantize_fp8"):
            assert "torch.compile" in r["times"], label
    assert len(capsys.readouterr().out.splitlines()) == len(specs) + 4


def test_model_runs(place: gpu_case.Place, tmp_path: Path) -> None:
    """Without limits in the report: it measures its own."""
    status, found = part("model", tmp_path)
    assert status == 0, found["failed"]
    assert found["complete"] and found["rows"]
    assert {"decode FP8 1", "decode bf16 2", "generate bf16 1"} <= {
        r.get("tag") for r in found["rows"]
    }
    assert any(r["op"] == "profile" and r["kernels"] for r in found["rows"])


def test_part_takes_limits_from_the_report(place: gpu_case.Place, tmp_path: Path) -> None:
    rows = [{"shape": "copy", "rate": 1e30}]
    stored = {"environment": {"gpu": None}, "complete": True, "rows": rows}
    write(tmp_path / "report.json", {"parts": {"limits": stored}})
    if not torch.cuda.is_available():
        _, found = part("ops", tmp_path, "--case", "add_rms_norm")
        assert [r["limit_rate"] for r in found["rows"]] == [1e21] * 3
        _, found = part("ops", tmp_path, "--case", "attention packed")
        assert found["rows"][0]["of_limit"] is None  # no such limit


def test_limits_that_fail_are_told(
    place: gpu_case.Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("no FP8 here")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    assert part("limits", tmp_path)[1]["skipped"] == {"fp8": "torch._scaled_mm: no FP8 here"}
    (tmp_path / "limits.json").unlink()
    part("ops", tmp_path, "--case", "no such case")
    assert "limit fp8: torch._scaled_mm: no FP8 here" in capsys.readouterr().out


def test_wrong_kernel_is_noticed(
    place: gpu_case.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros for the last queries, whose outputs are small beside the first ones'."""
    right = gpu_attention.lf.attention

    def wrong(q: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        out = right(q, *rest, **options)
        out[:, -1:] = 0
        return out

    monkeypatch.setattr(gpu_attention.lf, "attention", wrong)
    monkeypatch.setattr(gpu_attention, "CHECKED_ROWS", 4)
    status, found = part("ops", tmp_path, "--case", "attention causal")
    assert status == WRONG and all(r["wrong"] for r in found["rows"])


def test_interrupted_process_exits_130(
    place: gpu_case.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_parts, "_measured", interrupted)
    assert part("ops", tmp_path, "--case", "rms_norm")[0] == 130


def test_ends() -> None:
    rows = torch.arange(1000.0)[:, None].repeat(1, 3)
    assert gpu_case.ends(rows)[:, 0].tolist() == [*range(64), *range(936, 1000)]
    q, _ = reference.quantize_fp8(rows)
    assert gpu_case.ends(q).dtype == q.dtype and gpu_case.ends(q).shape == (128, 3)


def test_worst_pair() -> None:
    nan = float("nan")
    assert gpu_attention.worst([(0.1, 0.2), (0.3, 0.1)]) == (0.3, 0.1)
    assert gpu_attention.worst([(nan, 0.1), (0.3, 0.1)])[0] != 0.3


# ---- the suite on a GPU ----


def test_suite_times_by_the_gpus_events(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    spec = cases.spec("tiny", device=cpu)
    made = [plan.make() for plan in cases.plan(spec, ["attention", "attention_with_kvcache"])]
    on_gpu = [cases.on(dataclasses.replace(spec, device=cuda), case) for case in made]
    assert [c.uncapturable for c in on_gpu] == [(), ("eager",)]
    assert all(c.device == cuda and not c.targets for c in on_gpu)
    seen: dict[str, Any] = {}
    monkeypatch.setattr(gpu_timing, "measure", lambda runs, budget, **options: seen.update(options))
    session = argparse.Namespace(device=cuda, args=argparse.Namespace(level="default"))
    suite.Session._times(session, {}, on_gpu[1])  # type: ignore[arg-type]
    assert seen["uncapturable"] == ("eager",)
    tokens = [shapes.sweep("8b", device, "default").tokens for device in (cpu, cuda)]
    assert tokens[0] < tokens[1]


def test_suite_runs_the_model_on_a_gpu(place: gpu_case.Place) -> None:
    said: list[str] = []
    found = gpu_model.run(torch.device("cpu"), 0.0, said.append, tiny=True)
    assert {r["shape"] for r in found["rows"]} == {"bf16", "FP8"} and found["logits"]
    assert "transformers bf16" in found["logits"] and any("measured" in s for s in said)
    assert _cpu.isa()
