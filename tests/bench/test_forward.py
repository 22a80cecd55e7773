"""Tests of the suite's forward pass: every implementation, job by job."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import llama_fast as lf
from llama_fast.bench import suite
from llama_fast.bench.__main__ import main
from llama_fast.bench.model import forward, jobs, models, whole
from llama_fast.bench.model.forward import Asked
from llama_fast.bench.model.jobs import Job
from llama_fast.bench.peers.in_transformers import Transformers
from llama_fast.bench.results import report
from llama_fast.bench.timing import CPU, clock, events

from .runs import TINY, Bench


def narrow() -> lf.LlamaConfig:
    """Return a model of two tiny layers, for a run through every path."""
    return dataclasses.replace(
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
    """Run the main job on two narrow layers."""
    wanted = {
        "default": jobs.JOBS["default"],
        "full": (Job("tg", 4), Job("pp", 8, 24), Job("tg", 4, 24)),
    }
    monkeypatch.setattr(jobs, "JOBS", wanted)
    monkeypatch.setattr(forward, "BUDGETS", dict.fromkeys(wanted, 0.0))
    monkeypatch.setattr(models, "shape", narrow)
    monkeypatch.setattr(clock, "MAX_ROUNDS", clock.MIN_ROUNDS)
    found = forward.run(Asked(level, passes=2))
    rows = {(r["op"], r["shape"]): r for r in found["rows"]}
    assert set(rows) == {(job.name, w) for job in wanted[level] for w in ("bf16", "FP8")}
    for r in rows.values():
        assert r["tokens_per_s"] == pytest.approx(1e3 / r["ms_per_token"]) and r["of_limit"] > 0
        assert "transformers" in r["times"] and f"of {r['limit']}" in report.line(r)
        assert r["all_layers_tokens_per_s"] < r["tokens_per_s"] / 8
        assert "ratio" not in r["seconds"][r["shape"]]
        assert "ratio" in r["seconds"]["transformers"]
        assert all(len(t["passes"]) == 2 for t in r["seconds"].values())
    logits = found["logits"]
    assert logits["bf16"] <= 2 * logits["transformers"] + 2**-8
    assert logits["FP8"] < 0.2
    text = report.forward(found)
    assert "extrapolated, not run" in text and ("time to first token" in text) == (
        level == "default"
    )
    for name, m in found["memory"].items():
        assert m["weights_gib"] > 0 and m["prompt_gib"] >= 0, name
    memory = found["memory"]
    assert memory["FP8"]["weights_gib"] < 0.75 * memory["bf16"]["weights_gib"]


def test_forward_alone(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    """Run --op forward: prefill and decode without the ops, up to the written file."""
    two = (Job("pp", 8), Job("tg", 2, 8))
    monkeypatch.setitem(jobs.JOBS, "quick", two)
    monkeypatch.setitem(forward.BUDGETS, "quick", 0.0)
    monkeypatch.setattr(models, "shape", narrow)
    monkeypatch.setattr(models, "PREFILL", 8)
    status, document = bench("--model", "8b", "--op", "forward")
    assert status == 0 and document["complete"] and document["ops"] == []
    assert {r["op"] for r in document["end_to_end"]["rows"]} == {"pp8", "tg2 @ d8"}
    out = capsys.readouterr().out
    assert "4 cases, nothing was wrong" in out and "figures.svg" in out and "rms_norm" not in out
    assert main([*TINY, "--model", "8b", "--op", "forward", "--list"]) == 0
    assert capsys.readouterr().out.split("\n")[:2] == [f"{'forward':<24}{j.name}" for j in two]


class Failing:
    """Fail once `works` calls have succeeded, as a peer's model may."""

    def __init__(self, model: Any, works: int) -> None:
        self.label, self.model, self.works = "failing", model, works

    def __getattr__(self, name: str) -> Any:
        if name in ("logits", "extend", "decode"):
            self.works -= 1
            if self.works < 0:
                raise RuntimeError("out of luck")
        return getattr(self.model, name)


