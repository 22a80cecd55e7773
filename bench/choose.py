"""Which GPU backend serves which shapes: llama_fast/choices.json, from bench/results.

CUDA's kernels are chosen over Triton's for a class of shapes (llama_fast/choices.py) where every
report of that chip, each with tests and figures of one commit, shows all of this:
  - tests/gpu ran to its end on cuda, and nothing of the op, or of no op in particular, failed;
  - every case of the op was measured on both, and cuda's error is not wrong in any of the class;
  - in no case of the class is cuda slower beyond the noise: its fastest tenth of rounds slower than
    triton's slowest tenth;
  - over the class it is faster beyond the noise: the geometric mean of triton's fastest tenth over
    cuda's slowest tenth is above 1.
Or where Triton's is wrong and cuda's is right, whatever the speed. Else Triton serves.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from llama_fast import choices

from .files import read

RESULTS = Path(__file__).resolve().parent / "results"
# Where an op's own tests are; a failure anywhere else in tests/gpu counts against every op, unless
# its parameters name one.
TESTS = {
    "rms_norm": "test_rms_norm",
    "add_rms_norm": "test_rms_norm",
    "rms_norm_fp8": "test_rms_norm",
    "silu_and_mul": "test_activation",
    "silu_and_mul_fp8": "test_activation",
    "apply_rope": "test_rope",
    "apply_rope_and_append": "test_rope",
    "quantize_fp8": "test_quantize",
    "attention": "test_attention",
    "attention_with_kvcache": "test_decode_attention",
    "fp8_gemm": "test_fp8_gemm",
    "fp8_linear": "test_fp8_gemm",
}


class Verdict(NamedTuple):
    backend: str
    times: float | None
    why: str


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(
        prog="python -m bench --choose",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--choose", action="store_true", required=True)
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    p.add_argument("--to", type=Path, default=choices.PATH, metavar="FILE")
    p.add_argument("--check", action="store_true", help="write nothing; exit 1 where FILE differs")
    args = p.parse_args(argv)
    try:
        made = make(args.results)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print(table(made))
    if args.check:
        same = args.to.exists() and args.to.read_text() == text(made)
        print(f"{args.to}: {'up to date' if same else 'differs; python -m bench --choose'}")
        return 0 if same else 1
    args.to.write_text(text(made))
    print(f"written: {args.to}")
    return 0


def text(made: dict[str, Any]) -> str:
    return json.dumps(made, indent=1) + "\n"


def table(made: dict[str, Any]) -> str:
    lines = [
        f"{sm:<8}{op:<24}{item['class']:<38}{item['backend']:<8}"
        f"{'' if item['times'] is None else format(item['times'], '.2f') + 'x':<8}{item['why']}"
        for sm, by_op in made["choices"].items()
        for op, items in by_op.items()
        for item in items
    ]
    return "\n".join(lines or ["no report of a GPU: Triton serves everything"])


def make(results: Path) -> dict[str, Any]:
    """choices.json's content. ValueError: a report that cannot be read."""
    found = [(path, read(path) or {}) for path in sorted(results.glob("*/report.json"))]
    named = [_named(path, report) for path, report in found]
    by_chip: dict[str, Any] = {}
    for sm in sorted({n["sm"] for n in named}):
        mine = [(n["folder"], r) for n, (_, r) in zip(named, found, strict=True) if n["sm"] == sm]
        by_op = {op: items for f in choices.FAMILIES for op, items in _family(f, mine).items()}
        by_chip[sm] = {op: by_op[op] for op in choices.CLASSES if by_op.get(op)}
    return {"version": choices.VERSION, "reports": named, "choices": by_chip}


def _named(path: Path, report: dict[str, Any]) -> dict[str, Any]:
    env = report.get("parts", {}).get("ops", {}).get("environment") or report.get("environment", {})
    fields = {name: env.get(name) for name in ("gpu", "sm", "commit", "torch", "triton")}
    lacking = [name for name, value in fields.items() if not value]
    if lacking:
        raise ValueError(f"{path}: its environment lacks {', '.join(lacking)}; not a GPU's report")
    return {"folder": path.parent.name, **fields}


