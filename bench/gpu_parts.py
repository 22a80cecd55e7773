"""The parts of a GPU report that use the GPU, each in a process of its own:

python -m bench.gpu_parts PART --out DIR --until T [--resume]   (gpu_report.py starts it)
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from llama_fast import backends, dispatch
from llama_fast.dispatch import choose

from . import (
    gpu_attention,
    gpu_elementwise,
    gpu_gemm,
    gpu_model,
    gpu_rivals,
    limits,
    model_rows,
    report,
    targets,
)
from . import tasks as running
from .baselines import Compiler
from .files import WRONG, read
from .gpu_case import FULL, TINY, GpuCase, Place, Spec
from .tasks import Rows
from .timing import Timing

BUDGETS = {"limits": 1.0, "ops": 0.4, "model": 1.5}  # seconds a case
COMPILING = 45.0  # seconds of all cases together, for torch.compile
RIVALS = ("triton", "cuda")  # measured in turn wherever both can serve


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.gpu_parts", description=__doc__)
    p.add_argument("part", choices=PARTS)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--until", type=float, required=True, metavar="T", help="seconds since 1970")
    p.add_argument("--resume", action="store_true", help="go on after a process that broke")
    p.add_argument("--device", default="cuda")
    p.add_argument("--tiny", action="store_true")
    p.add_argument("--case", default="", help="only tasks whose name contains this")
    return p


def main(argv: list[str] | None = None) -> int:
    """0; WRONG: something was; 130: interrupted; BROKEN: start again."""
    args = parser().parse_args(argv)
    torch.manual_seed(0)
    gc.freeze()  # a capture collects garbage first: what was imported is none
    device = torch.device(args.device)
    sizes = TINY if args.tiny else FULL
    rivals = RIVALS if device.type == "cuda" else ()
    place = Place(device, sizes, Compiler(0.0 if args.tiny else COMPILING), rivals)
    environment = {**report.environment(device), "backends": _backends(device)}
    store = running.Store(args.out / f"{args.part}.json", environment, args.resume)
    store.save(case=args.case)
    with torch.inference_mode():
        try:
            tasks = PARTS[args.part](place, args, store)
            chosen = {name: task for name, task in tasks.items() if args.case in name}
            running.run(store, chosen, args.until, lambda row: print(line(row), flush=True))
        except KeyboardInterrupt:
            return 130
    if device.type == "cuda":
        store.save(state_at_end=report.gpu_state())
    rows = store.content["rows"]
    wrong = store.content["failed"] or any(row.get("wrong") or _rival_is_bad(row) for row in rows)
    return WRONG if wrong else 0


def _rival_is_bad(row: Mapping[str, Any]) -> bool:
    entries = row.get("backends", {}).values()
    return any(entry.get("wrong") or "failed" in entry for entry in entries)


def _backends(device: torch.device) -> dict[str, str]:
    return {op: by_device[device.type].backend for op, by_device in backends().items()}


def line(row: dict[str, Any]) -> str:
    if row["op"] == "limit":
        scale = 1e9 if row["unit"] == "GB/s" else 1e12
        return f"limit {row['shape']:<6}{row['rate'] / scale:>9.0f} {row['unit']} ({row['best']})"
    if row["op"] == "logits":
        errors = ", ".join(f"{name} {value:.1e}" for name, value in row["errors"].items())
        return f"logits, {row['shape']}: {errors}{'  WRONG' if row['wrong'] else ''}"
    if row["op"] == "profile":
        return "\n".join(f"{k['us']:>9.1f} us  {k['name']}" for k in row["kernels"][:15])
    if row["op"].startswith("generate"):
        return f"{row['op']:<34}{row['shape']:<6}{row['tokens_per_s']:>9.1f} tokens/s"
    if "tokens_per_s" in row:
        return model_rows.line(row)
    whole = row if row["of_limit"] is not None else {**row, "of_limit": math.nan}
    return report.line(whole) + targets.compared(row["backends"])


def specs(place: Place) -> list[Spec]:
    """Every case, those of the targets first: what time does not suffice for is at the end."""
    groups: tuple[Callable[[Place], Any], ...] = (
        gpu_elementwise.norms,
        gpu_elementwise.ropes,
        gpu_attention.prefills,
        gpu_attention.decodes,
        gpu_gemm.gemms,
        gpu_elementwise.activations,
    )
    found = [spec for group in groups for spec in group(place)]
    return sorted(found, key=lambda spec: not spec.tag)


def limit_tasks(place: Place, args: argparse.Namespace, store: running.Store) -> Any:
    return limits.tasks(place, BUDGETS["limits"])


def _limits(place: Place, args: argparse.Namespace, store: running.Store) -> dict[str, float]:
    """From the report's run on this GPU, or measured now."""
    gpu = store.content["environment"]["gpu"]
    merged = read(args.out / "report.json") or {}
    stored = merged.get("parts", {}).get("limits")
    if stored and stored["environment"]["gpu"] == gpu and stored["complete"]:
        return limits.of(stored["rows"])
    rows: Rows = []
    for name, task in limits.tasks(place, BUDGETS["limits"] / 2).items():
        try:
            rows += task()
        except Exception as error:  # a case that needs it will say so
            print(f"limit {name}: {error}", flush=True)
    return limits.of(rows)


