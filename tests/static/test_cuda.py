"""Tests of the compiled CUDA kernels against their plans, and of the checker, on kernels that are
wrong on purpose. They read what an install compiled; they need no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from llama_fast.bench.static import LINEAR, binary, cuda, plans
from llama_fast.bench.static.binary import Kernel
from llama_fast.bench.static.plans import PLANS, Plan

from ..cuda_emulator.build import cuda_include, cxx
from . import EVERY_CHIP

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
LONGEST_BUILD = 6 * 60  # seconds, on two cores

pytestmark = pytest.mark.timeout(600)


def nvcc(*arguments: str | Path) -> None:
    program = shutil.which("nvcc")
    if not program:
        pytest.skip("nvcc is not on PATH")
    flags = ["-std=c++17", "--expt-relaxed-constexpr", "-diag-suppress", "177"]
    command = [program, *flags, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def kernels() -> list[Kernel]:
    extension = cuda.extension()
    if extension is None and not shutil.which("nvcc"):
        pytest.skip("no llama_fast/_cuda, and nvcc is not on PATH")
    assert extension, "nvcc is on PATH and llama_fast/_cuda is not built: install again"
    return binary.read(extension)


def test_every_kernel_is_as_planned(kernels: list[Kernel]) -> None:
    """Find all instances on all architectures. None may spill, fit too few blocks, lack an
    instruction or serialize wgmma."""
    assert not cuda.check(kernels)[1]
    assert {"sm_90", "sm_90a"} <= {kernel.arch for kernel in kernels}


def test_every_plan_has_a_file() -> None:
    assert {plan.file for plan in PLANS} <= {source.stem for source in SOURCES}


def test_a_file_without_a_plan_may_not_spill(kernels: list[Kernel]) -> None:
    """Check a family that PLANS does not name: its kernels get the default plan."""
    plans = [plan for plan in PLANS if plan.file != "rope"]
    rows, wrong = cuda.check(kernels, plans)
    assert not wrong and any(row.kernel.file == "rope" for row in rows)
    spilling = [replace(k, stack=8) if k.file == "rope" else k for k in kernels]
    _, wrong = cuda.check(spilling, plans)
    assert wrong and all("8 bytes of local memory" in line for line in wrong)


def test_every_file_has_a_section_in_the_docs() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text().split("# CUDA\n")[1]
    assert not [source.name for source in SOURCES if f"## {source.name}: " not in text]


@pytest.mark.parametrize("file", sorted({plan.file for plan in PLANS if plan.cpp}))
def test_planned_shared_memory_is_the_launchers(file: str, tmp_path: Path) -> None:
    """Let g++ evaluate the launcher's own expression for every instance."""
    lines = [f'#include "{ROOT}/csrc/cuda/{file}.cu"', "namespace lf::cuda {"]
    for plan in (plan for plan in PLANS if plan.file == file and plan.cpp):
        for arguments in plan.instances:
            names = (a.replace("unsigned char", "uint8_t") for a in arguments)
            shared = plan.of("shared", arguments)
            lines.append(f"static_assert({plan.cpp.format(*names)} == {shared});")
    source = tmp_path / "sizes.cpp"
    source.write_text("\n".join([*lines, "}"]))
    folders = [f"-I{ROOT}/tests/cuda_emulator", "-isystem", str(cuda_include())]
    flags = ["-std=c++17", "-fsyntax-only", "-w", "-DLF_CUDA_EMULATOR", *folders]
    done = subprocess.run([*cxx(), *flags, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not EVERY_CHIP, reason="make test-static compiles for it")
def test_portable_kernels_compile_for_blackwell(tmp_path: Path) -> None:
    """Compile for sm_100a, which runs these kernels from PTX until it has its own. The test asks
    only whether the compiler accepts them, so it saves three quarters of the time by not
    optimizing."""
    program = shutil.which("nvcc")
    known = program and subprocess.run([program, "--list-gpu-arch"], capture_output=True, text=True)
    if known and "compute_100" not in known.stdout:
        pytest.skip("this nvcc does not know sm_100a (CUDA 12.8 does)")
    portable = [source for source in SOURCES if not source.stem.endswith("_sm90")]
    portable.sort(key=lambda source: -source.stat().st_size)  # the longest first

    def compile_one(source: Path) -> None:
        target = "-gencode=arch=compute_100a,code=sm_100a"
        cheap = ("-Xcicc", "-O1", "-Xptxas", "-O0")
        nvcc(target, *cheap, "-fatbin", "-o", tmp_path / f"{source.stem}.fatbin", source)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, portable))


