"""The main job: Llama 3.1's forward pass with the kernels swapped in, against eager transformers
and every peer that is there.

All run the same random weights, of 8B's true shapes: four layers and a vocabulary of 32,000, so
that bf16, FP8, the fp32 truth and the peers' files fit beside each other. What 32 layers would take
is extrapolated by bytes or flops, and says so; `--whole` runs the whole 8B preset, in FP8.

Names as in llama-bench: pp512 is a prompt of 512 tokens into an empty cache, tg128 are 128 tokens
generated one by one, "@ d16384" means that so many tokens are in the cache already.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import llama_fast as lf
from llama_fast import _cpu

from . import model_rows, models
from .case import CPU, matmul_flops, matmul_limit, relative_error
from .memory import peak_memory
from .timing import Run, Timing, joined, measure

BUDGETS = {"quick": 1.0, "default": 9.0, "full": 9.0}  # seconds of rounds, of all passes
ROUNDS = 6  # at least: one of a prompt takes everybody together half a minute


@dataclasses.dataclass(frozen=True)
class Job:
    """Tokens that are processed at once ("pp") or one by one ("tg"), after depth others."""

    kind: str
    tokens: int
    depth: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")


JOBS = {
    "quick": (Job("pp", models.PREFILL), Job("tg", 8, models.PREFILL)),
    "default": (Job("pp", models.PREFILL), Job("tg", 16, models.PREFILL)),
    "full": (
        Job("pp", models.PREFILL),
        Job("tg", 16, models.PREFILL),
        Job("tg", 128),
        Job("pp", models.PREFILL, 16384),
        Job("tg", 16, 16384),
    ),
}
# Of our FP8 weights: job, then how many times faster than whom. TARGETS hold at that depth.
TARGETS = {
    "pp512": {"transformers": 1.1, "llama.cpp Q8_0": 1.8},
    "tg16 @ d512": {"transformers": 5.0, "llama.cpp Q8_0": 1.6, "llama.cpp bf16": 1.6},
}


def run(
    level: str,
    say: Callable[[str], None],
    peers: Sequence[Any] = (),
    wants: Callable[[str], bool] = lambda name: True,
    skip: Callable[[str, str], None] = lambda name, why: None,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
    passes: int = 1,
    times: int | None = None,
) -> dict[str, Any]:
    """Every job, ours in FP8 and bf16 beside transformers and the peers; and the logits' errors.

    wants: whether a baseline is asked for; skip: is told who is left out, and why; keep: is handed
    what there is after each job; passes: how often all jobs are gone through, see timing.py, of
    which `times` are wanted.
    """
    config = models.shape()
    say(f"end to end: 8B layers x {config.num_hidden_layers}, vocab {config.vocab_size}, making")
    hf = models.transformers_model(config)
    running: dict[str, Any] = {
        n: models.Ours(n, m) for n, m in models.same_weights(hf, CPU).items()
    }
    ours = list(running)
    for label, attention in (("transformers", "sdpa"), ("transformers eager", "eager")):
        # transformers' eager attention repeats K and V for every head: for a full run.
        if wants(label) and (attention == "sdpa" or level == "full"):
            running[label] = models.Transformers(hf, attention)
    for peer in peers:
        try:
            for model in peer.models(hf, config, CPU):
                running[model.label] = model
                say(f"  {model.label} loaded")
        except Exception as error:  # a peer that fails costs its own columns only
            skip(f"end to end: {peer.name}", f"{type(error).__name__}: {error}")
    prompt = models.prompt(config, max(models.PREFILL, *(j.depth + j.tokens for j in JOBS[level])))
    found: dict[str, Any] = {
        "what": f"8B shapes, {config.num_hidden_layers} layers, vocab {config.vocab_size}, "
        "random weights; baseline: transformers, sdpa, bf16",
        "rows": [],
    }
    try:
        with torch.inference_mode():
            each = functools.partial(_each, running, ours, skip)
            logits = each("logits", lambda model: model.logits(prompt[:, :64]))
            found["logits"] = _errors(hf, logits, prompt[:, :64])
            # Before the jobs: what they keep, a cache of that length among it, would not be seen.
            first = prompt[:, : models.PREFILL]
            found["memory"] = each("memory", lambda model: memory_of(model, first))
            rows: dict[Job, list[dict[str, Any]]] = {}
            make = functools.partial(_runs, prompt=prompt, running=running, ours=ours, skip=skip)
            for job, timings in _passes(level, passes, passes if times is None else times, make):
                rows[job] = _rows(job, timings, running[ours[0]], ours)
                found["rows"] = [
                    {**r, "errors": found["logits"]} for rs in rows.values() for r in rs
                ]
                say(f"  {job.name} measured")
                keep(found)
    finally:
        for model in running.values():
            model.close()
    return found


def _each(
    running: dict[str, Any],
    ours: list[str],
    skip: Callable[[str, str], None],
    what: str,
    ask: Callable[[Any], Any],
) -> dict[str, Any]:
    """What is asked of every model, by name. One of somebody else's that fails runs no more."""
    found = {}
    for name, model in list(running.items()):
        try:
            found[name] = ask(model)
        except Exception as error:
            if name in ours:
                raise
            skip(f"{what}: {name}", f"{type(error).__name__}: {error}")
            running.pop(name).close()
    return found


