"""Tests of the package's structure: no circular imports, a short path from op to kernel."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

import llama_fast
from llama_fast import _cpu
from llama_fast.dispatch import OPS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llama_fast"


def modules() -> dict[str, Path]:
    """Return name -> file of all modules of llama_fast and kernels (installed inside it)."""
    found = {}
    for folder, prefix in ((PACKAGE, "llama_fast"), (ROOT / "kernels", "llama_fast.kernels")):
        for path in (*folder.rglob("*.py"), *folder.rglob("*.pyi")):  # _cpu has only a stub
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((prefix, *parts)).removesuffix(".__init__")] = path
    return found


def imports(name: str, source: str, is_package: bool, known: Iterable[str]) -> Iterator[str]:
    """Yield the known modules that a module imports: at its top, in functions, and for types."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".") if is_package else name.split(".")[:-1]
            base = base[: len(base) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # A name may be a submodule. Otherwise the module itself is imported.
            wanted = [
                f"{module}.{alias.name}" if f"{module}.{alias.name}" in known else module
                for alias in node.names
            ]
        else:
            continue
        yield from (module for module in wanted if module in known and module != name)


def graph() -> dict[str, set[str]]:
    known = modules()
    return {
        name: set(imports(name, path.read_text(), path.name == "__init__.py", known))
        for name, path in known.items()
    }


def circle(edges: Mapping[str, Iterable[str]]) -> list[str] | None:
    """Return the modules along one circle, or None."""
    done: set[str] = set()

    def search(name: str, trail: list[str]) -> list[str] | None:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return None
        for other in sorted(edges[name]):
            if found := search(other, [*trail, name]):
                return found
        done.add(name)
        return None

    return next((found for name in sorted(edges) if (found := search(name, []))), None)


def test_imports_form_no_circle() -> None:
    assert circle(graph()) is None


def test_a_circle_is_found() -> None:
    known = ("p", "p.a", "p.b", "p.c")
    assert list(imports("p.a", "def f():\n    from .b import g", False, known)) == ["p.b"]
    assert list(imports("p", "from .c import h\nfrom . import a", True, known)) == ["p.c", "p.a"]
    assert list(imports("p.c", "import p.a, os\nfrom torch import b", False, known)) == ["p.a"]
    assert circle({"a": ["b"], "b": ["c"], "c": []}) is None
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]


def test_kernels_import_nothing_of_the_package() -> None:
    for name, wanted in graph().items():
        if name.startswith("llama_fast.kernels"):
            assert all(other.startswith("llama_fast.kernels") for other in wanted), name


def test_public_names_are_typed_and_found() -> None:
    """The imports for type checkers and the table for the first use name the same modules."""
    found = {}
    for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level and node.module:
            found |= {alias.name: node.module for alias in node.names}
    assert found == llama_fast._MODULES
    for name in llama_fast.__all__:
        assert getattr(llama_fast, name) is not None and name in dir(llama_fast)


@pytest.mark.parametrize("family", _cpu.families)
def test_a_family_has_one_name_and_a_short_walk(family: str) -> None:
    """Follow an op from lf.rms_norm to the loop: each file names the next."""
    walk = {
        PACKAGE / "__init__.py": f"from .ops.{family} import",
        PACKAGE / "ops" / f"{family}.py": f"on.{family}(",
        PACKAGE / "cpu.py": "for family in _cpu.families",
        ROOT / "csrc" / "params.h": f"OP({family}, ",
        ROOT / "csrc" / "cpu" / f"{family}.cpp": f"void {family}(const",
    }
    assert len(walk) <= 5
    others = {
        ROOT / "csrc" / "cuda" / f"{family}.cu": f"void {family}(const",
        ROOT / "kernels" / f"{family}.py": f"\ndef {family}(",
    }
    for path, leads in {**walk, **others}.items():
        assert leads in path.read_text(), f"{path.name}: {leads}"


MOST_FILES = 12  # that a new family touches
# Files that serve every family and name none, except where one differs from the others.
DERIVED = (
    "llama_fast/_cpu.pyi",
    "llama_fast/cpu.py",
    "llama_fast/cuda.py",
    "llama_fast/dispatch.py",
    "llama_fast/triton_backend.py",
    "csrc/bind.h",
    "csrc/cpu/bindings.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/kernels.h",
    "csrc/cuda/bindings.cpp",
    "csrc/cuda/kernels.h",
    "CMakeLists.txt",
    "Makefile",
)
# Those that are treated apart there: a workspace, classes of shapes, no FP8 cache, AMX.
APART = {"attention", "decode_attention", "linear", "pack_weight", "fp8_gemm", "fp8_linear"}
APART |= {"attention_with_kvcache", "apply_rope_and_append"}


def guide(family: str) -> list[Path]:
    """Return the files that docs/adding_a_kernel.md lists for a family."""
    table = (ROOT / "docs" / "adding_a_kernel.md").read_text().split("| what it gets |")[1]
    return [
        ROOT / name.replace("<op>", family)
        for name in re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    ]


def test_a_new_family_touches_few_files() -> None:
    """Look for rms_norm in the files that the guide lists, and for any family in those that it
    does not list."""
    assert len(guide("rms_norm")) == len({*guide("rms_norm")}) <= MOST_FILES
    for path in guide("rms_norm"):
        assert "rms_norm" in path.read_text(), path
    names = {*OPS, *OPS.values()} - APART
    for name in DERIVED:
        code = re.sub(r'"""(?:.|\n)*?"""|#.*|//.*', "", (ROOT / name).read_text())
        assert not {n for n in names if re.search(rf"\b{n}\b", code)}, name
