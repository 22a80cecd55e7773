"""Tests of the sdist, the wheel built from it and editable installs, as a user makes them: the
build is isolated, and imports come from outside.

The kernels are compiled once for all tests, without optimization and for the generic instruction
set only, since their results are not tested here. Everything happens in a copy of the checkout.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("llama_fast", "kernels", "bench", "csrc", "tests", "docs", "examples", ".ci")
NOT_SOURCE = shutil.ignore_patterns("*.so", "*.pyc", "__pycache__", "out")

# Compiles an empty file in place of each kernel for AVX2 or later.
COMPILE = r"""#!/bin/sh
case "$*" in *" -mavx2 "*) set -- $(echo "$*" | sed 's| -c [^ ]*| -x c++ -c /dev/null|') ;; esac
exec "$@" -O0 -ULF_X86
"""

# cmake and ninja lie beside this Python, and perhaps nowhere else.
TOOLS_PATH = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])

# Runs in the environment under test. Prints, as JSON, the file of every import.
SHOW = """
import json
import llama_fast, torch
import llama_fast.bench.probe, llama_fast.kernels.probe
x, weight = torch.randn(3, 65), torch.randn(65)
difference = llama_fast.rms_norm(x, weight) - llama_fast.reference.rms_norm(x, weight)
print(json.dumps({
    "package": llama_fast.__file__, "extension": llama_fast._cpu.__file__,
    "bench": llama_fast.bench.probe.__file__, "kernels": llama_fast.kernels.probe.__file__,
    "difference": difference.abs().max().item(),
}))
"""


def run(
    *command: str | Path, cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a command without the CUDA kernels, which take minutes and are tested elsewhere."""
    ambient = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ambient["LLAMA_FAST_CUDA"] = "off"
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=ambient | env,
        capture_output=True,
        text=True,
    )


def succeed(*command: str | Path, cwd: Path | None = None, **env: str) -> str:
    result = run(*command, cwd=cwd, **env)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the sources, with a module in each mapped folder to import."""
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    copy.mkdir()
    for name in FOLDERS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=NOT_SOURCE)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy2(file, copy)
    for name in ("bench", "kernels"):
        (copy / name).mkdir(exist_ok=True)
        (copy / name / "probe.py").touch()
    return copy


@pytest.fixture(scope="session")
def sdist(checkout: Path) -> Path:
    """Return the unpacked source distribution, which is all that an installation from PyPI has."""
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    succeed(sys.executable, "-c", build, cwd=checkout)
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(checkout.parent, filter="data")
    return checkout.parent / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="session")
def pip(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    launcher = tmp_path_factory.mktemp("launcher") / "unoptimized"
    launcher.write_text(COMPILE)
    launcher.chmod(0o755)

    def pip(*arguments: str | Path, **env: str) -> str:
        command = (sys.executable, "-m", "pip", *arguments)
        return succeed(*command, CMAKE_CXX_COMPILER_LAUNCHER=str(launcher), **env)

    return pip


@pytest.fixture(scope="session")
def wheel(sdist: Path, pip: Callable[..., str]) -> Path:
    pip("wheel", "--no-deps", "--wheel-dir", sdist.parent / "wheel", sdist)
    (built,) = (sdist.parent / "wheel").glob("*.whl")
    return built


@pytest.fixture(scope="session")
def extension(wheel: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        (native,) = [name for name in archive.namelist() if name.endswith(".so")]
        return Path(archive.extract(native, wheel.parent / "unpacked"))


def make_venv(folder: Path) -> Path:
    """Return an environment with this one's packages, but not with its editable installation."""
    succeed(sys.executable, "-m", "venv", "--without-pip", folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="session")
def installed(wheel: Path, pip: Callable[..., str]) -> Path:
    python = make_venv(wheel.parent.parent / "installed")
    pip("--python", python, "install", "--no-deps", wheel)
    return python


@pytest.fixture(scope="session")
def editable(wheel: Path, sdist: Path, pip: Callable[..., str]) -> Path:
    """Install after the wheel, in the same tree: the kernels are already compiled. Do not isolate
    the build: the wheel's was."""
    python = make_venv(sdist.parent / "editable")
    options = ("--no-deps", "--no-build-isolation", "-e")
    pip("--python", python, "install", *options, sdist, PATH=TOOLS_PATH)
    return python


def test_sdist_holds_every_source(checkout: Path, sdist: Path) -> None:
    def sources(root: Path) -> set[str]:
        files = (f for name in FOLDERS for f in (root / name).rglob("*") if f.is_file())
        return {str(f.relative_to(root)) for f in files}

    assert sources(sdist) == sources(checkout)
    for name in ("CMakeLists.txt", "LICENSE", "Makefile", "README.md", "constraints.txt"):
        assert (sdist / name).exists()


