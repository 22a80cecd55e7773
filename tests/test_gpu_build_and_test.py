"""The parts of the GPU report before its figures: the build, tests/gpu and what hangs in them,
compute-sanitizer, and kernels compiled ahead."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llama_fast.bench import build_and_test, processes
from llama_fast.bench.build_and_test import PARTS
from llama_fast.bench.files import commit, write
from llama_fast.dispatch import _ON_GPU

from .gpu import conftest

REPOSITORY = Path(__file__).resolve().parent.parent


def tool(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Of a report into tmp_path/out, about a checkout in tmp_path that has nothing yet."""
    for module in (build_and_test, processes):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(processes, "PATIENCE", 0.5)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    # This process may be a worker of pytest-xdist, which has no results of its own.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.delenv("CMAKE_CUDA_ARCHITECTURES", raising=False)
    return argparse.Namespace(
        out=tmp_path / "out", device="cpu", tiny=False, sm="", struck_off={}, case=""
    )


# ---- what is here, and the build ----


def test_versions() -> None:
    found = build_and_test.versions(100.0)["environment"]
    assert found["torch"] and found["pytest"] and found["commit"] == commit()


def test_torch_that_hangs_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_and_test, "VERSIONS", "import time; time.sleep(60)")
    assert build_and_test.versions(0.5)["error"].endswith("no end within 0 s")
    monkeypatch.setattr(build_and_test, "VERSIONS", "raise ImportError('libcudart')")
    assert build_and_test.versions(50.0)["error"].endswith("ImportError: libcudart")


@pytest.mark.parametrize(
    "body, wanted",
    [
        ("echo called $CUDACXX $@ >>calls", None),
        ("echo 'no compiler'; exit 4", "_cuda: cmake ended with 4"),
        ("trap '' INT; sleep 30", "_cuda: not built within 1 s"),
    ],
    ids=["built", "broken", "hangs"],
)
def test_build(
    tmp_path: Path,
    args: argparse.Namespace,
    monkeypatch: pytest.MonkeyPatch,
    body: str,
    wanted: str | None,
) -> None:
    (tmp_path / "setup.py").touch()
    tool(tmp_path / "bin", "cmake", body)
    for name in ("ninja", "nvcc"):
        tool(tmp_path / "bin", name, "")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    args.sm, began = "sm_89", time.monotonic()
    found = PARTS["build-cuda"](args, 1.0)
    assert found.get("error") == wanted and found["complete"] == (wanted is None)
    assert time.monotonic() - began < 10
    if wanted is None:
        PARTS["build-cpu"](args, 1.0)
        cuda, make, cpu, make_cpu = (tmp_path / "calls").read_text().splitlines()
        assert f"-DPython_EXECUTABLE={sys.executable}" in cuda and "-G Ninja" in cuda
        assert "-DLLAMA_FAST_CUDA=on" in cuda and "-DCMAKE_CUDA_ARCHITECTURES=89-real" in cuda
        assert cuda.startswith(f"called {tmp_path}/bin/nvcc ") and "--target _cuda" in make
        assert "-DLLAMA_FAST_CUDA=off" in cpu and "--target _cpu --parallel 2" in make_cpu


