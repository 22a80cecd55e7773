"""The GPU report's first two parts: the extension is built, and tests/gpu runs on both backends."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_fast.bench import build_and_test
from llama_fast.bench.files import commit, read


def tool(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    "body, wanted",
    [
        ("echo called $@ >>calls", None),
        ("echo 'no compiler'; exit 4", "cmake ended with 4"),
        ("sleep 30", "not built within 1 s"),
    ],
    ids=["built", "broken", "slow"],
)
def test_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, wanted: str | None
) -> None:
    (tmp_path / "setup.py").touch()
    tool(tmp_path / "bin", "cmake", body)
    tool(tmp_path / "bin", "ninja", "")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CMAKE_CUDA_ARCHITECTURES", "90a")
    found = build_and_test.build(1.0, tmp_path)
    assert found.get("error") == wanted and found["complete"] == (wanted is None)
    if wanted is None:
        configure, make = (tmp_path / "calls").read_text().splitlines()
        assert f"-DPython_EXECUTABLE={sys.executable}" in configure and "-G Ninja" in configure
        assert "-DCMAKE_CUDA_ARCHITECTURES=90a" in configure and "--build" in make


def test_build_without_cmake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(build_and_test, "_tool", lambda name: None)
    assert build_and_test.build(1.0, tmp_path)["error"] == "cmake is not installed"


def test_an_installation_has_nothing_to_build_or_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_and_test, "ROOT", tmp_path)
    assert build_and_test.build(1.0, tmp_path)["complete"]
    build_and_test.test(tmp_path / "tests.json", 1.0)
    assert (read(tmp_path / "tests.json") or {})["what"] == "no tests in this installation"


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
"""


def run_tests(
    tmp_path: Path, text: str, seconds: float, monkeypatch: pytest.MonkeyPatch, built: bool = True
) -> dict[str, Any]:
    # Six workers that each import torch are the whole of a small machine's time.
    monkeypatch.setattr(build_and_test.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        build_and_test, "_missing", lambda b: None if built or b == "triton" else "was not built"
    )
    # This process may be a worker of pytest-xdist, which has no results of its own.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    (tmp_path / "test_them.py").write_text(text)
    build_and_test.test(tmp_path / "tests.json", seconds, (str(tmp_path / "test_them.py"),))
    return read(tmp_path / "tests.json") or {}


def test_both_backends_are_tested_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_tests(tmp_path, TESTS, 200.0, monkeypatch)
    triton, cuda = (found["backends"][name] for name in ("triton", "cuda"))
    assert triton["counts"] == {"passed": 3, "skipped": 1, "error": 1}
    assert cuda["counts"] == {"passed": 2, "failed": 1, "skipped": 1, "error": 1}
    assert found["counts"] == {"passed": 5, "failed": 1, "skipped": 2, "error": 2}
    assert found["complete"] and triton["complete"] and "error" not in found
    assert [n.split("::")[1] for n in triton["passed"]] == ["test_good", "test_bad"]
    assert [*triton["passed"].values()] == [2, 1] and found["commit"] == commit()
    (bad,) = (name for name in cuda["failed"] if name.endswith("::test_bad"))
    assert "assert not True" in found["failed"][f"{bad} on cuda"]
    (error,) = triton["failed"]
    assert "no fixture" in found["failed"][f"{error} on triton"]
    assert len(found["skipped"]) == 2 and len(cuda["slowest"]) == 5
    out = capsys.readouterr().out
    assert "triton: " in out and "cuda: " in out


def test_a_backend_that_is_not_built_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_tests(tmp_path, "def test_good(): pass\n", 100.0, monkeypatch, built=False)
    assert found["backends"]["cuda"] == {"complete": True, "what": "was not built"}
    assert found["complete"] and found["counts"] == {"passed": 1}
    assert "cuda: not tested, was not built" in capsys.readouterr().out


def test_tests_that_do_not_end_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each backend has its share of the time, and the second one what the first leaves."""
    text = (
        "import time, os\ndef test_quick(): pass\n"
        "def test_slow(): time.sleep(60 * (os.environ['LLAMA_FAST_TEST_BACKEND'] == 'triton'))\n"
    )
    found = run_tests(tmp_path, text, 24.0, monkeypatch)
    assert found["error"].startswith("triton: not done within 12 s") and not found["complete"]
    assert found["backends"]["triton"]["counts"] == {"passed": 1}
    assert found["backends"]["cuda"]["complete"] and found["counts"]["passed"] == 3


def test_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, "git", "echo 123abc+")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("LLAMA_FAST_COMMIT", "copied")
    tool(tmp_path, "git", "exit 128")
    assert commit() == "copied"
    (tmp_path / "git").write_text("#!/bin/sh\necho 123abc+\n")
    assert commit() == "123abc+"
