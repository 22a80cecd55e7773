"""What a run prints and stores: one aligned line a case, one JSON file with everything."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import llama_fast as lf

from . import machine
from .case import Case
from .files import write
from .timing import Timing, figures

__all__ = ["environment", "insert", "line", "row", "summary", "write"]

# Beyond twice eager's error: an ulp of bf16, for where eager happens to be exact.
WRONG = 2.0**-7

HEADER = (
    f"{'op':<23}{'shape':<34}{'median (p10-p90) ms':<25}{'rate':>15}{'of limit':>9} {'':<7}"
    f"{'x eager':>13}  {'error':<7}  against"
)
LEGEND = (
    "of limit: of what this machine moved or computed in the same rounds (copy; read; the faster "
    "of\nmultiply-adds in registers, fma, and PyTorch's product, matmul)   *: target met   (>=n): "
    "missed\nerror: largest, against fp64, of the largest value   1/n of it: measured on an nth of "
    "the heads, rows\nof the weight or tokens, and times n: this machine takes too long for all"
)


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Hardware, versions, threads, commit. No host name: the file is meant to be shared.

    device: the one measured on; a GPU's driver, clocks and compilers come along.
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
        "commit": _commit() or os.environ.get("LLAMA_FAST_COMMIT"),
        **(gpu_details() if on_gpu else {}),
    }


# What nvidia-smi is asked, and under which name the answer is kept. Nothing is ever set.
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
    """What figures on a GPU depend on besides its name."""
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
    """nvidia-smi's clocks, power and temperature now; empty where it cannot be asked."""
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


def _commit() -> str | None:
    """The checkout's commit, with a + when files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def heading(results: dict[str, Any]) -> str:
    """Hardware, versions, threads, commit and what was asked for: once, at the top."""
    known = {**results["environment"], **results["options"]}
    lines = ["  ".join(f"{k} {v}" for k, v in known.items() if v is not None)]
    if results.get("speed"):
        lines.append(str(machine.Speed(**results["speed"])))
    if results["peers"]:
        lines.append("peers: " + ", ".join(f"{n} {v}" for n, v in results["peers"].items()))
    lines += [f"without {name}: {why}" for name, why in results["skipped"].items()]
    return "\n".join(lines)


def row(case: Case, timings: dict[str, Timing], errors: dict[str, float]) -> dict[str, Any]:
    """A case's figures. "times": how many times faster ours is than each other implementation;
    "errors": of every implementation, against fp64."""
    ours, limit = timings["ours"], timings["limit"]
    others = [name for name in timings if name not in ("ours", "limit")]
    times = {name: timings[name].median / ours.median for name in others}
    of_limit = (case.work / ours.median) / (case.limit_work / limit.median)
    reached = {
        name: (of_limit if name == "limit" else times[name])
        for name in case.targets
        if name == "limit" or name in times
    }
    twin = next((name for name in ("eager", *errors) if name in errors and name != "ours"), None)
    eager_error = errors[twin] if twin else 0.0
    scale = 1e9 if case.unit == "GB/s" else 1e12
    return {
        "op": case.op,
        "shape": case.shape,
        "axes": case.axes,
        "unit": case.unit,
        "work": case.work,
        "bytes": case.bytes,
        "flops": case.flops,
        "rate": case.work / ours.median / scale,
        "limit": case.limit_name,
        "limit_rate": case.limit_work / limit.median / scale,
        "of_limit": of_limit,
        "times": times,
        "targets": {name: case.targets[name] for name in reached},
        "met": {name: value >= case.targets[name] for name, value in reached.items()},
        "error": errors["ours"],
        "eager_error": eager_error,
        "errors": errors,
        "wrong": not errors["ours"] <= 2 * eager_error + WRONG,  # NaN is wrong too
        "seconds": figures(timings, "ours"),
    }


def line(r: dict[str, Any]) -> str:
    ours = r["seconds"]["ours"]
    spread = f"{ours['median'] * 1e3:.3f} ({ours['p10'] * 1e3:.3f}-{ours['p90'] * 1e3:.3f})"
    eager = f"{r['times']['eager']:.2f}x{_target(r, 'eager')}" if "eager" in r["times"] else "-"
    against = "  ".join(
        f"{name} {value:.2f}x{_target(r, name)}"
        for name, value in r["times"].items()
        if name != "eager"
    )
    return (
        f"{r['op']:<23}{r['shape']:<34}{spread:<25}{r['rate']:>8.3g} {r['unit']:<7}"
        f"{r['of_limit']:>8.0%} {_target(r, 'limit'):<7}{eager:>13}  {r['error']:.1e}  {against}"
        + ("  WRONG: more than twice eager's error" if r["wrong"] else "")
    )


def _target(r: dict[str, Any], name: str) -> str:
    if name not in r["targets"]:
        return ""
    wanted = r["targets"][name]
    return f" (>={wanted:g})" if not r["met"][name] else "*"


def summary(results: dict[str, Any]) -> str:
    rows = results["ops"] + results.get("end_to_end", {}).get("rows", [])
    met = [m for r in rows for m in r["met"].values()]
    lines = [f"targets met: {sum(met)} of {len(met)} (* met; (>=n) the target that was missed)"]
    lines += [f"  {r['op']} {r['shape']}: {_misses(r)}" for r in rows if not all(r["met"].values())]
    lines += [f"  {r['op']} {r['shape']}: WRONG" for r in results["ops"] if r["wrong"]]
    return "\n".join(lines)


def _misses(r: dict[str, Any]) -> str:
    got = {**r["times"], "limit": r.get("of_limit")}
    return ", ".join(
        f"{name} {got[name]:.2f}, wanted {r['targets'][name]:g}"
        for name, met in r["met"].items()
        if not met
    )


def insert(readme: Path, table: str, name: str = "bench") -> None:
    """Puts the table between the file's markers of that name."""
    try:
        readme.write_text(inserted(readme.read_text(), table, name))
    except ValueError as error:
        raise ValueError(f"{readme}: {error}") from None


def inserted(text: str, table: str, name: str = "bench") -> str:
    """text with the table between its markers. Raises ValueError where it has none."""
    head, begin, rest = text.partition(f"<!-- {name}:begin -->\n")
    _, end, tail = rest.partition(f"<!-- {name}:end -->")
    if not begin or not end:
        raise ValueError(f"no <!-- {name}:begin --> and <!-- {name}:end -->")
    return head + begin + table + "\n" + end + tail
