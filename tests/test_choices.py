"""Which GPU backend a call takes: by chip and class of shapes, from a file of choices."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import llama_fast as lf
from llama_fast import choices, cuda

from .choices import case, chosen, report
from .op_examples import call, watch_kernels

backends = importlib.import_module("llama_fast.backends")  # the package's name is a function
GPU = torch.device("cuda", 0)
NONE_YET = "Triton kernels, the default on GPUs; not yet measured on hardware"
ONE, SEVERAL, ONE_FP8, _ = choices.CLASSES["attention_with_kvcache"]


@pytest.fixture
def on_sm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """on_sm(90, path): as if on that chip, with the CUDA extension built and path's choices."""

    def clear() -> None:
        for cached in (backends._on_gpu, backends._no_chip, backends._warn_once):
            cached.cache_clear()

    def pretend(sm: int, path: Path = choices.PATH, missing: str | None = None) -> None:
        load = choices.load
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: divmod(sm, 10))
        monkeypatch.setattr(choices, "load", lambda: load(path))
        monkeypatch.setattr(cuda, "missing", lambda: missing)
        monkeypatch.setattr(cuda, "EMULATED", False)
        monkeypatch.setattr(backends, "_no_triton", lambda: None)
        clear()

    yield pretend
    clear()


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """On an H200 cuda is faster for one query and for norms, not for several queries."""
    rows = [
        case("attention_with_kvcache", ONE),
        case("attention_with_kvcache", SEVERAL, cuda=3e-3),
        *(case(op, "16-bit") for op in ("rms_norm", "add_rms_norm", "rms_norm_fp8")),
        case("apply_rope", "16-bit", cuda=2e-3),
    ]
    chosen(tmp_path, h200=report(*rows))
    return tmp_path / "choices.json"


def decode(queries: int = 1, d: int = 128, cache: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    q = torch.empty(3, queries, 8, d, dtype=torch.bfloat16)
    return q, torch.empty(1, 1, 2, d, dtype=cache)


def test_without_reports_triton_serves(on_sm: Callable[..., None], tmp_path: Path) -> None:
    chosen(tmp_path)
    on_sm(90, tmp_path / "choices.json")
    for op in choices.CLASSES:
        assert backends._on_gpu(op, 0) == (("triton", NONE_YET), "triton", {})
    assert backends.choose("attention_with_kvcache", GPU, *decode()) == "triton"


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (decode(), "cuda"),
        (decode(queries=2), "triton"),
        (decode(d=64), "triton"),
        (decode(cache=torch.float8_e4m3fn), "triton"),
        ((), "triton"),
    ],
    ids=["one query", "slower there", "not measured", "cache not measured", "shapes unknown"],
)
def test_a_call_is_served_by_its_class(
    on_sm: Callable[..., None], measured: Path, arguments: Any, wanted: str
) -> None:
    on_sm(90, measured)
    assert backends.choose("attention_with_kvcache", GPU, *arguments) == wanted


def test_kernels_are_those_of_the_choice(on_sm: Callable[..., None], measured: Path) -> None:
    on_sm(90, measured)
    x = SimpleNamespace(device=GPU, itemsize=2)
    assert backends.kernels("rms_norm", x) is cuda
    assert backends.kernels("apply_rope", x).__name__ == "llama_fast.triton_backend"
    assert backends.kernels("linear", x) is None


