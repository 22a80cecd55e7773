"""Break the code in one place, in a copy, and run the tests that should fail: `make mutants`.

The list is tests/mutants.txt. A mutant names its files (a glob), the text to replace (it must occur
exactly once there; white space matches any white space), the replacement, and the tests that must
fail. The folder decides what is rebuilt: csrc/cpu for one instruction set, csrc/cuda for the
emulator; kernels run in Triton's interpreter; llama_fast runs as it is.

    python -m tests.mutants --list
    python -m tests.mutants -k "rope or decode" --scratch /tmp/mutants     # kept for the next call

Each set of tests first runs on the unchanged copy and must pass there. The exit status is 1 if a
mutant survives without an explanation (`equivalent`) or does not apply.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = {"csrc/cuda": ("tests/gpu", "tests/cuda_emulator"), "kernels": ("tests/gpu",)}
NOT_TESTS = {"gpu", "cuda_emulator", "bench", "static"}
BUILDS = {"csrc/cpu": ("cpu", "_cpu", "-DLLAMA_FAST_CUDA=off"),
          "csrc/cuda": ("emulate", "_cuda_emulated", "-DLLAMA_FAST_EMULATE=ON")}  # fmt: skip
EMULATED = {
    "LLAMA_FAST_TEST_BACKEND": "cuda",
    "LLAMA_FAST_CUDA_EMULATOR": "1",
    "OMP_NUM_THREADS": "1",
}

CPU_SECONDS = 120  # of a test run: a mutant may loop forever


@dataclass
class Mutant:
    name: str
    files: str
    old: str
    new: str
    tests: str  # stems of test files, and after a colon pytest's -k
    isa: str = "avx2"
    equivalent: str = ""  # why no test can fail
    kind: str = field(init=False)

    def __post_init__(self) -> None:
        self.kind = next(
            top for top in ("csrc/cpu", "csrc/cuda", "kernels", "llama_fast")
            if self.files.startswith(top)
        )  # fmt: skip


def read_list(path: Path) -> list[Mutant]:
    """Read the list: `[name]`, then `key: value` lines."""
    mutants: list[dict[str, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            mutants.append({"name": line[1:-1], "new": ""})
        elif line and not line.startswith("#"):
            key, _, value = line.partition(":")
            mutants[-1][key] = value.strip()
    return [Mutant(**fields) for fields in mutants]


def spot(root: Path, mutant: Mutant) -> tuple[Path, re.Match[str]]:
    """Find the one place below root where the mutant applies."""
    pattern = re.compile(r"\s+".join(map(re.escape, mutant.old.split())))
    found = [
        (path, match)
        for path in root.glob(mutant.files)
        if path.is_file() and path.suffix not in {".so", ".pyc"}
        for match in pattern.finditer(path.read_text(encoding="utf-8"))
    ]
    if len(found) != 1:
        raise LookupError(f"{mutant.old!r} occurs {len(found)} times in {mutant.files}, want once")
    return found[0]


def test_files(root: Path, mutant: Mutant) -> list[Path]:
    """Find the test files that mutant.tests names, in any folder below tests/."""
    folders, files = TESTS.get(mutant.kind, ("tests",)), []
    for stem in mutant.tests.partition(":")[0].split():
        here = [p for folder in folders for p in (root / folder).rglob(f"test_{stem}.py")]
        if folders == ("tests",):
            here = [p for p in here if not NOT_TESTS & set(p.relative_to(root).parts)]
        if not here:
            raise LookupError(f"there is no test_{stem}.py for it")
        files += here
    return files


class Scratch:
    """Hold a copy of the checkout to break, built only where a mutant needs it."""

    def __init__(self, root: Path, trusted: bool) -> None:
        self.root, self.trusted = root, trusted
        listed = subprocess.run(
            ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, stdout=-1, check=True
        ).stdout.decode()
        names = {n for n in listed.split("\0") if n and (ROOT / n).is_file()}
        names |= {str(p.relative_to(ROOT)) for p in (ROOT / "llama_fast").glob("*.so")}
        for name in names:
            here, there = ROOT / name, root / name
            if there.exists() and here.read_bytes() == there.read_bytes():
                continue  # keeps its time stamp: nothing to build
            if not (there.exists() and name.endswith(".so")):  # the copy builds those itself
                there.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(here, there)
        sources = {".py", ".cpp", ".h", ".cu", ".cuh"}
        for top in ("csrc", "kernels", "llama_fast", "tests"):
            for path in (root / top).rglob("*"):
                if path.suffix in sources and str(path.relative_to(root)) not in names:
                    path.unlink()  # moved or deleted in the checkout
        self.built: set[str] = set()
        self.passed: dict[tuple[str, ...], tuple[str, float]] = {}

    @contextmanager
    def broken(self, mutant: Mutant) -> Iterator[None]:
        path, match = spot(self.root, mutant)
        text = path.read_text(encoding="utf-8")
        saved = path.stat()
        restored: list[tuple[Path, Path]] = []
        try:
            path.write_text(text[: match.start()] + mutant.new + text[match.end() :], "utf-8")
            if mutant.kind in BUILDS:
                self._rebuild(mutant, path, restored)
            yield
        finally:
            path.write_text(text, encoding="utf-8")
            os.utime(path, ns=(saved.st_atime_ns, saved.st_mtime_ns))
            for saved_copy, built in restored:
                shutil.move(saved_copy, built)

    def build(self, kind: str) -> None:
        if kind not in BUILDS or kind in self.built:
            return
        folder, target, option = BUILDS[kind]
        environment = dict(os.environ)
        if shutil.which("ccache"):  # shared by every copy, wherever it lies
            environment |= {"CMAKE_CXX_COMPILER_LAUNCHER": "ccache", "CCACHE_NOHASHDIR": "1"}
            environment["CCACHE_BASEDIR"] = str(self.root)
        build = self.root / "build" / folder
        configure = ["cmake", "-S", str(self.root), "-B", str(build), "-G", "Ninja", option]
        configure += [f"-DPython_EXECUTABLE={sys.executable}"]
        for command in (configure, ["cmake", "--build", str(build), "--target", target]):
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        self.built.add(kind)

    def _rebuild(self, mutant: Mutant, path: Path, restored: list[tuple[Path, Path]]) -> None:
        """Compile what includes path, among the kernels for one instruction set, and link."""
        folder, target, _ = BUILDS[mutant.kind]
        build = self.root / "build" / folder

        def ninja(tool: str, *of: str) -> str:
            command = ["ninja", "-t", tool, *of]
            return subprocess.run(command, cwd=build, stdout=-1, check=True, text=True).stdout

        objects = []
        for entry in ninja("deps").split("\n\n"):
            name, *sources = entry.split("\n    ")
            name = name.partition(":")[0]
            used = "kernels_" not in name or f"kernels_{mutant.isa}.dir/" in name
            if used and any((build / source).resolve() == path for source in sources):
                objects.append(name)
        if not objects:
            raise LookupError("nothing is built from it")
        library = next((self.root / "llama_fast").glob(f"{target}.*.so"))
        for built in (*(build / name for name in objects), library):
            restored.append((built.with_name(f"{built.name}.saved"), built))
            shutil.copy2(built, restored[-1][0])

        def run_last(of: str) -> None:
            command = ninja("commands", of).splitlines()[-1]
            subprocess.run(command, shell=True, cwd=build, capture_output=True, check=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run_last, objects))
        run_last(target)

    def test(self, mutant: Mutant) -> tuple[str, float]:
        """Run the mutant's tests. Return "passed" or how they failed, and the seconds."""
        chosen, files = mutant.tests.partition(":")[2], test_files(self.root, mutant)
        command = [sys.executable, "-m", "pytest", "-xq", "-rfE", "-p", "no:cacheprovider"]
        command += map(str, files)
        if chosen:
            command += ["-k", chosen.strip()]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
        if mutant.kind == "csrc/cpu":
            environment["LLAMA_FAST_CPU_ISA"] = mutant.isa
        if mutant.kind == "csrc/cuda":
            environment |= EMULATED
            command += ["-m", "not gpu and not triton"]
        start = time.perf_counter()
        run = subprocess.run(
            command,
            cwd=self.root,
            env=environment,
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS,) * 2),
        )
        seconds = time.perf_counter() - start
        if run.returncode < 0:
            return "crash, or out of time", seconds
        if run.returncode > 1:
            raise LookupError(f"pytest's status is {run.returncode}: {run.stdout[-200:]!r}")
        failed = re.search(r"^(?:FAILED|ERROR) \S*?::(\S+)", run.stdout, re.MULTILINE)
        return ("passed" if run.returncode == 0 else failed[1] if failed else "failed"), seconds

    def judge(self, mutant: Mutant) -> tuple[str, str, float]:
        """Return "killed", "survived" or "error", the failing test or reason, and the seconds."""
        try:
            spot(self.root, mutant)
            self.build(mutant.kind)
            key = mutant.kind, mutant.isa, mutant.tests
            if key not in self.passed and not self.trusted:
                self.passed[key] = self.test(mutant)
            if not self.trusted and (before := self.passed[key][0]) != "passed":
                return "error", f"its tests fail on the unchanged code: {before}", 0.0
            with self.broken(mutant):
                how, seconds = self.test(mutant)
        except LookupError as error:
            return "error", str(error), 0.0
        except subprocess.CalledProcessError as error:
            return "error", f"does not compile: {(error.stderr or b'')[-300:]!r}", 0.0
        if how != "passed":
            return "killed", how, seconds
        return "survived", mutant.equivalent and f"equivalent: {mutant.equivalent}", seconds