def test_build_without_cmake(
    tmp_path: Path, args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(processes, "tool", lambda name: None)
    assert PARTS["build-cpu"](args, 1.0)["error"] == "cmake is not installed"


def test_an_installation_has_nothing_to_build_or_test(args: argparse.Namespace) -> None:
    assert PARTS["build-cpu"](args, 1.0)["complete"]
    for part in (PARTS["launch"], PARTS["tests-triton"]):
        found = part(args, 1.0)
        assert found["complete"] and found["what"] == "no tests in this installation"


# ---- tests ----


def test_families_are_all_the_ops_and_their_tests() -> None:
    assert build_and_test.OPS == _ON_GPU
    sanitized = {name.split("::")[0] for name in conftest.SANITIZED}
    assert sanitized == {f"test_{family}.py" for family in build_and_test.FAMILIES}


TESTS = """
import os
import pytest

CUDA = os.environ["LLAMA_FAST_TEST_BACKEND"] == "cuda"

@pytest.fixture
def broken():
    raise OSError("no fixture")

@pytest.mark.parametrize("n", [1, 2])
def test_good(n): pass
def test_bad(): assert not CUDA
@pytest.mark.skip(reason="one GPU")
def test_left_out(): pass
def test_error(broken): pass
def test_compiles_without_a_graph_break(): assert False, "takes minutes"
"""


def checkout(tmp_path: Path, **files: str) -> None:
    """tests/gpu with these files, and CUDA kernels that are built."""
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "llama_fast").mkdir()
    (tmp_path / "llama_fast" / "_cuda_emulated.x.so").touch()
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n    sanitize: small\n    big: memory\n    large: memory\n"
    )
    for name, text in files.items():
        (tmp_path / "tests" / "gpu" / f"test_{name}.py").write_text(text)