def op_tasks(
    place: Place, args: argparse.Namespace, store: running.Store
) -> dict[str, Callable[[], Rows]]:
    rates = _limits(place, args, store)
    return {
        spec.name: functools.partial(_measured, place, spec, rates, store) for spec in specs(place)
    }


def _measured(place: Place, spec: Spec, rates: dict[str, float], store: running.Store) -> Rows:
    case = spec.build()
    served = choose(case.op, place.device, *case.arguments)
    # First: a wrong kernel's time is of no interest, but still told.
    entries = {served: dict(zip(("error", "eager_error"), case.error(), strict=True))}
    for rival in place.rivals:
        if rival != served:
            entries[rival] = gpu_rivals.try_out(rival, case, place.device, store)
    others = {n: gpu_rivals.on(n, case) for n in entries if n != served and "error" in entries[n]}
    timings = _times(place, case, {**case.runs, **others}, BUDGETS["ops"])
    for name in entries:
        if timing := timings["ours"] if name == served else timings.pop(name, None):
            entries[name]["timing"] = timing
    return [op_row(spec, case, timings, entries, rates, store.content["environment"])]


def _times(place: Place, case: GpuCase, runs: Any, budget: float) -> dict[str, Timing]:
    return limits.measure(place, runs, budget, copies=case.copies, uncapturable=case.uncapturable)


def op_row(
    spec: Spec,
    case: GpuCase,
    timings: dict[str, Timing],
    entries: dict[str, dict[str, Any]],
    rates: dict[str, float],
    environment: dict[str, Any],
) -> dict[str, Any]:
    """report.row's counterpart, with what a roofline, a target and a choice need. entries: of each
    backend, the one that serves first, its error and timing, or what became of it."""
    served = next(iter(entries))
    ours, eager_error = timings["ours"].median, entries[served].pop("eager_error")
    limit = rates.get(case.limit)
    found = {n: _figures(case, e, eager_error, limit) for n, e in entries.items()}
    mine = found[served]
    return {
        "op": case.op,
        "shape": case.shape,
        "class": dispatch.shape_class(case.op, *case.arguments) if case.arguments else None,
        "tag": spec.tag,
        "backend": served,
        "unit": case.unit,
        "work": case.work,
        "bytes": case.bytes,
        "flops": case.flops,
        "rate": mine["rate"],
        "limit": case.limit,
        "limit_rate": limit / _scale(case) if limit else None,
        "of_limit": mine["of_limit"],
        "times": {n: t.median / ours for n, t in timings.items() if n != "ours"},
        "targets": {},
        "met": {},
        "error": mine["error"],
        "eager_error": eager_error,
        "wrong": mine["wrong"],
        "seconds": {name: t.to_json() for name, t in timings.items()},
        "backends": found,
        "skipped": case.skipped,
    }


def _scale(case: GpuCase) -> float:
    return 1e9 if case.unit == "GB/s" else 1e12


def _figures(
    case: GpuCase, entry: dict[str, Any], eager_error: float, limit: float | None
) -> dict[str, Any]:
    """Of one backend; what could not be measured stays as it is."""
    timing = entry.get("timing")
    if timing is None:
        return entry
    rate = case.work / timing.median
    return {
        "rate": rate / _scale(case),
        "of_limit": rate / limit if limit else None,
        "error": entry["error"],
        "wrong": not entry["error"] <= 2 * eager_error + report.WRONG,  # NaN is wrong too
        "seconds": timing.to_json(),
    }


def model_tasks(
    place: Place, args: argparse.Namespace, store: running.Store
) -> dict[str, Callable[[], Rows]]:
    work = gpu_model.work(place.device, args.tiny)
    budget = 0.0 if args.tiny else BUDGETS["model"]
    store.content["layers"] = work.config.num_hidden_layers
    return gpu_model.Bench(place, work, _limits(place, args, store), budget).tasks()


PARTS: dict[str, Callable[..., dict[str, Callable[[], Rows]]]] = {
    "limits": limit_tasks,
    "ops": op_tasks,
    "model": model_tasks,
}

if __name__ == "__main__":
    sys.exit(main())
