"""The whole model on a GPU: decode, prefill and generate, in bf16 and FP8, against transformers.

Random weights of 8B's true shape, all 32 layers where memory allows. A decode step is the forward
pass, the argmax and the token it feeds on, one CUDA graph for ours; it is repeated at the same
context, so that a figure belongs to one length. Time is the host's, launch gaps included: they are
most of what an eager decode costs.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import llama_fast as lf

from . import end_to_end, model_rows, models, timing
from .gpu_case import Place, Unsupported
from .gpu_timing import captured, waited
from .tasks import Rows

STEPS = 8  # decode steps a round
RESERVE = 12 << 30  # bytes left for caches, activations and CUDA itself


@dataclasses.dataclass(frozen=True)
class Work:
    config: lf.LlamaConfig
    batches: tuple[int, ...] = (1, 8, 32)
    context: int = 1024
    contexts: tuple[int, ...] = (8192, 32768)  # at batch 1, for the cost's growth
    prompts: tuple[int, ...] = (8192, 512, 32768)
    new_tokens: int = 96  # generate's
    checked: lf.LlamaConfig = models.shape()  # whose logits are compared


def fitting(config: lf.LlamaConfig, memory: int) -> lf.LlamaConfig:
    """As many layers as fit thrice: ours in bf16 and FP8, and transformers'."""
    c = config
    width = c.num_attention_heads + 2 * c.num_key_value_heads
    per_layer = c.hidden_size * (
        (width + c.num_attention_heads) * c.head_dim + 3 * c.intermediate_size
    )
    fixed = 2 * c.hidden_size * c.vocab_size
    layers = int((memory / 5 - fixed) // per_layer)  # 2 + 1 + 2 bytes a weight
    return dataclasses.replace(c, num_hidden_layers=max(1, min(layers, c.num_hidden_layers)))


def work(device: torch.device, tiny: bool = False) -> Work:
    if tiny:
        config = models.narrow()
        return Work(config, (1, 2), 16, (24,), (16, 8), 3, config)
    total = torch.cuda.get_device_properties(device).total_memory
    return Work(fitting(lf.LlamaConfig.llama_3_1_8b(), total - RESERVE))


class Bench:
    """The models, made when first needed, and what is measured of them."""

    def __init__(self, place: Place, work: Work, limits: dict[str, float], budget: float) -> None:
        self.place, self.work, self.limits, self.budget = place, work, limits, budget
        self.device = place.device

    @functools.cached_property
    def ours(self) -> dict[str, lf.Llama]:
        make = functools.partial(lf.Llama.from_config, self.work.config, device=self.device)
        return {"bf16": make(), "FP8": make(quantize="fp8")}

    @functools.cached_property
    def transformers(self) -> Any:
        if importlib.util.find_spec("transformers") is None:
            raise Unsupported("transformers is not installed")
        return models.transformers_model(self.work.config, self.device)

    def tasks(self) -> dict[str, Callable[[], Rows]]:
        w = self.work
        return {
            f"decode batch {w.batches[0]}": lambda: self.decode(w.batches[0], w.context),
            f"prefill {w.prompts[0]}": lambda: self.prefill(w.prompts[0]),
            "logits": self.logits,
            **{f"decode batch {b}": lambda b=b: self.decode(b, w.context) for b in w.batches[1:]},
            "profile": self.profile,
            "generate": self.generate,
            **{f"prefill {n}": lambda n=n: self.prefill(n) for n in w.prompts[1:]},
            **{f"decode at {n}": lambda n=n: self.decode(1, n) for n in w.contexts},
        }

    def decode(self, batch: int, context: int) -> Rows:
        runs = {name: self._step(m, batch, context) for name, m in self.ours.items()}
        timings = self._measure({**runs, "transformers": self._eager_step(batch, context)})
        tokens, rows = STEPS * batch, []
        for name, model in self.ours.items():
            seconds = STEPS * self._bytes(model, batch, context) / self.limits["read"]
            row = model_rows.row(
                f"decode batch {batch}, context {context}", name, timings, tokens, "read", seconds
            )
            rows.append(
                {**row, "tag": f"decode {name} {batch}" if context == self.work.context else ""}
            )
        return rows

    def prefill(self, seqlen: int) -> Rows:
        config = self.work.config
        prompt = self._tokens(1, seqlen)
        runs = {
            name: lambda m=m: m.logits(m.hidden(prompt)[:, -1]) for name, m in self.ours.items()
        }
        hf = self.transformers
        runs["transformers"] = lambda: hf(prompt, logits_to_keep=1, use_cache=False).logits
        timings = self._measure(runs)
        flops, rows = models.prefill_flops(config, seqlen), []
        for name in self.ours:
            limit = "bf16" if name == "bf16" or "fp8" not in self.limits else "fp8"
            row = model_rows.row(
                f"prefill {seqlen}", name, timings, seqlen, limit, flops / self.limits[limit]
            )
            rows.append({**row, "tag": f"prefill {name} {seqlen}"})
        return rows

    def generate(self) -> Rows:
        """What a user's call gives, sampling and the host's loop included: tokens a second from
        the second new token on, without a baseline."""
        rows = []
        for name, model in self.ours.items():
            for batch in self.work.batches[:2]:
                prompts = self._tokens(batch, 128 if self.work.context > 128 else 8).tolist()
                stamps: list[float] = []

                def stamp(index: int, token: int, stamps: list[float] = stamps) -> None:
                    stamps.append(time.perf_counter())

                for _ in range(2):  # the first captures graphs and compiles
                    stamps.clear()
                    model.generate(
                        prompts,
                        self.work.new_tokens,
                        temperature=0.0,
                        stop_ids=(),
                        on_token=stamp,
                    )
                rate = (len(stamps) - batch) / (stamps[-1] - stamps[batch - 1])
                rows.append(
                    {
                        "op": f"generate batch {batch}",
                        "shape": name,
                        "tokens_per_s": rate,
                        "ms_per_token": 1e3 / rate,
                        "tag": f"generate {name} {batch}",
                    }
                )
        return rows

    def logits(self) -> Rows:
        """max |logit - exact| / max |exact|; exact: the same bf16 weights, computed in fp32."""
        found = end_to_end.compare_logits(self.work.checked, self.device)
        wrong = not found["ours bf16"] <= 2 * found["transformers bf16"] + 2**-8
        layers = self.work.checked.num_hidden_layers
        wrong = wrong or not found["ours FP8"] < 0.2  # NaN is wrong too
        return [{"op": "logits", "shape": f"{layers} layers", "errors": found, "wrong": wrong}]

    def profile(self) -> Rows:
        """The kernels of one FP8 decode step, by time."""
        run = self._step(self.ours["FP8"], 1, self.work.context, graph=False)
        run(0)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            run(0)
        on_gpu = self.device.type == "cuda"
        events = [
            {
                "name": event.key[:120],
                "calls": event.count / STEPS,
                "us": (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
                / STEPS,
            }
            for event in profile.key_averages()
        ]
        top = sorted(events, key=lambda event: -event["us"])[:30]
        return [{"op": "profile", "shape": "FP8 decode step", "kernels": top}]

    def _measure(self, runs: dict[str, Callable[[], object]]) -> dict[str, timing.Timing]:
        waiting = {name: waited(run, self.device) for name, run in runs.items()}
        return timing.measure(waiting, self.budget)

    def _tokens(self, batch: int, seqlen: int) -> Tensor:
        return torch.randint(self.work.config.vocab_size, (batch, seqlen), device=self.device)

    def _step(
        self, model: lf.Llama, batch: int, context: int, graph: bool = True
    ) -> Callable[..., None]:
        """STEPS decode steps of a batch, each sequence with `context` random tokens cached."""
        cache = lf.KVCache(model.config, context + 1, batch, dtype=model.dtype, device=self.device)
        cache.k.normal_()
        cache.v.normal_()
        cache.append(context)
        cache.advance(context)
        fixed = copy.copy(cache)
        appended = cache.append(1)
        fixed.append = lambda count: appended  # type: ignore[method-assign]
        fixed.advance = lambda count: None  # type: ignore[method-assign]
        token = self._tokens(batch, 1)

        def step() -> None:
            token.copy_(model(token, cache=fixed)[:, -1:].argmax(-1))

        with torch.inference_mode():
            once = captured(step, self.device) if graph else step
        return lambda *_: [once() for _ in range(STEPS)][0]

    def _eager_step(self, batch: int, context: int) -> Callable[[], None]:
        hf = self.transformers
        past = hf(self._tokens(batch, context), use_cache=True, logits_to_keep=1).past_key_values
        token = self._tokens(batch, 1)

        def run() -> None:
            nonlocal token
            for _ in range(STEPS):
                logits = hf(token, past_key_values=past, use_cache=True).logits
                token = logits[:, -1:].argmax(-1)
            past.crop(-STEPS)

        return run

    def _bytes(self, model: lf.Llama, batch: int, context: int) -> float:
        """What a step cannot do without reading: every weight but the embedding, and the cache."""
        c = model.config
        cache = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 2
        linears = sum(w.nbytes for w in models.linears(model))
        return linears + batch * context * cache


def run(
    device: torch.device, budget: float, say: Callable[[str], None], tiny: bool = False
) -> dict[str, Any]:
    """For `python -m bench`: end_to_end.run's counterpart."""
    from . import limits
    from .baselines import Compiler
    from .gpu_case import FULL, TINY

    place = Place(device, TINY if tiny else FULL, Compiler(0.0))
    rates = {}
    for name, task in limits.tasks(place, 0.5).items():
        try:
            rates.update(limits.of(task()))
        except Unsupported as why:
            say(f"limit {name}: {why}")
    bench = Bench(place, work(device, tiny), rates, budget / 2)
    say(f"end to end: 8B, {bench.work.config.num_hidden_layers} layers, making")
    rows: Rows = []
    with torch.inference_mode():
        for name, task in bench.tasks().items():
            if name.startswith(("decode batch", "prefill", "logits")):
                rows += task()
                say(f"  {name} measured")
    (logits,) = (r["errors"] for r in rows if r["op"] == "logits")
    return {
        "what": f"8B, {bench.work.config.num_hidden_layers} layers, vocab "
        f"{bench.work.config.vocab_size}, random weights; baseline: transformers, sdpa, bf16",
        "rows": [r for r in rows if r["op"] != "logits"],
        "logits": logits,
    }
