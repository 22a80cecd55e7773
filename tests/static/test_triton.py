"""Tests of every Triton kernel, compiled for other chips by the installed and the oldest Triton,
and of the checker, on kernels that are wrong on purpose.

`make test-static` has more chips, and a newer version. Versions other than the installed one are
downloaded from PyPI once, into build/triton-<version>.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from llama_fast.bench.static import calls
from llama_fast.bench.static import triton as gate
from llama_fast.bench.static.binary import SASS, search
from llama_fast.bench.static.compiled import AMDGCN, PTX, Facts
from llama_fast.bench.static.occupancy import occupancy
from llama_fast.bench.static.triton import MAY_SERIALIZE, WORDS
from llama_fast.kernels import common

from . import EVERY_CHIP
from .demo_cases import CASES as DEMO

ROOT = Path(__file__).resolve().parents[2]
OLDEST = "3.6.0"  # pyproject.toml's bound
OTHERS = [OLDEST, "3.9.0"] if EVERY_CHIP else [OLDEST]
INSTALLED = triton.__version__

pytestmark = pytest.mark.timeout(1500)  # all kernels from cold, on two busy cores


def run(version: str, json_file: Path, *arguments: str) -> dict[str, Any]:
    """Run bench.static triton in another process: in this one Triton's kernels are interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(ROOT / "build" / "static-cache")
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # changes no instruction and takes time
    if version != INSTALLED:
        environment["PYTHONPATH"] = str(other_triton(version))
    command = [sys.executable, "-m", "llama_fast.bench.static", "triton", "--jobs", "2"]
    done = subprocess.run(
        [*command, "--json", str(json_file), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1) and json_file.exists(), done.stdout + done.stderr
    content = json.loads(json_file.read_text())
    assert content["triton"] == version
    return content


def other_triton(version: str) -> Path:
    """Return a folder for PYTHONPATH with that version, complete or absent."""
    folder = ROOT / "build" / f"triton-{version}"
    if folder.exists():
        return folder
    partial = folder.with_suffix(f".{os.getpid()}.partial")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(partial)]
    done = subprocess.run([*pip, f"triton=={version}"], capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(partial, ignore_errors=True)
        pytest.skip(f"pip cannot get triton {version}: {done.stderr.strip()[-200:]}")
    partial.rename(folder)
    return folder


# Every configuration is compiled on sm_90 only, which has the most instructions to lose. Elsewhere,
# and by other versions, the defaults without tuning are compiled and, of cases that share a kernel
# and its tile, the one that does all that the others do (Case.largest). Those that promise equal
# bits are compared on sm_90. Everything takes five times as long: python -m bench.static triton,
# before a release.
MATRIX = {
    **{version: ["--largest", "sm_90"] for version in OTHERS},
    INSTALLED: ["--every", "sm_90", "--largest", "sm_80"]
    + (["sm_89", "sm_100", "gfx942"] if EVERY_CHIP else []),
}


@pytest.fixture(scope="session", params=MATRIX)
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the rows for one version of Triton."""
    file = tmp_path_factory.mktemp("static") / "static.json"
    return run(request.param, file, *MATRIX[request.param])["rows"]


def wrong(rows: list[dict[str, Any]], pattern: str) -> list[str]:
    return [
        f"{r['kernel']} on {r['arch']}, {r['config']} ({', '.join(r['cases'])}): {problem}"
        for r in rows
        for problem in r["problems"]
        if re.search(pattern, problem)
    ]


def test_every_launch_compiles(table: list[dict[str, Any]]) -> None:
    assert not [line for r in table if r["facts"] is None for line in wrong([r], "")]


def test_every_file_of_kernels_is_compiled(table: list[dict[str, Any]]) -> None:
    assert {r["op"] for r in table} == {case.op for case in calls.CASES}
    files = {path.stem for path in (ROOT / "kernels").glob("*.py")}
    assert {case.op for case in calls.CASES} <= files


def test_every_case_and_every_kernel_that_it_names_is_there(table: list[dict[str, Any]]) -> None:
    largest = {(case.op, case.name) for case in calls.CASES if case.largest}
    for arch in {r["arch"] for r in table}:
        assert largest <= {(r["op"], c) for r in table if r["arch"] == arch for c in r["cases"]}
    named = {kernel for case in calls.CASES for kernel in case.needs}
    assert named <= {r["kernel"] for r in table}


def test_nothing_spills_or_uses_local_memory(table: list[dict[str, Any]]) -> None:
    assert not wrong(table, "local memory")


def test_f36_every_configuration_fits_its_chip(table: list[dict[str, Any]]) -> None:
    assert not wrong(table, "shared memory")


def test_f39_no_tf32(table: list[dict[str, Any]]) -> None:
    assert not wrong(table, "tf32")


def test_the_instructions_are_there(table: list[dict[str, Any]]) -> None:
    assert not wrong(table, "^no |serialized")


def test_as_many_blocks_fit_as_planned(table: list[dict[str, Any]]) -> None:
    assert not wrong(table, "blocks a multiprocessor")


def test_no_other_problem(table: list[dict[str, Any]]) -> None:
    known = "local memory|shared memory|tf32|^no |serialized|blocks a multiprocessor"
    assert not [r["problems"] for r in table if any(not re.search(known, p) for p in r["problems"])]


def test_the_oldest_version_is_the_one_promised() -> None:
    assert f"triton>={OLDEST.removesuffix('.0')} " in (ROOT / "pyproject.toml").read_text()


# ---- the checker ----


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[str]]:
    """Return the demonstration kernels' problems, by case and chip."""
    file = tmp_path_factory.mktemp("demo") / "static.json"
    arguments = ("--cases", "tests.static.demo_cases", "--every", "sm_80", "sm_90", "gfx942")
    rows = run(INSTALLED, file, *arguments)["rows"]
    return {(r["op"], r["arch"]): r["problems"] for r in rows}


def test_a_good_kernel_has_no_problems(demo: dict[tuple[str, str], list[str]]) -> None:
    assert {arch: demo["good", arch] for arch in ("sm_80", "sm_90", "gfx942")} == {
        "sm_80": [],
        "sm_90": [],
        "gfx942": [],
    }


@pytest.mark.parametrize(
    ("op", "arch", "problem"),
    [
        ("spills", "sm_90", r"^\d+ bytes of local memory a thread: spills"),
        ("spills", "sm_90", r"^wgmma is serialized$"),
        ("spills", "gfx942", r"^\d+ bytes of local memory a thread: spills"),
        ("exceeds", "sm_80", r"bytes of shared memory, the chip has 166912$"),
        ("exceeds", "sm_90", r"bytes of shared memory, the chip has 232448$"),
        ("exceeds", "gfx942", r"bytes of shared memory, the chip has 65536$"),
        ("loses_wgmma", "sm_90", r"^no wgmma \(matrix\)$"),
        ("tf32", "sm_80", r"^tf32$"),
        ("tf32", "sm_90", r"^tf32$"),
        ("tf32", "gfx942", r"^tf32$"),
        ("narrow", "sm_90", r"^no 16-byte loads or TMA or cp.async"),
        ("narrow", "gfx942", r"^no 16-byte loads or TMA or cp.async"),
        ("occupancy", "sm_90", r"^1 blocks a multiprocessor, limited by registers$"),
        ("refuses", "sm_90", r"^ValueError: x: got something else$"),
    ],
)
def test_a_faulty_kernel_is_found(
    op: str, arch: str, problem: str, demo: dict[tuple[str, str], list[str]]
) -> None:
    assert [p for p in demo[op, arch] if re.search(problem, p)], demo[op, arch]


FINE = Facts(64, 0, 1024, 128, instructions=("wgmma", "16-byte loads"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"stack": 8}, "8 bytes of local memory a thread: spills, or an array"),
        ({"shared": 232449}, "232449 bytes of shared memory, the chip has 232448"),
        ({"serialized": True}, "wgmma is serialized"),
        ({"instructions": ("wgmma", "16-byte loads", "tf32")}, "tf32"),
        ({"instructions": ("mma", "16-byte loads")}, "no wgmma (matrix)"),
        ({"registers": 200}, "2 blocks a multiprocessor, limited by registers"),
    ],
    ids=str,
)
def test_problems(change: dict[str, Any], problem: str | None) -> None:
    facts = Facts(**{**vars(FINE), **change})
    found = gate.problems("sm_90", facts, {"matrix", "16-byte loads"}, 3)
    assert found[:1] == ([problem] if problem else [])


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "wanted"),
    [
        ("sm_90", 32, 0, 1024, (2, 64, "registers")),
        ("sm_90", 32, 0, 128, (16, 64, "registers")),
        ("sm_90", 33, 0, 128, (12, 48, "registers")),  # rounded up to 40: 51 warps, in fours
        ("sm_90", 168, 0, 128, (3, 12, "registers")),
        ("sm_90", 255, 0, 256, (1, 8, "registers")),
        ("sm_90", 128, 113 * 1024, 128, (2, 8, "shared memory")),
        ("sm_90", 128, 114 * 1024, 128, (1, 4, "shared memory")),  # with 1 KiB for the system
        ("sm_90", 16, 0, 32, (32, 32, "blocks")),
        ("sm_80", 64, 41 * 1024, 128, (3, 12, "shared memory")),
        ("sm_89", 16, 0, 256, (6, 48, "warps")),
        ("gfx942", 128, 0, 256, (4, 16, "registers")),
        ("gfx942", 40, 32768, 256, (2, 8, "shared memory")),
    ],
    ids=str,
)
def test_occupancy(
    arch: str, registers: int, shared: int, threads: int, wanted: tuple[int, int, str]
) -> None:
    found = occupancy(arch, registers, shared, threads)
    assert (found.blocks, found.warps, found.limit) == wanted


