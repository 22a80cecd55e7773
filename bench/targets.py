"""What a GPU report is held against, and how far it is from it.

The figures are the project's own, set on 2026-11 from the best that is published for Hopper: QuACK
and Liger for norms and rope, FlashAttention 3 and cuDNN for prompts, TileOPs for decode, FBGEMM and
DeepGEMM for FP8 products, torchao for the model. Absolute figures are an H200's (4.8 TB/s, of which
a copy reaches 4.3); an H100 SXM multiplies matrices as fast, about 800 TFLOP/s in bf16 measured on
both, and moves 0.7 times the bytes (3.35 and 3.0 TB/s).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# GPU, by a part of its name -> its bandwidth beside an H200's.
BANDWIDTH = {"NVIDIA H200": 1.0, "H100 80GB HBM3": 0.7}


@dataclass(frozen=True)
class Target:
    what: str
    tag: str  # of the report's rows; several: the worst one counts
    metric: str  # a key of the row, or "times:<baseline>"
    wanted: float
    unit: str = ""  # "": a ratio, which holds anywhere
    backend: str = ""  # this one's figures, where it was measured

    def on(self, gpu: str) -> float | None:
        """What is wanted there; None on a GPU that nothing absolute is known of."""
        share = next((share for name, share in BANDWIDTH.items() if name in gpu), None)
        if not self.unit or share is None:
            return None if self.unit else self.wanted
        return self.wanted if self.unit == "TFLOP/s" else self.wanted * share


TARGETS = (
    Target("RMSNorm, 32k x 4096: of copy bandwidth", "norm", "of_limit", 0.92),
    Target("RMSNorm, 32k x 4096: times eager", "norm", "times:eager", 5.0),
    Target("norm + residual + FP8: of copy bandwidth", "norm_fp8", "of_limit", 0.88),
    Target("RoPE: of copy bandwidth", "rope", "of_limit", 0.85),
    Target("RoPE: times eager", "rope", "times:eager", 9.0),
    Target("RoPE + append: of copy bandwidth", "append", "of_limit", 0.85),
    Target("RoPE + append: times eager", "append", "times:eager", 9.0),
    Target("prefill attention, causal 16k", "prefill 16384", "rate", 480, "TFLOP/s"),
    Target("prefill attention, causal 16k, CUDA", "prefill 16384", "rate", 620, "TFLOP/s", "cuda"),
    Target("decode attention, B32 x 4k", "decode batch", "rate", 4000, "GB/s"),
    Target("decode attention, B32 x 4k: of read bandwidth", "decode batch", "of_limit", 0.85),
    Target("decode attention, B1 x 128k: of read bandwidth", "decode long", "of_limit", 0.85),
    Target("FP8 GEMM, row-wise 8192^3", "gemm row", "rate", 1360, "TFLOP/s"),
    Target("FP8 GEMM, row-wise 8192^3, CUDA", "gemm row", "rate", 1500, "TFLOP/s", "cuda"),
    Target("FP8 GEMM, 8192^3, with quantisation", "gemm quantised", "rate", 1300, "TFLOP/s"),
    Target("FP8 GEMM, blocks 4096 x 7168 x 16384", "gemm blocks", "rate", 1550, "TFLOP/s"),
    Target("FP8 GEMM, M <= 64 (the slowest)", "gemm few", "rate", 3600, "GB/s"),
    Target("8B decode, batch 1, bf16", "decode bf16 1", "tokens_per_s", 230, "tokens/s"),
    Target("8B decode, batch 1, FP8", "decode FP8 1", "tokens_per_s", 420, "tokens/s"),
    Target("8B decode, FP8: times eager transformers", "decode FP8 1", "times:transformers", 8.0),
    Target("8B prefill 8k, FP8: times transformers", "prefill FP8 8192", "times:transformers", 2.5),
)


def value(row: dict[str, Any], metric: str) -> float | None:
    name, _, baseline = metric.partition(":")
    found = row.get(name)
    return found.get(baseline) if baseline and found else found


def of_backend(row: dict[str, Any], backend: str) -> dict[str, Any] | None:
    """The row with that backend's figures for the serving one's; None where it was not measured."""
    entry = row.get("backends", {}).get(backend, {})
    if "seconds" not in entry:
        return row if row.get("backend") == backend else None
    factor = row["seconds"]["ours"]["median"] / entry["seconds"]["median"]
    times = {name: value * factor for name, value in row["times"].items()}
    guess = dict(row.get("predicted") or {})
    if "of_time" in guess:
        guess["of_time"] *= factor
    return {**row, **entry, "times": times, "predicted": guess, "backend": backend}


def compare(rows: Iterable[dict[str, Any]], gpu: str) -> list[dict[str, Any]]:
    """One entry a target that this run can speak about: got, and the verdict."""
    rows = list(rows)
    found = []
    for target in TARGETS:
        mine = [row for row in rows if row.get("tag") == target.tag]
        if target.backend:
            mine = [its for row in mine if (its := of_backend(row, target.backend))]
            if not mine:
                continue
        values = [v for row in mine if (v := value(row, target.metric)) is not None]
        got = min(values, default=None)
        guesses = [(row.get("predicted") or {}).get("of_time") for row in mine]
        found.append(
            {
                "what": target.what,
                "wanted": target.on(gpu) or target.wanted,
                "unit": target.unit,
                "got": got,
                "of_predicted": min((g for g in guesses if g is not None), default=None),
                "verdict": _verdict(target, got, gpu, any(row.get("wrong") for row in mine)),
            }
        )
    return found


def _verdict(target: Target, got: float | None, gpu: str, wrong: bool) -> str:
    if got is None:
        return "not measured"
    if wrong:
        return "WRONG"
    wanted = target.on(gpu)
    if wanted is None:
        return "an H200's"
    return "met" if got >= wanted else f"missed by {1 - got / wanted:.0%}"


def table(entries: list[dict[str, Any]]) -> str:
    def figure(x: float | None) -> str:
        return "-" if x is None else f"{x:.0f}" if abs(x) >= 100 else f"{x:.2f}"

    lines = [f"{'target':<50}{'wanted':>10}{'got':>10} {'':<9}{'of model':>9}  verdict"]
    for e in entries:
        unit = e["unit"] or ("x" if "times" in e["what"] else "")
        of_model = "" if e["of_predicted"] is None else f"{e['of_predicted']:.0%}"
        lines.append(
            f"{e['what']:<50}{'>= ' + figure(e['wanted']):>10}{figure(e['got']):>10} {unit:<9}"
            f"{of_model:>9}  {e['verdict']}"
        )
    met = sum(e["verdict"] == "met" for e in entries)
    missed = sum(e["verdict"].startswith("missed") for e in entries)
    return "\n".join([*lines, f"{met} met, {missed} missed, {len(entries) - met - missed} open"])


def exponent(points: list[tuple[float, float]]) -> float | None:
    """The slope of log(y) over log(x), least squares: how cost grows with size."""
    if len({x for x, _ in points}) < 2:
        return None
    xs, ys = ([math.log(p[i]) for p in points] for i in range(2))
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True))
    return slope / sum((x - mx) ** 2 for x in xs)


def growth(found: dict[str, Any]) -> dict[str, float]:
    """How cost grows with size, as exponents: causal prompts with their length, and so on."""
    ops = found["parts"].get("ops", {}).get("rows", [])
    model = found["parts"].get("model", {}).get("rows", [])
    families = {
        "attention's time over causal tokens": [
            (float(r["shape"].split()[1].rstrip(",")), r["seconds"]["ours"]["median"])
            for r in ops
            if r["op"] == "attention" and r["shape"].startswith("causal ")
        ],
        "8B FP8 prefill's time over tokens": [
            (float(r["op"].split()[1]), r["seconds"]["FP8"]["median"])
            for r in model
            if r["op"].startswith("prefill") and r["shape"] == "FP8"
        ],
        "8B FP8 decode's time over context": [
            (float(r["op"].split()[-1]), r["seconds"]["FP8"]["median"])
            for r in model
            if r["op"].startswith("decode batch 1,") and r["shape"] == "FP8"
        ],
    }
    fitted = {what: exponent(points) for what, points in families.items()}
    return {what: value for what, value in fitted.items() if value is not None}


# ---- both GPU backends side by side ----


def compared(backends: dict[str, dict[str, Any]]) -> str:
    """A line's end: every other backend beside the one that serves, which comes first."""
    parts = []
    served, *others = backends.items()
    for name, entry in others:
        if "seconds" in entry:
            ratio = served[1]["seconds"]["median"] / entry["seconds"]["median"]
            parts.append(f"{name} {ratio:.2f}x as fast{' WRONG' if entry['wrong'] else ''}")
        elif "failed" in entry:
            parts.append(f"{name} FAILED")
    return f"; {', '.join(parts)}" if parts else ""


def side_by_side(rows: list[dict[str, Any]]) -> list[str]:
    """A line an op: how fast the CUDA kernels are beside Triton's, in how many cases."""
    lines = []
    for op in dict.fromkeys(row["op"] for row in rows if "cuda" in row.get("backends", {})):
        mine = [row.get("backends", {}) for row in rows if row["op"] == op]
        ratios = [
            b["triton"]["seconds"]["median"] / b["cuda"]["seconds"]["median"]
            for b in mine
            if all("seconds" in b.get(name, {}) for name in ("cuda", "triton"))
        ]
        speed = f"{min(ratios):.2f} to {max(ratios):.2f}x triton" if ratios else "not compared"
        entries = [b["cuda"] for b in mine if "cuda" in b]
        counts = {
            "WRONG": sum(bool(entry.get("wrong")) for entry in entries),
            "FAILED": sum("failed" in entry for entry in entries),
        }
        bad = "".join(f", {n} {what}" for what, n in counts.items() if n)
        lines.append(f"cuda {op:<24}{speed} in {len(ratios)} of {len(mine)} cases{bad}")
    return lines
