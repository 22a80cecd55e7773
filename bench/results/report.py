"""Build what a run prints and stores: one aligned line a case, and rows for the JSON file."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

import llama_fast as lf

from ..cases import Case
from ..timing import Timing, figures, machine
from . import files

# Added to twice eager's error: an ulp of bf16, for cases where eager is exact.
WRONG = 2.0**-7

HEADER = (
    f"{'op':<23}{'shape':<34}{'median (p10-p90) ms':<25}{'rate':>15}{'of limit':>9} {'':<7}"
    f"{'x eager':>13}  {'error':<7}  against"
)
LEGEND = (
    "x: how many times faster ours is   of limit: share of what this machine moved or computed in "
    "the\nsame rounds (copy; read; the faster of multiply-adds in registers, fma, and PyTorch's "
    "product, matmul)\nerror: largest, against fp64, divided by the largest value   1/n of it: "
    "measured on an nth of the heads,\nrows of the weight or tokens, times n: the whole takes "
    "too long"
)


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Describe hardware, versions, threads and commit, without the host name, since the file is
    meant to be shared. device: where the run measures; a GPU adds its driver, clocks and compilers.
    """
    on_gpu = device is not None and device.type == "cuda"
    return {
        "cpu": _cpu_model(),
        **machine.instruction_sets(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "llama_fast": lf.__version__,
        "commit": files.commit(),
        **(gpu_details() if on_gpu else {}),
    }


# nvidia-smi's queries, and the names of the answers. Nothing is ever set.
_SMI = {
    "driver_version": "driver",
    "clocks.sm": "sm_mhz",
    "clocks.max.sm": "max_sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.limit": "power_limit_w",
    "power.draw": "power_w",
    "temperature.gpu": "temperature_c",
    "mig.mode.current": "mig",
}


def gpu_details() -> dict[str, Any]:
    """Describe what figures on a GPU depend on besides its name."""
    major, minor = torch.cuda.get_device_capability()
    details: dict[str, Any] = {
        "sm": f"sm_{major}{minor}",
        "gpu_memory_gib": round(torch.cuda.get_device_properties().total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    for name in ("triton", "transformers"):
        try:
            details[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            details[name] = None
    return {**details, **gpu_state()}


def gpu_state() -> dict[str, str]:
    """Return nvidia-smi's clocks, power and temperature; empty where it does not run."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    answers = asked.stdout.splitlines()[0].split(",") if asked.stdout else []
    return {name: a.strip() for name, a in zip(_SMI.values(), answers, strict=False)}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def heading(results: dict[str, Any]) -> str:
    """Write the lines at the top: hardware, versions, threads, commit and options."""
    known = {**results["environment"], **results["options"]}
    lines = ["  ".join(f"{k} {v}" for k, v in known.items() if v is not None)]
    if results.get("speed"):
        lines.append(str(machine.Speed(**results["speed"])))
    if results["peers"]:
        lines.append("peers: " + ", ".join(f"{n} {v}" for n, v in results["peers"].items()))
    lines += [f"without {name}: {why}" for name, why in results["skipped"].items()]
    return "\n".join(lines)


def row(
    case: Case,
    timings: dict[str, Timing],
    errors: dict[str, float],
    backends: Collection[str] = (),
) -> dict[str, Any]:
    """Return a case's figures. "times": how many times faster ours is than each implementation;
    "errors": each one's, against fp64. backends: further backends of ours, which are held to the
    same bound."""
    mine, limit = timings["ours"], timings["limit"]
    others = [name for name in timings if name not in ("ours", "limit")]
    times = {name: timings[name].median / mine.median for name in others}
    of_limit = (case.work / mine.median) / (case.limit.work / limit.median)
    reached = {
        name: (of_limit if name == "limit" else times[name])
        for name in case.targets
        if name == "limit" or name in times
    }
    not_twins = ("ours", *backends)
    twin = next((n for n in ("eager", *errors) if n in errors and n not in not_twins), None)
    eager_error = errors[twin] if twin else 0.0
    bound = 2 * eager_error + WRONG
    wrong = [n for n in not_twins if n in errors and not errors[n] <= bound]  # NaN is wrong too
    scale = 1e9 if case.unit == "GB/s" else 1e12
    return {
        "op": case.op,
        "shape": case.shape,
        "axes": case.axes,
        "unit": case.unit,
        "work": case.work,
        "bytes": case.bytes,
        "flops": case.flops,
        "rate": case.work / mine.median / scale,
        "limit": case.limit.name,
        "limit_rate": case.limit.work / limit.median / scale,
        "of_limit": of_limit,
        "times": times,
        "targets": {name: case.targets[name] for name in reached},
        "met": {name: value >= case.targets[name] for name, value in reached.items()},
        "error": errors["ours"],
        "eager_error": eager_error,
        "errors": errors,
        "wrong": bool(wrong),
        "seconds": figures(timings, "ours"),
        **({"wrong_backends": wrong} if wrong and backends else {}),
    }


def line(r: dict[str, Any], targets: bool = False) -> str:
    """Write a case's line. targets: mark its targets, * met and (>=n) missed."""
    if "tokens_per_s" in r:
        return _forward_line(r, targets)
    mine = r["seconds"]["ours"]
    spread = f"{mine['median'] * 1e3:.3f} ({mine['p10'] * 1e3:.3f}-{mine['p90'] * 1e3:.3f})"
    eager = "-"
    if "eager" in r["times"]:
        eager = f"{r['times']['eager']:.2f}x{_target(r, 'eager', targets)}"
    against = "  ".join(
        f"{name} {value:.2f}x{_target(r, name, targets)}"
        for name, value in r["times"].items()
        if name != "eager"
    )
    limit = f"{r['of_limit']:>8.0%} {_target(r, 'limit', targets):<7}"
    wrong = f"  WRONG{_where(r)}: more than twice eager's error" if r["wrong"] else ""
    return (
        f"{r['op']:<23}{r['shape']:<33} {spread:<25}{r['rate']:>8.3g} {r['unit']:<7}"
        f"{limit}{eager:>13}  {r['error']:.1e}  {against}{wrong}"
    )


def _where(r: dict[str, Any]) -> str:
    return f" ({', '.join(r['wrong_backends'])})" if "wrong_backends" in r else ""


def _target(r: dict[str, Any], name: str, shown: bool) -> str:
    if not shown or name not in r["targets"]:
        return ""
    return "*" if r["met"][name] else f" (>={r['targets'][name]:g})"


def _forward_line(r: dict[str, Any], targets: bool) -> str:
    against = "  ".join(f"{n} {x:.2f}x{_target(r, n, targets)}" for n, x in r["times"].items())
    return (
        f"{r['op']:<16}{r['shape']:<6}{r['rate']:>9.1f} tokens/s"
        f"{r['ms_per_token']:>10.2f} ms a token {r['of_limit']:>5.0%} of {r['limit']:<8}{against}"
    )


def forward(found: dict[str, Any], targets: bool = False) -> str:
    """Write the forward pass's lines."""
    lines = [found["what"], *(line(r, targets) for r in found["rows"])]
    first = next((r for r in found["rows"] if re.fullmatch(r"pp\d+", r["op"])), None)
    if first:
        shown = {n: t["median"] for n, t in first["seconds"].items() if not n.startswith("limit")}
        took = ", ".join(f"{n} {1e3 * s:.0f} ms" for n, s in shown.items())
        lines.append(f"time to first token, {first['op'][2:]} tokens: {took}")
    whole = ", ".join(
        f"{r['op']} {r['shape']} {r['all_layers_tokens_per_s']:.3g}" for r in found["rows"]
    )
    lines.append(f"extrapolated, not run, to all of 8B's layers and vocabulary, tokens/s: {whole}")
    memory = ", ".join(
        f"{n} {m['weights_gib']:.2f} + {m['prompt_gib']:.2f} GiB"
        for n, m in found.get("memory", {}).items()
    )
    lines.append(f"memory, weights + a prompt's peak: {memory}")
    errors = ", ".join(f"{name} {value:.1e}" for name, value in found["logits"].items())
    lines.append(f"largest logit error, of the largest logit, against fp32: {errors}")
    return "\n".join(lines)


def summary(results: dict[str, Any], targets: bool = False) -> str:
    """Write the last lines: what is wrong, or that nothing is."""
    rows = files.rows(results)
    lines = [f"{r['op']} {r['shape']}: WRONG{_where(r)}" for r in results["ops"] if r["wrong"]]
    lines += [f"{name}: FAILED, {why}" for name, why in results.get("failed", {}).items()]
    if not lines:
        lines.append(f"{len(rows)} cases, nothing was wrong")
    if targets:
        met = [m for r in rows for m in r["met"].values()]
        lines.append(f"targets met: {sum(met)} of {len(met)} (* met; (>=n) the target missed)")
        missed = [r for r in rows if not all(r["met"].values())]
        lines += [f"  {r['op']} {r['shape']}: {_misses(r)}" for r in missed]
    return "\n".join(lines)


def _misses(r: dict[str, Any]) -> str:
    got = {**r["times"], "limit": r.get("of_limit")}
    return ", ".join(
        f"{name} {got[name]:.2f}, wanted {r['targets'][name]:g}"
        for name, met in r["met"].items()
        if not met
    )
