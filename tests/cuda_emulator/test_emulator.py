"""Tests of the emulator: instructions follow the PTX ISA's layouts, and planted bugs are caught."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from .build import cuda_include, cxx

HERE = Path(__file__).parent
CASES = [
    "mma_bf16",
    "mma_f16",
    "mma_e4m3",
    "ldmatrix",
    "stmatrix",
    "shuffles_and_votes",
    "cp_async",
    "cp_async_arrival",
    "block_sum",
    "named_barriers",
    "tma",
    "cluster",
    "multicast",
    "wgmma_bf16",
    "wgmma_e4m3",
    "wgmma_e4m3_sum",
    "wgmma_registers",
    "wgmma_mn_major",
    "setmaxnreg",
]
# A planted bug and the emulator's message. "line" means that the result is wrong instead.
BUGS = {
    "setmaxnreg_too_many": "waits at setmaxnreg.inc 240 of the block's 3 x 168 registers",
    "setmaxnreg_not_more": "setmaxnreg.inc 160: the warpgroup has 168",
    "wgmma_missing_wait": "line",
    "wgmma_missing_fence": "no wgmma.fence since the last wait",
    "tma_missing_wait": "line",
    "tma_missing_init": "used before its init",
    "tma_missing_init_fence": "no fence after mbarrier.init",
    "tma_missing_proxy_fence": "no fence.proxy.async",
    "cluster_missing_barrier": "line",
    "cluster_early_end": "line",
    "multicast_tells_one": "line",
    "scratch_used_again": "line",
    "wrong_fragment": "line",
    "missing_wait": "",
    "arrival_not_waited_for": "line",
    "missing_barrier": "line",
    "deadlock": "deadlock: thread",
    "different_instructions": "meet in different instructions",
    "read_past_the_end": "memory fault",
    "write_past_the_end": "write past the end of shared memory",
    "uninitialized": "line",
    "misaligned_copy": "not aligned to 16",
    "never_waited": "cp.async is never waited for",
}


@pytest.fixture(scope="session")
def selftest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("emulator") / "selftest"
    command = [*cxx(), "-std=c++17", "-O1", "-DLF_CUDA_EMULATOR", "-I", str(HERE)]
    command += ["-isystem", str(cuda_include()), "-o", str(program)]
    subprocess.run([*command, HERE / "selftest.cpp", HERE / "emulator.cpp"], check=True)
    return program


def run(selftest: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([selftest, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("seed", ["0", "1", "2"])
@pytest.mark.parametrize("case", CASES)
def test_as_the_ptx_isa_says(selftest: Path, case: str, seed: str) -> None:
    result = run(selftest, case, seed)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(selftest: Path, bug: str) -> None:
    results = [run(selftest, f"bug_{bug}", seed) for seed in "012"]
    assert all(result.returncode == 3 for result in results)
    assert BUGS[bug] in results[0].stdout


def test_no_case_is_left_out(selftest: Path) -> None:
    assert run(selftest).stdout.split() == [*CASES, *(f"bug_{bug}" for bug in BUGS)]
