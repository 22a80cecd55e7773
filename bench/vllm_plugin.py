"""Measure vLLM on this CPU with and without the plugin: python -m bench.vllm_plugin.

Two layers of 8B's shapes, vocabulary 32,000, random weights, in bf16 and in FP8 (compressed-tensors
with a scale per row). Each of the four engines runs in a process of its own. Prefix caching is off,
since the prompts repeat.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SEQUENCES, PROMPTS, ROUNDS = (1, 4, 16), (512, 2048), 5
SECONDS, PATIENCE = 0.5, 3.0  # of decoding in a round, 1 to 32 steps; of a job's rounds
JOBS = (*(f"tg @ {n}" for n in SEQUENCES), *(f"pp{n}" for n in PROMPTS))
AS_AVX2 = {
    "LLAMA_FAST_CPU_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
}
COLUMNS = ("vLLM bf16", "plugin bf16", "vLLM FP8", "plugin FP8")


def write_models(folder: Path) -> None:
    """Write bf16/ and FP8/, 2.3 GB, unless they are there."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llama_fast.checkpoint.quantize import quantize_checkpoint

    if (folder / "FP8").exists():
        return
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder / "bf16")
    quantize_checkpoint(folder / "bf16", folder / "FP8")


def measure(model: str, eager: bool) -> dict[str, float]:
    """Return tokens a second of each job, of its fastest round: while another process uses a core,
    each product waits for a quantum of the scheduler."""
    if os.environ.get("LLAMA_FAST_CPU_ISA") == "avx2":
        import torch

        # vLLM asks these which of its builds to load; no variable of its own restricts it.
        torch.cpu._is_avx512_supported = lambda: False
        torch.cpu._is_avx512_bf16_supported = lambda: False
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="bfloat16",
        enforce_eager=eager,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=2 * max(PROMPTS),
        max_num_seqs=max(SEQUENCES),
        kv_cache_memory_bytes=256 << 20,
    )

    def seconds(sequences: int, prompt: int, tokens: int) -> float:
        prompts = [{"prompt_token_ids": [3 + i] * prompt} for i in range(sequences)]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    def best(sequences: int, prompt: int, tokens: int) -> float:
        values: list[float] = []
        while not values or (len(values) < ROUNDS and sum(values) < PATIENCE):
            values.append(seconds(sequences, prompt, tokens))
        return min(values)

    result = {}
    for n in SEQUENCES:  # a prompt of one token is a step like the others
        seconds(n, 1, 1)
        steps = max(1, min(32, int(SECONDS / seconds(n, 1, 1))))
        result[f"tg @ {n}"] = n * steps / best(n, 1, steps)
    for n in PROMPTS:
        result[f"pp{n}"] = n / best(1, n, 1)
        print(result, file=sys.stderr)
    return result


def run(model: Path, plugin: bool, args: argparse.Namespace) -> dict[str, float]:
    threads = {} if args.threads is None else {"OMP_NUM_THREADS": str(args.threads)}
    environment = {
        **os.environ,
        **threads,
        **(AS_AVX2 if args.avx2 else {}),
        "LLAMA_FAST_VLLM": str(int(plugin)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "bench.vllm_plugin", "--measure", str(model)]
    command += ["--eager"] if args.eager else []
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"error: the engine ended with code {done.returncode}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(columns: dict[str, dict[str, float]]) -> str:
    lines = ["| tokens/s | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for job in JOBS:
        cells = [f"{figures[job]:.3g}" for figures in columns.values()]
        lines.append(f"| {job} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m bench.vllm_plugin", description=__doc__)
    p.add_argument("--threads", type=int, metavar="N", help="OMP_NUM_THREADS of the engines")
    p.add_argument("--eager", action="store_true", help="--enforce-eager; default: torch.compile")
    p.add_argument("--avx2", action="store_true", help="both as on a CPU without AVX-512")
    p.add_argument("--only", action="append", choices=COLUMNS, help="only this column (repeatable)")
    p.add_argument("--models", type=Path, metavar="DIR", help="keep the two models there")
    p.add_argument("--measure", metavar="MODEL", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.eager)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.models or Path(scratch)
        write_models(folder)
        columns: dict[str, dict[str, float]] = {}
        for name in args.only or COLUMNS:
            side, weights = name.split()
            columns[name] = run(folder / weights, side == "plugin", args)
        print(table(columns))


if __name__ == "__main__":
    main()