def test_each_backend_is_tested(
    tmp_path: Path, args: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout(tmp_path, them=TESTS)
    triton, cuda = PARTS["tests-triton"](args, 100.0), PARTS["tests-cuda"](args, 100.0)
    assert triton["complete"] and cuda["complete"] and "error" not in triton
    assert triton["counts"] == {"passed": 3, "skipped": 1, "error": 1}
    assert cuda["counts"] == {"passed": 2, "failed": 1, "skipped": 1, "error": 1}
    assert sorted(n.split("::")[1] for n in triton["passed"]) == ["test_bad", "test_good"]
    assert sorted(triton["passed"].values()) == [1, 2] and triton["commit"] == commit()
    (why,) = (why for name, why in cuda["failed"].items() if name.endswith("::test_bad"))
    assert "assert not True" in why and len(cuda["slowest"]) == 5
    (error,) = triton["failed"].values()
    assert "no fixture" in error
    out = capsys.readouterr().out
    assert "tests-triton: " in out and "tests-cuda-large: " in out
    assert "no fixture" in (args.out / "logs" / "tests-cuda.log").read_text()


def test_a_backend_that_is_not_built_is_told(tmp_path: Path, args: argparse.Namespace) -> None:
    checkout(tmp_path)
    args.device = "cuda"
    for part in (PARTS["launch"], PARTS["tests-cuda"], PARTS["memcheck"]):
        found = part(args, 100.0)
        assert found["complete"] and found["what"] == "llama_fast._cuda was not built"


HANGS = """
import os, signal, sys, time, pytest
def test_before(): pass
def test_hangs(): {hang}
@pytest.mark.sanitize
def test_after(): pass
"""


def test_what_takes_gigabytes_runs_two_at_a_time(
    tmp_path: Path, args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[str] = []

    def limited(command: list[str], *_: Any, **environment: str) -> tuple[str, int]:
        commands.append(" ".join(command))
        return "", build_and_test.NO_TESTS

    checkout(tmp_path)
    monkeypatch.setattr(processes, "limited", limited)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert PARTS["tests-triton"](args, 60.0)["complete"]
    many, large = commands
    assert (
        "-m not (big or large) -n 14 --dist worksteal" in many
        and "-m big or large -n 2 --dist worksteal" in large
    )


def test_a_test_that_hangs_costs_itself(
    tmp_path: Path, args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_and_test, "TIMEOUTS", {"triton": "2"})
    checkout(tmp_path, rope=HANGS.format(hang="time.sleep(300)"), other="def test_it(): pass\n")
    found = PARTS["tests-triton"](args, 60.0)
    assert found["counts"] == {"passed": 3, "error": 1} and found["complete"]
    assert [*found["failed"]] == ["tests/gpu/test_rope.py::test_hangs"]


def test_tests_that_do_not_end_are_stopped(tmp_path: Path, args: argparse.Namespace) -> None:
    """As one whose process no thread of its own can end."""
    checkout(tmp_path, rope=HANGS.format(hang="os.kill(os.getpid(), signal.SIGSTOP)"))
    began = time.monotonic()
    found = PARTS["tests-triton"](args, 12.0)
    assert time.monotonic() - began < 20 and not found["complete"]
    assert "not done within 12 s, in tests/gpu/test_rope.py::test_hangs" in found["failed"].values()
    assert found["counts"]["passed"] >= 1


SMALL = "import pytest\n@pytest.mark.sanitize\ndef test_small(): {body}\ndef test_large(): pass\n"
LATE = "raise RuntimeError('fp8_gemm [2, 3]: misaligned address')"
LOST = "raise RuntimeError('CUDA error: an illegal memory access was encountered')"


def test_an_op_that_hangs_or_faults_at_its_launch_costs_itself(
    tmp_path: Path, args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_and_test, "LAUNCH", 8.0)
    families = {name: SMALL.format(body="pass") for name in build_and_test.FAMILIES}
    families["attention"] = SMALL.format(body="__import__('os').kill(0, 19)")
    families["quantize"] = SMALL.format(body=LOST)
    families["fp8_gemm"] = SMALL.format(body=LATE)
    families["rope"] = SMALL.format(body="assert False, 'wrong'")
    of_all = "def test_f42_in_turn_{op}(): pass\n"
    hardware = "".join(of_all.format(op=op) for op in build_and_test.OPS)
    checkout(tmp_path, **families, hardware=hardware, model="def test_all(): pass\n")
    found = PARTS["launch"](args, 100.0)
    assert found["counts"] == {"passed": 3, "failed": 3} and found["complete"]
    assert args.struck_off == found["struck_off"] and set(args.struck_off) == {
        "attention",
        "quantize",
        "fp8_gemm",
    }
    assert "not done within 8 s, in tests/gpu/test_attention.py" in args.struck_off["attention"]
    assert "illegal memory access" in args.struck_off["quantize"]
    tested = PARTS["tests-cuda"](args, 100.0)
    assert not tested["complete"] and "tests of attention" in tested["skipped"]
    names = {name.split("::")[1] for name in tested["passed"]}
    assert {"test_f42_in_turn_rms_norm", "test_large"} <= names and "test_all" not in names
    assert not names & {"test_f42_in_turn_attention", "test_f42_in_turn_quantize_fp8"}
    assert not any("test_attention" in name for name in (*tested["passed"], *tested["failed"]))
    assert tested["counts"]["failed"] == 1  # rope's, which is only wrong


def test_an_op_that_time_does_not_suffice_for_is_not_blamed(
    tmp_path: Path, args: argparse.Namespace
) -> None:
    checkout(tmp_path)
    found = PARTS["launch"](args, build_and_test.LAUNCH / 2 - 1)
    assert found["planned"] == [*build_and_test.FAMILIES] and not found["done"]
    assert not found["complete"] and not found["failed"] and not args.struck_off


def test_a_process_that_lost_its_gpu_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a worker of pytest-xdist, which starts another; no test after it can pass there."""
    left: list[int] = []

    def lost() -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(conftest.os, "_exit", left.append)
    monkeypatch.setattr(conftest.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(conftest.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    conftest.leave_if_lost()
    assert not left
    monkeypatch.setattr(conftest.torch.cuda, "synchronize", lost)
    conftest.leave_if_lost()
    assert left == [70]
    monkeypatch.delenv("PYTEST_XDIST_WORKER")
    conftest.leave_if_lost()
    assert left == [70]


# ---- compute-sanitizer, kernels ahead of time ----


@pytest.mark.parametrize(
    "run, code, wanted",
    [
        ({"passed": True, "errors": 0, "cases": {"passed": 9}, "why": ""}, 0, {}),
        ({"passed": False, "errors": 0, "cases": {"passed": 3}, "why": "not done"}, 1, {}),
        ({"passed": False, "errors": 2, "cases": {}, "why": "2 errors"}, 1, "2 errors"),
        ({"passed": False, "errors": 0, "cases": {"failed": 1}, "why": "1 c"}, 1, "1 c"),
        (None, None, "memcheck: did not end"),
    ],
    ids=["clean", "cut short", "found", "failed", "hangs"],
)
def test_sanitize(
    args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, run: Any, code: Any, wanted: Any
) -> None:
    commands: list[list[str]] = []

    def limited(command: list[str], seconds: float, log: Path) -> tuple[str, int | None]:
        commands.append(command)
        write(log.with_suffix(".json"), {"runs": [run]})
        return "", code

    monkeypatch.setattr(processes, "limited", limited)
    monkeypatch.setattr(build_and_test, "_missing", lambda *_: None)
    args.device, args.struck_off = "cuda", {"attention": "hung", "rope": "hung"}
    found = PARTS["memcheck"](args, 60.0)
    if run is None:
        assert found["error"] == wanted and not found["complete"]
    else:
        assert found["failed"] == ({"memcheck": wanted} if wanted else {})
        assert found["complete"] == run["passed"] and found["counts"] == run["cases"]
    (command,) = commands
    assert command[command.index("-k") + 1] == "not test_attention.py and not test_rope.py"
    args.device = "cpu"
    assert PARTS["synccheck"](args, 60.0)["what"] == "needs a GPU"


def test_precompiled_kernels_are_what_a_launch_finds(tmp_path: Path) -> None:
    """Into an empty cache; then the launcher's own call, on a driver that only knows its chip,
    adds nothing to it."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ambient = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**ambient, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


SCRIPT = """
import argparse, os, sys
from pathlib import Path
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from llama_fast.bench import build_and_test
from llama_fast.bench.static import calls
from llama_fast.kernels import common

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))

args = argparse.Namespace(out=Path(sys.argv[1]), sm="", tiny=True)
found = build_and_test.precompile(args, 300.0)
assert found["complete"] and found["counts"]["compiled"] > 2 and not found["failed"], found
cache = Path(os.environ["TRITON_CACHE_DIR"])
before = set(cache.iterdir())
assert len(before) > 2
driver.set_active(Driver())
for case in calls.CASES:
    if case.op == "rms_norm":
        with common.record(common.CHIPS["sm_90"]) as recording:
            case.call()
        for launch in recording.launches:
            launch.kernel.warmup(
                *launch.arguments,
                grid=launch.grid,
                **dict(launch.config.constants),
                num_warps=launch.config.num_warps,
                num_stages=launch.config.num_stages,
                **{"enable_fp_fusion": True, **launch.constants},
            )
assert set(cache.iterdir()) == before
"""


def test_precompile_that_fails(args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "limited", lambda *_: ("no such chip\n", 2))
    assert PARTS["precompile"](args, 9.0)["error"] == "precompile: no such chip"
    monkeypatch.setattr(processes, "limited", lambda *_: ("", None))
    assert PARTS["precompile"](args, 9.0)["error"] == "precompile: not done within 9 s"
    rows = [{"kernel": "k", "cases": ["a"], "problems": p} for p in ([], ["spills"])]
    write(args.out / "logs" / "static.json", {"rows": rows[1:]})
    monkeypatch.setattr(processes, "limited", lambda *_: ("", 1))
    assert PARTS["precompile"](args, 9.0)["failed"] == {"k a": "spills"}


def test_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, "git", "echo 123abc+")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("LLAMA_FAST_COMMIT", "copied")
    tool(tmp_path, "git", "exit 128")
    assert commit() == "copied"
    (tmp_path / "git").write_text("#!/bin/sh\necho 123abc+\n")
    assert commit() == "123abc+"