def test_table_says_why(
    on_sm: Callable[..., None], measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_sm(90, measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    table = lf.backends()
    where = "measured on NVIDIA H200 in bench/results/h200, commit abc: "
    assert table["rms_norm"]["cuda"] == (
        "cuda",
        f"{where}cuda 2.00x triton for 16-bit (right and faster in 3 cases), other shapes: triton",
    )
    assert table["apply_rope"]["cuda"] == (
        "triton",
        f"{where}triton 1.00x cuda for 16-bit (cuda is not faster beyond the noise)",
    )
    mixed = table["attention_with_kvcache"]["cuda"]
    assert mixed.backend == "cuda, triton" and f"cuda 2.00x triton for {ONE} (" in mixed.why
    assert f"; triton 1.50x cuda for {SEVERAL} (" in mixed.why
    assert table["attention"]["cuda"] == ("triton", NONE_YET)


def test_another_chip_is_not_measured(on_sm: Callable[..., None], measured: Path) -> None:
    on_sm(89, measured)
    assert backends.choose("rms_norm", GPU, torch.empty(2, dtype=torch.bfloat16)) == "triton"
    wanted = "Triton kernels, the default on GPUs; not yet measured on sm_89 (but on sm_90)"
    assert backends._on_gpu("rms_norm", 0).choice == ("triton", wanted)
    assert "not yet measured on this GPU (but on" in backends._on_gpu("rms_norm", None).choice.why


def test_amd_is_not_taken_for_nvidia(
    on_sm: Callable[..., None], measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gfx90a reports 9.0, as H100 does."""
    on_sm(90, measured)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert backends._on_gpu("rms_norm", 0).by_class == {}


def test_without_the_extension_triton_serves_and_says_so(
    on_sm: Callable[..., None], measured: Path
) -> None:
    on_sm(90, measured, missing="llama_fast._cuda was not built: nvcc was not found")
    assert backends.choose("attention_with_kvcache", GPU, *decode()) == "triton"
    found = backends._on_gpu("attention_with_kvcache", 0).choice
    assert found.backend == "triton" and found.why.startswith(
        "Triton kernels: llama_fast._cuda was not built: nvcc was not found; measured on NVIDIA"
    )
    assert "not built" not in backends._on_gpu("apply_rope", 0).choice.why  # none was chosen


def test_emulated_kernels_serve_no_gpu(
    on_sm: Callable[..., None], measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_sm(90, measured)
    monkeypatch.setattr(cuda, "EMULATED", True)
    assert backends.choose("attention_with_kvcache", GPU, *decode()) == "triton"
    with (
        lf.use_backend("cuda", "rms_norm"),
        pytest.raises(ValueError, match=r"cuda backend cannot serve tensors on cuda \(emulated\)"),
    ):
        backends.choose("rms_norm", GPU)


def test_use_backend_comes_first(on_sm: Callable[..., None], measured: Path) -> None:
    on_sm(90, measured)
    x = torch.empty(2, dtype=torch.bfloat16)
    assert backends.choose("rms_norm", GPU, x) == "cuda"
    with lf.use_backend("triton"):
        assert backends.choose("rms_norm", GPU, x) == "triton"
    with lf.use_backend("cuda", "attention_with_kvcache"):
        assert backends.choose("attention_with_kvcache", GPU, *decode(queries=2)) == "cuda"


# ---- classes ----


def test_every_op_with_gpu_kernels_has_classes_and_one_family() -> None:
    assert set(choices.CLASSES) == set(backends._ON_GPU)
    assert sorted(op for family in choices.FAMILIES for op in family) == sorted(choices.CLASSES)
    for family in choices.FAMILIES:
        assert len({choices.CLASSES[op] for op in family}) == 1


@pytest.mark.parametrize("op", choices.CLASSES)
def test_every_op_hands_over_what_decides_its_class(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 16-bit examples, and of rows that are more or fewer: the class stays."""
    seen: list[Any] = []
    right = backends.kernels

    def look(name: str, *arguments: Any) -> Any:
        if name == op:
            seen.append(choices.shape_class(op, *arguments))
        return right(name, *arguments)

    watch_kernels(monkeypatch, look)
    call(op)
    assert len(seen) == 1 and (seen[0] is None or seen[0] in choices.CLASSES[op])


def rows(op: str, n: int) -> tuple[Any, ...]:
    """Arguments of n rows, sequences or packed tokens."""
    bf16, fp8 = torch.bfloat16, torch.float8_e4m3fn
    if op == "attention_with_kvcache":
        return torch.empty(n, 1, 4, 128, dtype=bf16), torch.empty(n, 8, 1, 128, dtype=bf16)
    if op == "attention":
        return (torch.empty(n, 4, 128, dtype=bf16),)
    if op == "fp8_gemm":
        return torch.empty(n, 64, dtype=fp8), torch.empty(32, 1), bf16
    if op == "fp8_linear":
        return torch.empty(n, 64, dtype=bf16), torch.empty(32, 1), None
    return (torch.empty(n, 64, dtype=bf16),)


@pytest.mark.parametrize("op", choices.CLASSES)
def test_a_class_does_not_depend_on_the_batch(op: str) -> None:
    """But for FP8 products up to 64 rows and beyond, as ops.fp8_linear says."""
    counts = [1, 2, 63, 64, 65, 4096]
    found = [choices.shape_class(op, *rows(op, n)) for n in counts]
    products = op in ("fp8_gemm", "fp8_linear")
    assert None not in found and len(set(found)) == (2 if products else 1)
    if products:
        assert found == [choices.CLASSES[op][n > 64] for n in counts]
    elif op == "attention":
        batched: Tensor = torch.empty(3, 17, 4, 128, dtype=torch.bfloat16)
        assert choices.shape_class(op, batched) == found[0]


def test_fused_products_take_the_class_of_their_parts() -> None:
    """A producer that quantises hands fp8_gemm what fp8_linear would have made."""
    fp8, blocks = torch.float8_e4m3fn, torch.empty(2, 3)
    for n in (1, 64, 65):
        x, a = torch.empty(n, 8, dtype=torch.bfloat16), torch.empty(n, 8, dtype=fp8)
        for scale in (torch.empty(1), torch.empty(8, 1), blocks):
            assert choices.shape_class("fp8_linear", x, scale, None) == choices.shape_class(
                "fp8_gemm", a, scale, torch.bfloat16
            )
    assert choices.shape_class("fp8_linear", torch.empty(1, 8), torch.empty(1), None) is None
    x16 = torch.empty(1, 8, dtype=torch.bfloat16)
    assert choices.shape_class("fp8_linear", x16, torch.empty(1), False) is None


# ---- the file ----


def broken(measured: Path, change: Callable[[Any], None]) -> str:
    content = json.loads(measured.read_text())
    change(content)
    path = measured.with_name("broken.json")
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="broken.json: ") as error:
        choices.load(path)
    assert str(error.value).endswith("`python -m bench --choose` writes it anew")
    return str(error.value)


def of_norms(content: Any, **changes: Any) -> None:
    content["choices"]["sm_90"]["rms_norm"][0].update(changes)


@pytest.mark.parametrize(
    "change, wanted",
    [
        (lambda c: c.update(version=0), "version: got 0, want 1"),
        (lambda c: of_norms(c, backend="cudnn"), "got backend 'cudnn', want triton or cuda"),
        (lambda c: of_norms(c, **{"class": "8-bit"}), "got class '8-bit', want one of 16-bit"),
        (lambda c: of_norms(c, times=-1.0), "got times -1.0, want a positive number"),
        (lambda c: of_norms(c, reports=["a100"]), "KeyError('a100')"),
        (lambda c: of_norms(c, reports=[]), "got reports [], want some of sm_90"),
        (lambda c: of_norms(c, backend="triton"), "want one backend for rms_norm, add_rms_norm"),
        (lambda c: c["choices"]["sm_90"].pop("rms_norm"), "want one backend for rms_norm, add"),
        (lambda c: c["choices"]["sm_90"].update(softmax=[{"class": "x"}]), "got op 'softmax'"),
        (lambda c: c["choices"]["sm_90"]["rms_norm"].append({"class": "16-bit"}), "twice"),
        (lambda c: c.pop("choices"), "KeyError('choices')"),
        (lambda c: c["reports"][0].pop("gpu"), "missing 1 required"),
    ],
)
def test_broken_or_stale_file(measured: Path, change: Callable[[Any], None], wanted: str) -> None:
    assert wanted in broken(measured, change)


def test_no_file_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is missing: the installation is broken"):
        choices.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"version": 1,')
    with pytest.raises(ValueError, match="half.json: Expecting"):
        choices.load(tmp_path / "half.json")


def test_broken_file_stops_the_import(run_python: Callable) -> None:
    code = "import json, torch; json.loads = lambda text: {}; import llama_fast"
    ended = run_python(code, check=False)
    assert ended.returncode == 1 and "choices.json: KeyError('version')" in ended.stderr
