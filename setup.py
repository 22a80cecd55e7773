"""Run the native build with CMake. All declarative settings are in pyproject.toml.

Read from the environment:
  CXX                        the C++ compiler
  MAX_JOBS                   compiler processes at once (default: ninja's choice)
  LLAMA_FAST_CUDA            auto (default): CUDA kernels if nvcc is found; on: require them; off
  CMAKE_CUDA_ARCHITECTURES   passed on to CMake
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import NoReturn

# Before any newer syntax or import, so that an old Python prints this line, not a traceback.
if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(f"error: llama_fast needs Python >= 3.10; this is {sys.version.split()[0]}")

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def fail(message: str) -> NoReturn:
    sys.exit(f"error: {message}")


def check_compiler() -> None:
    cxx = os.environ.get("CXX")
    names = shlex.split(cxx)[:1] if cxx else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, names)):
        fail(
            f"no C++ compiler: looked for {', '.join(names)}. Install one ('apt install g++', "
            "'dnf install gcc-c++') or name one in CXX; llama_fast is never installed without "
            "its compiled kernels"
        )
    include = sysconfig.get_path("include")
    if not os.path.exists(os.path.join(include, "Python.h")):
        fail(
            f"no Python headers: {include}/Python.h is missing. Install them "
            "('apt install python3-dev', 'dnf install python3-devel')"
        )


def check_cuda() -> None:
    mode = os.environ.get("LLAMA_FAST_CUDA", "auto")
    if mode not in ("auto", "on", "off"):
        fail(f"LLAMA_FAST_CUDA: got {mode!r}, want auto, on or off")
    if mode == "on" and not shutil.which("nvcc"):
        fail("LLAMA_FAST_CUDA=on: nvcc is not on PATH; install the CUDA toolkit, or use auto")


def parallel() -> list[str]:
    """Return CMake's options for MAX_JOBS."""
    jobs = os.environ.get("MAX_JOBS")
    if not jobs:
        return []
    if not (jobs.isascii() and jobs.isdigit() and int(jobs) > 0):
        fail(f"MAX_JOBS: got {jobs!r}, want a number of compiler processes, 1 or more")
    return ["--parallel", jobs]


def tool(name: str) -> str:
    """Find a build requirement's command: on PATH, or beside this Python (a venv not activated)."""
    found = shutil.which(name) or shutil.which(name, path=os.path.dirname(sys.executable))
    if not found:
        fail(f"{name} not found: it is a build requirement; without build isolation, install it")
    return found


def run(*command: str) -> None:
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError:
        fail("the native build failed: see the lines above")


def report(build: Path, start: float, jobs: str) -> None:
    """Print one line, and keep it in build/native.txt: pip shows a build's output only with -v."""
    objects = [path.stat().st_mtime >= start for path in build.rglob("*.o")]
    kept = build / "cuda_architectures.txt"  # CMakeLists.txt writes it
    cuda = kept.read_text().strip() if kept.exists() else "none"
    line = (
        f"native build: {time.time() - start:.0f} s, {sum(objects)} of {len(objects)} files "
        f"compiled, {jobs} jobs, {os.cpu_count()} cores, CUDA architectures: {cuda}"
    )
    print(line, flush=True)
    (build.parent / "native.txt").write_text(line + "\n")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        start = time.time()
        check_compiler()
        check_cuda()
        jobs = parallel()
        cmake, ninja = tool("cmake"), tool("ninja")
        self.output = output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # In the checkout, not in setuptools' temporary folder, so that a second install compiles
        # only what changed. The CMake cache is deleted, because an isolated build has cmake, ninja
        # and pybind11 in a new temporary folder each time. Object files stay.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DLLAMA_FAST_OUTPUT={output}",
            f"-DLLAMA_FAST_CUDA={os.environ.get('LLAMA_FAST_CUDA', 'auto')}",
        ]
        architectures = os.environ.get("CMAKE_CUDA_ARCHITECTURES")
        if architectures:
            options += [f"-DCMAKE_CUDA_ARCHITECTURES={architectures}", "--no-warn-unused-cli"]
        run(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options)
        run(cmake, "--build", str(build), *jobs)
        report(build, start, jobs[-1] if jobs else "ninja's choice of")

    def copy_extensions_to_source(self) -> None:
        """Finish an editable install: copy _cuda too, which setuptools does not know about. Delete
        an earlier _cuda first, or LLAMA_FAST_CUDA=off would leave it there."""
        super().copy_extensions_to_source()
        name = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
        (ROOT / "llama_fast" / name).unlink(missing_ok=True)
        if (self.output / name).exists():
            self.copy_file(str(self.output / name), str(ROOT / "llama_fast" / name))


# Folders outside llama_fast/ that are installed inside it: a top-level `kernels` would collide
# with the PyPI package of that name, which transformers looks for.
subfolders = sorted(f"bench/{path.parent.name}" for path in ROOT.glob("bench/*/__init__.py"))
folders = ("bench", *subfolders, "kernels")
mapped = {
    f"llama_fast.{name.replace('/', '.')}": name
    for name in folders
    if any(ROOT.glob(f"{name}/*.py"))
}

subpackages = ("checkpoint", "cli", "generation", "hf", "nn", "ops", "plan", "vllm")

setup(
    packages=["llama_fast", *(f"llama_fast.{name}" for name in subpackages), *mapped],
    package_dir={"llama_fast": "llama_fast", **mapped},
    ext_modules=[Extension("llama_fast._cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