def test_wheel_holds_the_package_and_one_extension(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    info = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    assert {n.split("/")[0] for n in names} == {"llama_fast", info}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert [n for n in names if ".so" in n] == [f"llama_fast/_cpu{suffix}"]
    assert {"llama_fast/py.typed", "llama_fast/_cpu.pyi", f"{info}/licenses/LICENSE"} <= {*names}
    assert {"llama_fast/bench/probe.py", "llama_fast/kernels/probe.py"} <= {*names}
    assert "llama_fast/kernels/__init__.py" not in names
    assert "License-Expression: Apache-2.0" in metadata


def test_extension_links_neither_torch_nor_python(extension: Path) -> None:
    """Serve every torch with one build: it needs libgomp's plain soname, which torch brings."""
    if not shutil.which("readelf"):
        pytest.skip("readelf (binutils) is not installed")
    dynamic = succeed("readelf", "--dynamic", extension)
    needed = set(re.findall(r"NEEDED.*\[(.+?)\]", dynamic))
    assert "libgomp.so.1" in needed
    assert not [name for name in needed if re.match(r"lib(torch|c10|python|asan)", name)]
    assert not re.search(r"RPATH|RUNPATH", dynamic)


def test_installed_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    """Find everything in the environment, and one OpenMP runtime in the process."""
    loaded = "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line})"
    first, runtimes = succeed(installed, "-c", SHOW + loaded, cwd=tmp_path).splitlines()
    shown = json.loads(first)
    assert shown.pop("difference") < 1e-5
    environment = installed.parent.parent
    assert all(Path(path).is_relative_to(environment) for path in shown.values()), shown
    assert len(runtimes.split()) == 1


@pytest.mark.parametrize("inside", [False, True], ids=["outside the root", "inside the root"])
def test_editable(editable: Path, sdist: Path, tmp_path: Path, inside: bool) -> None:
    shown = json.loads(succeed(editable, "-c", SHOW, cwd=sdist if inside else tmp_path))
    assert shown.pop("difference") < 1e-5
    assert shown["bench"] == str(sdist / "bench" / "probe.py")
    assert shown["kernels"] == str(sdist / "kernels" / "probe.py")
    assert all(Path(path).is_relative_to(sdist) for path in shown.values()), shown


@pytest.mark.parametrize("kind", ["installed", "editable"])
def test_beside_the_kernels_package(kind: str, sdist: Path, request: pytest.FixtureRequest) -> None:
    """Import beside the PyPI package `kernels`, which transformers imports if it is installed, in
    the root too, where the folder of the same name is first on sys.path."""
    package = pytest.importorskip("kernels").__file__
    python = request.getfixturevalue(kind)
    code = SHOW + "import importlib.util; print(importlib.util.find_spec('kernels').origin)"
    if kind == "editable":
        code += "\nfrom transformers import LlamaForCausalLM"
    shown, origin = succeed(python, "-c", code, cwd=sdist).splitlines()
    assert json.loads(shown) and origin == package


def test_command(installed: Path, tmp_path: Path) -> None:
    assert "generate" in succeed(installed.parent / "llama-fast", "--help", cwd=tmp_path)


def test_install_fails_clearly(checkout: Path, tmp_path: Path) -> None:
    command = ("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", tmp_path)
    result = run(sys.executable, *command, checkout, CXX="no-such-c++")
    assert result.returncode != 0
    message = "error: no C++ compiler: looked for no-such-c++. Install one"
    assert message in result.stdout + result.stderr
    assert not [*tmp_path.iterdir()], "a pure-Python install was left behind"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            {"LLAMA_FAST_CUDA": "on", "PATH": "/usr/bin:/bin"},
            "error: LLAMA_FAST_CUDA=on: nvcc is not on PATH",
        ),
        ({"LLAMA_FAST_CUDA": "yes"}, "error: LLAMA_FAST_CUDA: got 'yes', want auto, on or off"),
        ({"CXXFLAGS": "-O2 -ffast-math"}, "-ffast-math in CXXFLAGS, LDFLAGS or CUDAFLAGS"),
    ],
    ids=["CUDA demanded", "CUDA misspelt", "fast math"],
)
def test_build_fails_clearly(checkout: Path, env: dict[str, str], message: str) -> None:
    env = {"PATH": TOOLS_PATH} | env
    result = run(sys.executable, "setup.py", "build_ext", cwd=checkout, **env)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ("sys.version_info = (3, 9, 18)", "error: llama_fast needs Python >= 3.10"),
        ("sysconfig.get_path = lambda name: '/nowhere'", "error: no Python headers: /nowhere"),
    ],
    ids=["old Python", "no Python headers"],
)
def test_setup_names_what_python_lacks(checkout: Path, patch: str, message: str) -> None:
    code = (
        f"import runpy, setuptools, sys, sysconfig; {patch}; sys.argv = ['setup.py', 'build_ext']"
    )
    result = run(sys.executable, "-c", f"{code}; runpy.run_path('setup.py')", cwd=checkout)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(message)


