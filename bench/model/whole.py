"""Run the whole 8B preset once (`--whole`): 32 layers of random weights in FP8. Of a larger model
(`--whole --model 405b`) one layer of the true width runs, and a part of the head; the whole model
is extrapolated.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import llama_fast as lf
from llama_fast.plan import roofline
from llama_fast.plan.gpus import Gpu
from llama_fast.plan.memory import Rank

from ..timing import CPU, Run, Speed, limits, measure
from ..timing.events import waited
from . import models

TOKENS = 256  # of a layer's prompt, and before a decoded token
HEAD = 16  # n: an nth of the head's rows runs
SECONDS = 3.0  # of rounds, for each of prompt and decoding


def run(say: Callable[[str], None], steps: int = 16, device: torch.device = CPU) -> dict[str, Any]:
    """Measure prefill, decode and peak memory."""

    def timed(f: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, float]:
        start = time.perf_counter()
        result = f(*args, **options)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return result, time.perf_counter() - start

    config = lf.LlamaConfig.llama_3_1_8b()
    model, made = timed(lf.Llama.from_config, config, quantize="fp8_all", device=device)
    say(f"8B preset, {config.num_hidden_layers} layers, FP8 random weights made in {made:.0f} s")
    prompt = models.prompt(config, models.PREFILL).to(device)
    cache = lf.KVCache(config, models.PREFILL + steps + 1, 1, device=device)
    seconds = []
    with torch.inference_mode():
        read = lambda: model.logits(model.hidden(prompt, cache=cache, last=True))  # noqa: E731
        logits, prefill = timed(read)
        for _ in range(steps):
            logits, took = timed(model, logits[:, -1:].argmax(-1), cache=cache)
            seconds.append(took)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
    found = {
        "init_s": made,
        "prefill_tokens_per_s": models.PREFILL / prefill,
        "decode_tokens_per_s": 1 / statistics.median_high(seconds),
        "peak_gib": peak,
    }
    say(
        f"prefill {models.PREFILL}: {found['prefill_tokens_per_s']:.1f} tokens/s   decode: "
        f"{found['decode_tokens_per_s']:.2f} tokens/s   peak memory {peak:.1f} GiB"
    )
    return found


def layer(
    name: str,
    config: lf.LlamaConfig,
    say: Callable[[str], None],
    speed: Speed,
    device: torch.device = CPU,
) -> dict[str, Any]:
    """Measure one layer in FP8, a part of the head and the limits, which alternate. Extrapolate the
    model as layers x layer + head, beside the least time that llama-fast plan has for this
    machine's measured rates."""
    part = replace(config, num_hidden_layers=1, vocab_size=config.vocab_size // HEAD)
    model = lf.Llama.from_config(part, quantize="fp8_all", device=device)
    cache = lf.KVCache(part, TOKENS + 1, device=device)
    linears = models.linears(model)[:-1]  # without the head
    size = sum(w.nbytes for w in linears)
    say(f"{name}: one layer of {config.num_hidden_layers}, {size / 1e9:.2f} GB of random FP8")
    compute = limits.compute(torch.bfloat16, device, speed)

    def forward(x: torch.Tensor, _: int) -> object:
        cache.truncate([TOKENS if x.shape[1] == 1 else 0])
        append = cache.append(x.shape[1])
        return model.forward(x, append.positions, cache, append)

    def logits(x: torch.Tensor, _: int) -> object:
        return model.logits(x)

    def read(_: int) -> None:
        for w in linears:
            limits.read_once(w)

    elements = sum(w.numel() for w in linears)
    found: dict[str, Any] = {"model": name, "layer_bytes": size}
    with torch.inference_mode():
        cache.append(TOKENS)
        cache.advance(TOKENS)
        for tokens in (1, TOKENS):
            x = torch.randn(1, tokens, part.hidden_size, device=device).bfloat16()
            runs: dict[str, Run] = {
                "layer": partial(forward, x),
                "head": partial(logits, x[:, -1:]),
                "read": read,
                "compute": compute.run,
            }
            timed = measure({n: waited(run, device) for n, run in runs.items()}, SECONDS)
            times = {n: t.median for n, t in timed.items()}
            pairs = TOKENS if tokens == 1 else TOKENS * (TOKENS + 1) / 2
            flops = 2 * tokens * elements + 4 * pairs * part.num_attention_heads * part.head_dim
            rates = size / times["read"], compute.work / times["compute"]
            here = Gpu("this machine", 0.0, *(rate / 1e12 for rate in rates))
            rank = Rank(config, quantize="fp8_all")
            if tokens == 1:
                job, limit, rate = f"tg1 @ d{TOKENS}", times["read"], f"{rates[0] / 1e9:.1f} GB/s"
                least, bound = roofline.decode(rank, here, TOKENS, 1), "read"
            else:
                job, limit, rate = f"pp{TOKENS}", flops / rates[1], f"{rates[1] / 1e12:.3f} TFLOP/s"
                least, bound = roofline.prefill(rank, here, TOKENS), compute.name
            seconds = config.num_hidden_layers * times["layer"] + HEAD * times["head"]
            found[job] = {
                "layer_s": times["layer"],
                "head_part_s": times["head"],
                "limit": bound,
                "of_limit": limit / times["layer"],
                "extrapolated_s": seconds,
                "least_s": least.seconds,
            }
            say(
                f"{job}: a layer {1e3 * times['layer']:.1f} ms, {limit / times['layer']:.0%} of "
                f"{bound} ({rate}); 1/{HEAD} of the head {1e3 * times['head']:.2f} ms\n"
                f"  extrapolated to {config.num_hidden_layers} layers and the head, not run: "
                f"{seconds:.2f} s, {tokens / seconds:.3g} tokens/s; the least that llama_fast.plan "
                f"has at these rates: {least.seconds:.2f} s"
            )
    return found