def test_a_whole_build_takes_less_than_six_minutes() -> None:
    kept = ROOT / "build" / "native.txt"
    if not kept.exists():
        pytest.skip("no build/native.txt: nothing was installed from this checkout")
    line = kept.read_text()
    match = re.match(r"native build: (\d+) s, (\d+) of (\d+) files compiled, .* (\d+) cores,", line)
    assert match, line
    seconds, compiled, files, cores = map(int, match.groups())
    if compiled < files or cores < 2:
        pytest.skip(f"not a whole build on two cores: {line.strip()}")
    assert seconds < LONGEST_BUILD, line


# ---- the checker ----


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, tuple[str, ...]], Kernel]:
    fatbin = tmp_path_factory.mktemp("planted") / "planted.fatbin"
    source = Path(__file__).with_name("planted.cu")
    nvcc("-gencode=arch=compute_90a,code=sm_90a", "-fatbin", "-o", fatbin, source)
    return {(k.name, k.arguments): k for k in binary.read(fatbin)}


def plan(kernel: Kernel, threads: int, blocks: int = 1, needs: Iterable[str] = ()) -> Plan:
    wanted = list(needs)
    return Plan(
        kernel.file,
        kernel.name,
        [kernel.arguments],
        threads,
        blocks,
        lambda arguments, arch: wanted,
        archs=("sm_90a",),
    )


VECTORS = ("16-byte loads", "16-byte stores")


def test_copies_that_do_not_overlap_are_found(
    planted: dict[tuple[str, tuple[str, ...]], Kernel],
) -> None:
    """Plan eight blocks of 256 threads, with 32 KB of one copy each, or 128 KB of four."""
    for together, ahead in (("true", 131072), ("false", 32768)):
        kernel = planted["stream_kernel", (together,)]
        one = replace(plan(kernel, 256, needs=["cp.async"]), shared=4 * 4096)
        for planned in (ahead, ahead + 1):
            wrong = cuda.check([kernel], [replace(one, ahead=planned)])[1]
            text = f"{ahead} bytes of copies on a multiprocessor before it waits, planned {planned}"
            assert len(wrong) == planned - ahead and all(text in w for w in wrong)


@pytest.mark.parametrize(
    ("name", "arguments", "threads", "blocks", "needs", "problem"),
    [
        ("spills_kernel", (), 1024, 1, (), r"\d+ bytes of local memory a thread"),
        ("indexed_kernel", (), 256, 1, (), r"128 bytes of local memory a thread"),
        ("wide_kernel", (), 256, 4, (), r"registers: 2 blocks .* limited by registers, planned 4"),
        ("wide_kernel", (), 256, 2, (), None),
        ("static_shared_kernel", (), 64, 1, (), r"256 bytes of static shared memory"),
        ("copy_kernel", ("false",), 256, 1, VECTORS, r"no 16-byte loads, 16-byte stores"),
        ("copy_kernel", ("true",), 256, 1, VECTORS, None),
        ("wgmma_kernel", ("true",), 128, 1, ("wgmma",), r"wgmma is serialized: 20 groups of 20"),
        ("wgmma_kernel", ("false",), 128, 1, ("wgmma",), None),
        ("wgmma_kernel", ("false",), 128, 1, ("wgmma e4m3",), r"no wgmma e4m3"),
        ("masked_kernel", ("long",), 128, 1, ("wgmma",), r"compares of 64 bits in a loop of wgmma"),
        ("masked_kernel", ("int",), 128, 1, ("wgmma",), None),
        ("dependent_kernel", ("true",), 128, 1, (), r"1 loads before griddepcontrol.wait"),
        ("dependent_kernel", ("false",), 128, 1, ("griddepcontrol.wait",), None),
        ("pool_kernel", ("32",), 384, 1, ("setmaxnreg",), r"asks for 32 and 2 x 240 .* of 3 x 168"),
        ("pool_kernel", ("24",), 384, 1, ("setmaxnreg",), None),
    ],
)
def test_planted_faults_are_found(
    planted: dict[tuple[str, tuple[str, ...]], Kernel],
    name: str,
    arguments: tuple[str, ...],
    threads: int,
    blocks: int,
    needs: tuple[str, ...],
    problem: str | None,
) -> None:
    kernel = planted[name, arguments]
    rows, wrong = cuda.check([kernel], [plan(kernel, threads, blocks, needs)])
    assert rows[0].kernel == kernel
    if problem is None:
        assert not wrong
    else:
        (found,) = wrong
        assert re.search(problem, found), found


