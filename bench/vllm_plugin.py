"""Measure vLLM on this CPU with and without the plugin: python -m bench.vllm_plugin.

Two layers of 8B's shapes, vocabulary 32,000, random weights, in bf16 and in FP8 (compressed-tensors
with a scale per row). Each of the four engines has a process of its own; they measure by turns.
Prefix caching is off, since the prompts repeat.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SEQUENCES, PROMPTS, ROUNDS = (1, 4, 16), (512, 2048), 7
SECONDS, PATIENCE = 0.5, 5.0  # of decoding in a round, 1 to 32 steps; of a job's rounds
MARK = "SECONDS"  # starts an engine's answer, among what vLLM prints
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


def serve(model: str, eager: bool) -> None:
    """Answer each line [sequences, prompt, tokens] of stdin with the seconds of that batch."""
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
    print(MARK, flush=True)
    for line in sys.stdin:
        sequences, prompt, tokens = json.loads(line)
        prompts = [{"prompt_token_ids": [3 + i] * prompt} for i in range(sequences)]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        print(MARK, time.perf_counter() - start, flush=True)


class Engine:
    """vLLM in a process of its own, which sleeps while another one measures."""

    def __init__(self, model: Path, plugin: bool, args: argparse.Namespace) -> None:
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
        command = [sys.executable, "-m", "bench.vllm_plugin", "--serve", str(model)]
        command += ["--eager"] if args.eager else []
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, env=environment, stdin=pipe, stdout=pipe, text=True
        )
        self._answer()

    def _answer(self) -> str:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(MARK):
                return line.removeprefix(MARK)
        raise SystemExit(f"error: the engine ended with code {self.process.wait()}")

    def seconds(self, sequences: int, prompt: int, tokens: int) -> float:
        print(json.dumps([sequences, prompt, tokens]), file=self.process.stdin, flush=True)
        return float(self._answer())


def measure(engines: list[Engine]) -> list[dict[str, float]]:
    """Return tokens a second of each job, medians of rounds that the engines take by turns."""
    jobs = [(n, 1, None) for n in SEQUENCES] + [(1, n, 1) for n in PROMPTS]
    result: list[dict[str, float]] = [{} for _ in engines]
    for name, (sequences, prompt, tokens) in zip(JOBS, jobs, strict=True):
        steps: list[int] = []
        rounds: list[list[float]] = []
        for engine in engines:
            cold = engine.seconds(sequences, prompt, 1)
            slow = cold >= PATIENCE  # the first call counts
            once = cold if slow else engine.seconds(sequences, prompt, 1)
            steps.append(tokens or max(1, min(32, int(SECONDS / once))))
            rounds.append([cold] if slow else [])
        for _ in range(ROUNDS):
            for engine, n, spent in zip(engines, steps, rounds, strict=True):
                if sum(spent) < PATIENCE:
                    spent.append(engine.seconds(sequences, prompt, n))
        for figures, n, spent in zip(result, steps, rounds, strict=True):
            # A prompt of one token is a step like the others.
            done = sequences * n if tokens is None else prompt
            figures[name] = done / statistics.median(spent)
        print(name, [figures[name] for figures in result], file=sys.stderr)
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
    p.add_argument("--serve", metavar="MODEL", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.serve:
        serve(args.serve, args.eager)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.models or Path(scratch)
        write_models(folder)
        names = [name for name in COLUMNS if name in (args.only or COLUMNS)]
        engines = []
        for side, weights in map(str.split, names):
            engines.append(Engine(folder / weights, side == "plugin", args))
        print(table(dict(zip(names, measure(engines), strict=True))))


if __name__ == "__main__":
    main()