def build_with(tools: dict[str, str], folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py build_ext in a copy of its own, with shell scripts in place of tools."""
    (folder / "bin").mkdir()
    for name, script in tools.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / "bin" / name).chmod(0o755)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder)
    (folder / "llama_fast").mkdir()
    shutil.copy2(ROOT / "llama_fast" / "__init__.py", folder / "llama_fast")  # holds the version
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return run(sys.executable, "setup.py", "build_ext", cwd=folder, PATH=path, **env)


@pytest.mark.parametrize("jobs", ["3", ""], ids=["three", "unset"])
def test_build_respects_max_jobs_and_says_how_long_it_took(tmp_path: Path, jobs: str) -> None:
    """Replace CMake by a script that records its arguments."""
    tools = {"cmake": f'echo "$*" >> "{tmp_path}/calls"', "ninja": ""}
    done = build_with(tools, tmp_path, MAX_JOBS=jobs)
    assert done.returncode == 0, done.stdout + done.stderr
    (configure, build) = (tmp_path / "calls").read_text().splitlines()
    assert configure.startswith("-S") and "--parallel" not in configure
    assert build.startswith("--build") and build.endswith(
        "--parallel 3" if jobs else f"{sys.implementation.cache_tag}"
    )
    said = (tmp_path / "build" / "native.txt").read_text()
    assert said in done.stdout
    wanted = rf"native build: \d+ s, 0 of 0 files compiled, {jobs or 'ninja.s choice of'} jobs, "
    assert re.match(wanted, said)


@pytest.mark.parametrize("jobs", ["0", "abc", "-2", "1.5"])
def test_build_refuses_a_wrong_max_jobs(tmp_path: Path, jobs: str) -> None:
    done = build_with({"cmake": "exit 9", "ninja": ""}, tmp_path, MAX_JOBS=jobs)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"error: MAX_JOBS: got {jobs!r}, want a number of compiler processes, 1 or more"
    )


NO_PYTHON = 'case "$2" in *version_info*) exit 1;; esac'
NO_VENV = 'case "$2" in *ensurepip*) exit 1;; esac'


@pytest.mark.parametrize(
    ("variable", "script", "message"),
    [
        ("PYTHON", NO_PYTHON, "is not a Python >= 3.10"),
        ("PYTHON", NO_VENV, "apt install python3-venv"),
        ("PYTHON", None, "is not a Python >= 3.10"),
        ("CXX", None, "no C++ compiler"),
    ],
    ids=["Python 3.9", "no venv", "no such Python", "no compiler"],
)
def test_make_fails_in_one_line(
    checkout: Path, tmp_path: Path, variable: str, script: str | None, message: str
) -> None:
    program = tmp_path / "program"
    if script:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    venv = tmp_path / "venv"
    result = run("make", "test", f"{variable}={program}", f"VENV={venv}", cwd=checkout)
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert line.startswith("error: ") and message in line
    assert not venv.exists()


def test_make_installs_once(checkout: Path, tmp_path: Path) -> None:
    stamp = tmp_path / "venv" / ".ready"
    stamp.parent.mkdir()
    stamp.touch()
    stamp.with_name(".weights").touch()
    plan = ("make", "--dry-run", "test", f"VENV={stamp.parent}")
    assert "pip install" not in succeed(*plan, cwd=checkout)
    os.utime(stamp, (0, 0))
    assert "pip install" in succeed(*plan, cwd=checkout)


def test_constraints_pin_every_requirement_within_its_range() -> None:
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {r.name: r for r in map(Requirement, (x for x in lines if not x.startswith("#")))}
    wanted = project["project"]["dependencies"] + project["build-system"]["requires"]
    wanted += sum(project["project"]["optional-dependencies"].values(), [])
    for requirement in map(Requirement, wanted):
        if requirement.name == "llama_fast":
            continue
        (pin,) = pins[requirement.name].specifier
        assert pin.operator == "==" and pin.version in requirement.specifier, requirement
    assert str(pins["torch"].specifier) == "==2.13.0"