@pytest.mark.parametrize("divides", ["true", "false"])
def test_divisions_in_a_stream_are_found(
    planted: dict[tuple[str, tuple[str, ...]], Kernel], divides: str
) -> None:
    kernel = planted["scale_kernel", (divides,)]
    stream = replace(plan(kernel, 256, needs=["16-byte loads"]), streams=True)
    wrong = cuda.check([kernel], [stream])[1]
    assert re.search(r"\d+ divisions, at most 0", wrong[0]) if divides == "true" else not wrong
    scalar = replace(kernel, counts={"4-byte loads": 16, "reciprocals": 8})
    wrong = cuda.check([scalar], [stream])[1]
    assert "8 reciprocals, at most 2" in wrong[0] and "16 4-byte loads, at most 3" in wrong[1]


def test_shared_memory_beyond_the_chip_is_found(
    planted: dict[tuple[str, tuple[str, ...]], Kernel],
) -> None:
    kernel = planted["copy_kernel", ("true",)]
    large = replace(plan(kernel, 256), shared=232449)
    assert (
        "232449 bytes of shared memory, the chip has 232448" in cuda.check([kernel], [large])[1][0]
    )


def drop_instance(kernels: list[Kernel]) -> list[Kernel]:
    gone = (
        LINEAR,
        "few_rows_kernel",
        "sm_89",
        ("unsigned char", "float", "4", "true", "false"),
    )
    return [k for k in kernels if (k.file, k.name, k.arch, k.arguments) != gone]


def drop_hopper(kernels: list[Kernel]) -> list[Kernel]:
    return [k for k in kernels if k.arch != "sm_90a"]


def add_instance(kernels: list[Kernel]) -> list[Kernel]:
    return [*kernels, replace(kernels[0], arguments=("double",))]


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        (
            drop_instance,
            [
                f"{LINEAR}.cu: few_rows_kernel<unsigned char, float, 4, true, false> on "
                "sm_89: missing"
            ],
        ),
        (drop_hopper, 14),
        (add_instance, ["activation.cu: silu_and_mul_fp8_kernel<double> on sm_80: not planned"]),
        (lambda kernels: [], sum(len(p.instances) * len(p.archs) for p in PLANS)),
    ],
    ids=["an instance less", "no sm_90a", "one more", "nothing"],
)
def test_what_is_missing_or_unknown_is_a_problem(
    change: Callable[[list[Kernel]], list[Kernel]], problems: list[str] | int
) -> None:
    """Change kernels that are made up from the plans."""
    whole = [
        Kernel(
            p.file, p.kernel, arguments, arch, 32, 0, 0, tuple(p.needs(arguments, arch)), ahead=1024
        )
        for p in PLANS
        for arguments in p.instances
        for arch in p.archs
    ]
    whole.sort(key=lambda k: (k.file, k.name, k.arch, k.arguments))
    assert not cuda.check(whole)[1]
    wrong = cuda.check(change(whole))[1]
    assert (len(wrong) if isinstance(problems, int) else wrong) == problems


def test_no_tool_or_file_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cuda.main(["--binary", str(tmp_path / "none.so")]) == 2
    assert "none.so: install where nvcc is on PATH" in capsys.readouterr().err
    text = tmp_path / "text.so"
    text.write_text("no machine code")
    assert cuda.main(["--binary", str(text)]) == 2
    assert "cuobjdump" in capsys.readouterr().err
    monkeypatch.setattr(binary, "tool", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cuda.main(["--binary", str(text)]) == 2
    assert "no cuobjdump: install the CUDA toolkit" in capsys.readouterr().err


def test_every_need_is_an_instruction_that_is_looked_for() -> None:
    needs = {
        need
        for p in PLANS
        for arguments in p.instances
        for arch in p.archs
        for need in p.needs(arguments, arch)
    }
    assert needs <= set(binary.SASS)
    assert plans.chip("sm_90a") == "sm_90"