def _passes(
    level: str, passes: int, times: int, make: Callable[[Job], dict[str, Run]]
) -> Iterator[tuple[Job, dict[str, Timing]]]:
    """A job whenever it was measured once more, with all that was measured of it."""
    runs: dict[Job, dict[str, Run]] = {}
    taken: dict[Job, list[dict[str, Timing]]] = {job: [] for job in JOBS[level]}
    for _ in range(times):
        for job in JOBS[level]:
            if job not in runs:
                runs[job] = make(job)
            budget = BUDGETS[level] * (2 if job.kind == "tg" else 1)
            taken[job].append(measure(runs[job], budget, passes=passes, least=ROUNDS))
            yield job, joined(taken[job])


def _runs(
    job: Job,
    prompt: Tensor,
    running: dict[str, Any],
    ours: list[str],
    skip: Callable[[str, str], None],
) -> dict[str, Run]:
    """Everybody's, and the limits'. Whoever has a long context to read first does it here."""
    # One token at least to go on from: nothing is generated from nothing.
    context = prompt[:, : max(job.depth, 1 if job.kind == "tg" else 0)]
    tokens = prompt[:, job.depth :][:, : job.tokens]
    runs: dict[str, Run] = {}
    for name, model in running.items():
        if name == "transformers eager" and job.depth > 4096:
            skip(f"{job.name}: {name}", "its scores would be larger than all of the weights")
            continue
        try:
            if job.kind == "tg":
                runs[name] = model.decode(context, job.tokens)
            else:
                runs[name] = model.extend(context, tokens)
            if name not in ours:
                runs[name](0)
        except Exception as error:
            if name in ours:
                raise
            runs.pop(name, None)
            skip(f"{job.name}: {name}", f"{type(error).__name__}: {error}")
    if job.kind == "pp":
        runs["limit"], _ = matmul_limit(torch.bfloat16)
    else:
        for name in ours:
            runs[f"limit {name}"] = _read_weights(running[name].model)
    return runs


def _rows(
    job: Job, timings: dict[str, Timing], model: models.Ours, ours: list[str]
) -> list[dict[str, Any]]:
    """A row for each of ours; the rest are in each row's seconds."""
    rows, config = [], model.model.config
    for name in ours:
        targets = TARGETS.get(job.name, {}) if name == "FP8" else {}
        if job.kind == "pp":
            work = models.prefill_flops(config, job.tokens, job.depth)
            fastest = timings["limit"].median * work / matmul_flops(CPU)
            whole = work / models.prefill_flops(whole_config(config), job.tokens, job.depth)
        else:
            fastest = timings[f"limit {name}"].median * job.tokens
            whole = _bytes_share(config)
        limit = "matmul" if job.kind == "pp" else "read"
        found = model_rows.row(job.name, name, timings, job.tokens, limit, fastest, targets)
        found["siblings"] = [other for other in ours if other != name]
        found["all_layers_tokens_per_s"] = found["tokens_per_s"] * whole  # extrapolated
        rows.append(found)
    return rows


def whole_config(config: lf.LlamaConfig) -> lf.LlamaConfig:
    """The same with all of 8B's layers and its vocabulary."""
    full = lf.LlamaConfig.llama_3_1_8b()
    return dataclasses.replace(
        config, num_hidden_layers=full.num_hidden_layers, vocab_size=full.vocab_size
    )


def _bytes_share(config: lf.LlamaConfig) -> float:
    """Of the weights that a token reads: this model's, of all layers'."""

    def elements(c: lf.LlamaConfig) -> float:
        layer = models.prefill_flops(dataclasses.replace(c, num_hidden_layers=1), 1, 0)
        head = 2.0 * c.hidden_size * c.vocab_size
        return c.num_hidden_layers * (layer - head) + head

    return elements(config) / elements(whole_config(config))


def memory_of(model: Any, prompt: Tensor) -> dict[str, float]:
    """GiB of weights, and what a prompt needs beside them at its peak, its cache included."""
    with peak_memory(prompt.device) as peak:
        model.extend(prompt[:, :0], prompt)(0)
    return {"weights_gib": model.weight_bytes() / 2**30, "prompt_gib": peak.bytes / 2**30}


def _errors(hf: Any, logits: dict[str, Tensor], tokens: Tensor) -> dict[str, float]:
    """max |logit - exact| / max |exact| of everybody; exact: the same bf16 weights, in fp32."""
    # A copy: rotary frequencies that have been to bf16 and back are not what they were.
    exact = copy.deepcopy(hf).float()(tokens).logits
    return {name: relative_error(found, exact) for name, found in logits.items()}


def _read_weights(model: lf.Llama) -> Callable[[int], None]:
    """What one token of a decode cannot do without."""

    def run(_: int) -> None:
        for w in models.linears(model):
            _cpu.read_bandwidth_probe(w.data_ptr(), w.nbytes, torch.get_num_threads())

    return run


def compare_logits(config: lf.LlamaConfig, device: torch.device) -> dict[str, float]:
    """The errors of a model of that shape, over 64 tokens."""
    hf = models.transformers_model(config, device)
    prompt = models.prompt(config, 64).to(device)
    logits = {"transformers bf16": models.Transformers(hf).logits(prompt)}
    for name, model in models.same_weights(hf, device).items():
        logits[f"ours {name}"] = model(prompt)
    return _errors(hf, logits, prompt)