def _family(
    family: tuple[str, ...], reports: list[tuple[str, dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """For each op the entries of its measured classes, the same for all of a family."""
    entries = []
    for name in choices.CLASSES[family[0]]:
        verdicts = {}
        for folder, report in reports:
            rows = [r for r in _rows(report) if r["op"] in family and r.get("class") == name]
            if rows:
                verdicts[folder] = decide(family, rows, report)
        if verdicts:
            chosen = _agreed(verdicts)
            entries.append({"class": name, **chosen._asdict(), "reports": list(verdicts)})
    return {op: entries for op in family} if entries else {}


def _agreed(verdicts: dict[str, Verdict]) -> Verdict:
    """cuda where every report of the chip says so, by the least that it is faster; else the first
    report's reason against it."""
    against = [(folder, v) for folder, v in verdicts.items() if v.backend != "cuda"]
    if against:
        folder, verdict = against[0]
        return verdict._replace(why=f"{folder}: {verdict.why}") if len(verdicts) > 1 else verdict
    return min(verdicts.values(), key=lambda v: math.inf if v.times is None else v.times)


def _rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    return report.get("parts", {}).get("ops", {}).get("rows", [])


def decide(family: tuple[str, ...], rows: list[dict[str, Any]], report: dict[str, Any]) -> Verdict:
    """One report's word on one class. rows: its cases, all of them."""
    against = _against("cuda", family, rows, report)
    if against:
        return Verdict("triton", None, against)
    wrong = _wrong("triton", rows)
    if wrong:
        return Verdict("cuda", None, wrong)
    pairs = [(_seconds(row, "triton"), _seconds(row, "cuda"), row) for row in rows]
    if not all(triton and cuda for triton, cuda, _ in pairs):
        return Verdict("triton", None, "not every case was timed on both")
    times = _mean(t["median"] / c["median"] for t, c, _ in pairs)
    for triton, cuda, row in pairs:
        if cuda["p10"] > triton["p90"]:
            ratio = cuda["median"] / triton["median"]
            why = f"cuda takes {ratio:.2f} times as long at {row['op']} {row['shape']}"
            return Verdict("triton", _rounded(1 / times), why)
    if _mean(t["p10"] / c["p90"] for t, c, _ in pairs) <= 1:
        return Verdict("triton", _rounded(1 / times), "cuda is not faster beyond the noise")
    return Verdict("cuda", _rounded(times), f"right and faster in {len(rows)} cases")


def _against(
    backend: str, family: tuple[str, ...], rows: list[dict[str, Any]], report: dict[str, Any]
) -> str | None:
    """Why a backend must not serve the class, its speed aside."""
    entries = [(row, row.get("backends", {}).get(backend, {})) for row in rows]
    for row, entry in entries:
        if "seconds" not in entry:
            what = "failed" if "failed" in entry else "was not measured"
            return f"{backend} {what} at {row['op']} {row['shape']}"
    ops = report["parts"]["ops"]
    open_cases = [*ops.get("unreached", ()), *ops.get("failed", ())]
    if ops.get("case") or any(name.split()[0] in family for name in open_cases):
        return "not all of its cases were measured"
    return _wrong(backend, rows) or _tests(backend, family, report)


def _wrong(backend: str, rows: list[dict[str, Any]]) -> str | None:
    for row in rows:
        entry = row.get("backends", {}).get(backend, {})
        if entry.get("wrong") or "failed" in entry:
            what = "wrong" if entry.get("wrong") else "broken"
            return f"{backend} is {what} at {row['op']} {row['shape']}"
    return None


def _tests(backend: str, family: tuple[str, ...], report: dict[str, Any]) -> str | None:
    found = report["parts"].get(f"tests-{backend}", {})
    if not found.get("complete"):
        return f"the tests of {backend} did not run to their end"
    commit = report["parts"]["ops"]["environment"]["commit"]
    if found.get("commit") != commit:
        return f"its tests are of commit {found.get('commit')}, its figures of {commit}"
    failed = [name for name in found["failed"] if _concerns(name, family)]
    if failed:
        return f"{len(failed)} tests of {backend} failed, as {failed[0]}"
    for op in family:
        if not any(f"/{TESTS[op]}.py::" in name for name in found["passed"]):
            return f"no test of {op} passed on {backend}"
    return None


def _concerns(test: str, family: tuple[str, ...]) -> bool:
    path, _, name = test.partition("::")
    stem = Path(path).stem
    if stem in TESTS.values():
        return any(TESTS[op] == stem for op in family)
    named = set(name.partition("[")[2].rstrip("]").split("-")) & set(TESTS)
    return not named or bool(named & set(family))


def _seconds(row: dict[str, Any], backend: str) -> dict[str, float] | None:
    return row.get("backends", {}).get(backend, {}).get("seconds")


def _mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def _rounded(times: float) -> float:
    return round(times, 3)