@pytest.mark.parametrize("works", range(4))
def test_a_failing_peer_costs_its_own_columns(
    works: int, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    two = (Job("pp", 8), Job("tg", 2, 8))
    monkeypatch.setitem(jobs.JOBS, "quick", two)
    monkeypatch.setitem(forward.BUDGETS, "quick", 0.0)
    monkeypatch.setattr(models, "shape", narrow)
    monkeypatch.setattr(clock, "MAX_ROUNDS", 1)

    class Peer:
        name = "peer"

        def models(self, hf: Any, device: Any) -> list[Any]:
            return [Failing(Transformers("failing", hf), works)]

    asked_for = Asked("quick", peers=[Peer()])
    found = forward.run(asked_for)
    skipped = asked_for.record.results["skipped"]
    asked = ["logits: failing", "memory: failing", "pp8: failing", "tg2 @ d8: failing"]
    assert asked[works] in skipped and "out of luck" in skipped[asked[works]]
    with_it = [r["op"] for r in found["rows"] if "failing" in r["times"]]
    assert with_it == (["pp8", "pp8"] if works == 3 else [])
    assert all("transformers" in r["times"] for r in found["rows"])


def test_the_longest_job_fits_the_model() -> None:
    longest = max(job.depth + job.tokens for job in jobs.JOBS["full"])
    assert models.transformers_model(narrow()).config.max_position_embeddings > longest


def test_extrapolation_counts_the_parts_that_are_not_run() -> None:
    """Scale 4 layers and 32,000 ids to 32 layers and the whole vocabulary, by FLOPs and bytes."""
    config = models.shape()
    whole = forward.whole_config(config)
    assert (whole.num_hidden_layers, whole.vocab_size) == (32, 128256)
    layer = 4096 * (4096 * 2 + 1024 * 2 + 3 * 14336)
    wanted = (4 * layer + 4096 * 32000) / (32 * layer + 4096 * 128256)
    assert forward._bytes_share(config) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("implementation", ["ours", "transformers"])
def test_each_round_decodes_from_the_same_context(implementation: str, one_thread: None) -> None:
    hf = models.transformers_model(narrow())
    model: Any = Transformers("transformers", hf)
    if implementation == "ours":
        model = models.same_weights(hf)["bf16"]
    prompt = models.prompt(narrow(), 40)
    with torch.inference_mode():
        run = model.extend(prompt[:, :30], prompt[:, 30:])
        once, again = run(0).flatten(), run(1).flatten()
        from_scratch = model.logits(prompt)[:, -1].flatten()
    assert torch.equal(once, again)
    assert (once.float() - from_scratch).abs().max() <= 2**-5 * from_scratch.abs().max()


@pytest.mark.parametrize("implementation", ["ours", "transformers"])
def test_each_step_of_a_batch_equals_single_sequences(
    implementation: str, one_thread: None
) -> None:
    hf = models.transformers_model(narrow())
    model: Any = Transformers("transformers", hf)
    if implementation == "ours":
        model = models.same_weights(hf)["bf16"]
    prompts = models.prompt(narrow(), 12, batch=3)
    with torch.inference_mode():
        together = model.decode(prompts, 2)(0)
        alone = [model.decode(prompts[i : i + 1], 2)(0) for i in range(3)]
    assert together.shape == (3, 256)
    assert (together - torch.cat(alone)).abs().max() <= 2**-5 * together.abs().max()


def test_a_gpus_step_is_captured_once(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Treat CPU tensors as a GPU's. Every step has the same length and result."""
    model = models.same_weights(models.transformers_model(narrow()))["bf16"]
    captured: list[Any] = []
    monkeypatch.setattr(models, "captured", lambda step, device: captured.append(step) or step)
    prompt = models.prompt(narrow(), 20)
    with torch.inference_mode():
        want = model.extend(prompt, prompt[:, -1:])(0)
        run = model._after(prompt, prompt[:, -1:], 3, on_gpu=True)
        assert torch.equal(run(0), want) and torch.equal(run(1), want)
    assert len(captured) == 1


def test_a_gpu_runs_as_many_layers_as_fit() -> None:
    config = lf.LlamaConfig.llama_3_1_8b()
    layers = [models.fitting(config, n * 1e9, 6).num_hidden_layers for n in (1, 20, 48, 130)]
    assert layers[0] == 1 < layers[1] < layers[2] <= layers[3] == 32
    sizes = jobs.on_gpu("default", 130e9, 6)
    assert max(j.batch for j in sizes.jobs) == 32 and "tg16 @ d1024, B8" in {
        j.name for j in sizes.jobs
    }


def test_a_gpus_run_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append("device"))
    run = events.waited(lambda i: waited.append(f"run {i}"), torch.device("cuda"))
    run(7)
    assert waited == ["run 7", "device"]
    assert events.waited(print, CPU) is print


@pytest.mark.parametrize(("peers", "layers"), [(0, 4), (3, 4), (4, 3), (12, 1)])
def test_all_models_fit_into_memory_together(
    peers: int, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 22 GB, four layers with four peers once ran out of memory."""
    monkeypatch.setattr(forward, "free_memory", lambda device: 22.5e9)
    assert Asked("default", peers=[None] * peers).sizes().config.num_hidden_layers == layers


def test_a_layer_of_a_larger_model(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    """Run --whole --model 70b with a narrow layer. The whole is the layers and the head."""
    config = dataclasses.replace(narrow(), num_hidden_layers=80, vocab_size=4096)
    monkeypatch.setitem(suite.PRESETS, "70b", lambda: config)
    monkeypatch.setattr(whole, "SECONDS", 0.0)
    status, found = bench("--whole", "--model", "70b")
    assert status == 0
    text = capsys.readouterr().out
    assert "70b: one layer of 80" in text and text.count("extrapolated to 80 layers") == 2
    for job, limit in (("tg1 @ d256", "read"), ("pp256", "fma")):
        r = found["layer"][job]
        assert r["extrapolated_s"] == pytest.approx(80 * r["layer_s"] + 16 * r["head_part_s"])
        assert r["least_s"] > 0 and r["of_limit"] > 0 and r["limit"] in (limit, "matmul")