def chosen_by(expression: str, mutant: Mutant) -> bool:
    """Match words joined by `or` against the mutant's name and files, as pytest's -k does."""
    words = [word.strip() for word in expression.split(" or ")]
    return any(word in f"{mutant.name} {mutant.files}" for word in words)


def main(arguments: list[str] | None = None) -> int:
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # cmake and ninja
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-k", default="", metavar="WORDS", help="words of name and files, joined by `or`"
    )
    parser.add_argument("--list", action="store_true", help="only check that the mutants apply")
    parser.add_argument("--no-baseline", action="store_true", help="the tests are known to pass")
    parser.add_argument("--scratch", type=Path, help="keep the copy in this folder, for later runs")
    parser.add_argument("--file", type=Path, default=ROOT / "tests" / "mutants.txt")
    options = parser.parse_args(arguments)
    mutants = [m for m in read_list(options.file) if chosen_by(options.k, m)]
    results: list[tuple[Mutant, str]] = []
    if options.list:
        for m in mutants:
            try:
                spot(ROOT, m), test_files(ROOT, m)
                print(f"{m.kind:10} {m.name:58} {m.tests}")
            except LookupError as error:
                results.append((m, "error"))
                print(f"{m.kind:10} {m.name:58} does not apply: {error}")
        return 1 if results else 0
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Scratch((options.scratch or Path(temporary)).resolve(), options.no_baseline)
        for m in mutants:
            result, how, seconds = scratch.judge(m)
            results.append((m, result))
            print(f"{result:9} {m.name:58} {seconds:5.1f} s  {how}", flush=True)
    bad = [m for m, result in results if result == "error" or
           (result == "survived") != bool(m.equivalent)]  # fmt: skip
    count = {r: sum(r == x for _, x in results) for r in ("killed", "survived", "error")}
    print(", ".join(f"{n} {r}" for r, n in count.items()), f"of {len(results)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