def test_occupancy_of_tensor_memory() -> None:
    assert occupancy("sm_100", 64, 0, 128, 256).blocks == 2


@pytest.mark.parametrize(
    ("patterns", "text", "wanted"),
    [
        (PTX, "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {", ["wgmma"]),
        (PTX, "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {", ["wgmma e4m3"]),
        (PTX, "wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32 {", ["tf32"]),
        (PTX, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", ["mma"]),
        (PTX, "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", ["mma e4m3"]),
        (PTX, "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", ["cp.async"]),
        (PTX, "cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;", []),
        (PTX, "ld.global.v4.b32 { %r1, %r2, %r3, %r4 }", ["16-byte loads"]),
        (PTX, "ld.global.L1::evict_first.v4.b32 { %r1 }", ["16-byte loads"]),
        (PTX, "ld.global.v2.b32 { %r1, %r2 }", []),
        (PTX, "st.global.v4.b32 [ %rd1 + 0 ]", ["16-byte stores"]),
        (PTX, "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx", ["TMA"]),
        (PTX, "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group", ["TMA stores"]),
        (PTX, "tcgen05.mma.cta_group::1.kind::f8f6f4 [ %r1 ]", ["tcgen05 e4m3"]),
        (SASS, "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;", ["wgmma"]),
        (SASS, "QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR12], R24", ["wgmma e4m3"]),
        (SASS, "HMMA.1688.F32.TF32 R4, R8, R12, R4 ;", ["mma", "tf32"]),
        (SASS, "LDGSTS.E.BYPASS.128 [R5], desc[UR8][R2.64] ;", ["cp.async", "16-byte loads"]),
        (SASS, "LDGSTS.E [R5], desc[UR8][R2.64] ;", []),
        (SASS, "STL.64 [R1+0x8], R4 ;", ["local memory"]),
        (AMDGCN, "v_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[4:5]", ["mfma"]),
        (AMDGCN, "buffer_load_dwordx4 v[2:5], v1, s[4:7]", ["16-byte loads"]),
        (AMDGCN, "v_mfma_f32_16x16x8_xf32 a[0:3], v[0:1]", ["tf32"]),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_patterns(patterns: dict[str, str], text: str, wanted: list[str]) -> None:
    assert list(search(patterns, text)) == wanted


def test_every_need_is_a_word_and_every_word_a_pattern() -> None:
    for case in (*calls.CASES, *DEMO):
        for words in case.needs.values():
            assert set(words) - {MAY_SERIALIZE} <= WORDS.keys(), case
    for word, accepted in WORDS.items():
        assert accepted.keys() <= common.CHIPS.keys(), word
        names = {name for text in accepted.values() for name in text.split("|")}
        assert names <= PTX.keys() | AMDGCN.keys(), word


def test_each_chip_has_a_multiprocessor() -> None:
    for arch, chip in common.CHIPS.items():
        assert occupancy(arch, 32, chip.shared_memory, 128).blocks == 1


def test_unknown_kernel_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "INTERPRETED", False)
        assert gate.main(["--kernel", "fly"]) == 2
    assert "no kernel named fly" in capsys.readouterr().err
