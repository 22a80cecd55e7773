"""The main job: Llama 3.1's forward pass with the kernels swapped in, against eager transformers.

Both run the same random weights, of 8B's true shapes: four layers and a vocabulary of 32,000, so
that bf16, FP8 and the fp32 truth fit beside each other. Nothing here is extrapolated to 32 layers;
`--whole` runs the whole 8B preset instead, in FP8.
"""

from __future__ import annotations

import dataclasses
import resource
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import llama_fast as lf
from llama_fast import _cpu
from llama_fast.cache import KVCache

from .cases import CPU, matmul_limit
from .timing import measure

PREFILL, DECODE = 512, 8  # tokens; decode steps per round


def shape(layers: int = 4, vocab: int = 32000) -> lf.LlamaConfig:
    return dataclasses.replace(
        lf.LlamaConfig.llama_3_1_8b(), num_hidden_layers=layers, vocab_size=vocab
    )


def transformers_model(config: lf.LlamaConfig, device: torch.device = CPU) -> Any:
    """A randomly initialised bf16 LlamaForCausalLM of config's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hf = LlamaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=8192,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.rms_norm_eps,
        bos_token_id=1,
        eos_token_id=2,
    )
    hf._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(hf).eval()
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(0)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 1.0 if "embed" in name else p.shape[1] ** -0.5
            p.data.normal_(std=std, generator=generator)
    return model


def _decoder(model: lf.Llama, prompt: Tensor, room: int) -> tuple[Callable[[int], None], KVCache]:
    """A function that decodes DECODE tokens after prompt, over and over from the same context."""
    cache = KVCache(model.config, prompt.shape[1] + room, 1, dtype=model.dtype)
    model.hidden(prompt, cache=cache)
    token = prompt[:, -1:]

    def run(_: int) -> None:
        for _ in range(DECODE):
            model(token, cache=cache)

    return run, cache


def run(budget: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Prefill and decode, ours in FP8 and bf16 against transformers; and the logits' errors."""
    config = shape()
    say(f"end to end: 8B layers x {config.num_hidden_layers}, vocab {config.vocab_size}, making")
    hf = transformers_model(config)
    ours = _same_weights(hf, CPU)
    prompt = torch.randint(0, config.vocab_size, (1, PREFILL), generator=_generator())
    with torch.inference_mode():
        logits = _logit_errors(hf, ours, prompt[:, :64])
        matmul, flops = matmul_limit(torch.bfloat16)
        prefill = measure(
            {
                **{
                    name: lambda _, m=m: m.logits(m.hidden(prompt)[:, -1])
                    for name, m in ours.items()
                },
                "transformers": lambda _: hf(prompt, logits_to_keep=1, use_cache=False).logits,
                "limit": matmul,
            },
            budget,
        )
        say("  prefill measured")
        decoders = {name: _decoder(m, prompt, 4096)[0] for name, m in ours.items()}
        past = hf(prompt, use_cache=True).past_key_values
        token = prompt[:, -1:]

        def transformers_decode(_: int) -> None:
            for _ in range(DECODE):
                hf(token, past_key_values=past, use_cache=True)

        reads = {f"limit {name}": _read_weights(m) for name, m in ours.items()}
        decode = measure({**decoders, "transformers": transformers_decode, **reads}, 2 * budget)
        say("  decode measured")
    fastest = prefill["limit"].median * prefill_flops(config) / flops
    rows = [
        row(f"prefill {PREFILL}", name, prefill, PREFILL, "matmul", fastest, {"transformers": 1.1})
        for name in ours
    ]
    for name, targets in (("bf16", {}), ("FP8", {"transformers": 5.0})):
        fastest = decode[f"limit {name}"].median * DECODE
        rows.append(row("decode", name, decode, DECODE, "read", fastest, targets))
    return {
        "what": f"8B shapes, {config.num_hidden_layers} layers, vocab {config.vocab_size}, "
        f"random weights; baseline: transformers, sdpa, bf16",
        "rows": rows,
        "logits": logits,
    }


def linears(model: lf.Llama) -> list[Tensor]:
    """The weights that every token passes through; the embedding is only looked up."""
    layers = [w for x in model.weights.layers for w in (x.qkv, x.output, x.gate_up, x.down)]
    return [w.weight for w in (*layers, model.weights.head)]


def _read_weights(model: lf.Llama) -> Callable[[int], None]:
    """What one token of a decode cannot do without."""

    def run(_: int) -> None:
        for w in linears(model):
            _cpu.read_bandwidth_probe(w.data_ptr(), w.nbytes, torch.get_num_threads())

    return run


def prefill_flops(config: lf.LlamaConfig, tokens: int = PREFILL) -> float:
    """The linear layers on every token, the head on the last, and causal attention."""
    c, hidden = config, config.hidden_size
    heads = c.num_attention_heads * c.head_dim
    layer = hidden * (2 * heads + 2 * c.num_key_value_heads * c.head_dim + 3 * c.intermediate_size)
    attended = tokens**2 * heads  # two products, half of each masked
    per_layer = 2.0 * layer * tokens + 2.0 * attended
    return c.num_hidden_layers * per_layer + 2.0 * hidden * c.vocab_size


def _same_weights(hf: Any, device: torch.device) -> dict[str, lf.Llama]:
    """Ours, loaded from what transformers saves."""
    with tempfile.TemporaryDirectory(prefix="llama_fast-bench-") as folder:
        hf.save_pretrained(folder, safe_serialization=True)
        return {
            "bf16": lf.Llama.from_pretrained(folder, device=device, progress=False),
            "FP8": lf.Llama.from_pretrained(folder, quantize="fp8", device=device, progress=False),
        }


def compare_logits(config: lf.LlamaConfig, device: torch.device) -> dict[str, float]:
    """The errors of a model of that shape, over 64 tokens."""
    hf = transformers_model(config, device)
    prompt = torch.randint(0, config.vocab_size, (1, 64), generator=_generator()).to(device)
    return _logit_errors(hf, _same_weights(hf, device), prompt)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _logit_errors(hf: Any, ours: dict[str, lf.Llama], prompt: Tensor) -> dict[str, float]:
    """max |logit - exact| / max |exact|; exact: the same bf16 weights, computed in fp32."""
    eager = hf(prompt).logits.float()
    exact = hf.float()(prompt).logits
    hf.bfloat16()
    scale = exact.abs().max()
    found = {"transformers bf16": ((eager - exact).abs().max() / scale).item()}
    for name, model in ours.items():
        found[f"ours {name}"] = ((model(prompt) - exact).abs().max() / scale).item()
    return found


def row(
    what: str,
    name: str,
    timings: dict[str, Any],
    tokens: int,
    limit: str,
    fastest: float,
    targets: dict[str, float] | None = None,
) -> dict[str, Any]:
    """fastest: the seconds that the limit alone would take."""
    targets = targets or {}
    t, eager = timings[name], timings["transformers"]
    times = {"transformers": eager.median / t.median}
    return {
        "op": what,
        "shape": name,
        "tokens_per_s": tokens / t.median,
        "transformers_tokens_per_s": tokens / eager.median,
        "ms_per_token": 1e3 * t.median / tokens,
        "limit": limit,
        "of_limit": fastest / t.median,
        "times": times,
        "targets": targets,
        "met": {k: times[k] >= v for k, v in targets.items()},
        "seconds": {n: v.to_json() for n, v in timings.items()},
    }


def line(r: dict[str, Any]) -> str:
    mark = "".join("*" if ok else f" (>={r['targets'][n]:g})" for n, ok in r["met"].items())
    return (
        f"{r['op']:<{max(16, len(r['op']) + 2)}}{r['shape']:<6}{r['tokens_per_s']:>9.1f} tokens/s"
        f"{r['ms_per_token']:>10.2f} ms a token {r['of_limit']:>5.0%} of {r['limit']:<8}"
        "transformers "
        f"{r['transformers_tokens_per_s']:>7.1f} tokens/s   {r['times']['transformers']:.2f}x{mark}"
    )


def whole(
    say: Callable[[str], None], steps: int = 16, device: torch.device = CPU
) -> dict[str, Any]:
    """The 8B preset, all 32 layers, FP8 random weights: prefill, decode, peak memory."""
    config = lf.LlamaConfig.llama_3_1_8b()
    start = time.perf_counter()
    model = lf.Llama.from_config(config, quantize="fp8", device=device)
    made = time.perf_counter() - start
    say(f"8B preset, {config.num_hidden_layers} layers, FP8 random weights made in {made:.0f} s")
    prompt = torch.randint(0, config.vocab_size, (1, PREFILL), generator=_generator()).to(device)
    cache = KVCache(config, PREFILL + steps + 1, 1, device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    start = time.perf_counter()
    with torch.inference_mode():
        logits = model.logits(model.hidden(prompt, cache=cache)[:, -1:])
        wait()
        prefill = time.perf_counter() - start
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            logits = model(logits[:, -1:].argmax(-1), cache=cache)
            wait()
            seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
    found = {
        "init_s": made,
        "prefill_tokens_per_s": PREFILL / prefill,
        "decode_tokens_per_s": 1 / sorted(seconds)[steps // 2],
        "peak_gib": peak,
    }
    say(
        f"prefill {PREFILL}: {found['prefill_tokens_per_s']:.1f} tokens/s   decode: "
        f"{found['decode_tokens_per_s']:.2f} tokens/s   peak memory {peak:.1f} GiB"
    )
    return found
