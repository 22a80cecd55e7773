"""Tests of checkpoints that try to hang a reader, to exhaust its memory, or to change under it."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_fast import Llama, LlamaConfig, RopeScaling, rope_table
from llama_fast.chat import load_tokenizer
from llama_fast.checkpoint import load as load_module
from llama_fast.checkpoint import quantize as quantize_module
from llama_fast.checkpoint.formats import Format, parse
from llama_fast.checkpoint.patterns import Patterns
from llama_fast.checkpoint.quantize import quantize_checkpoint

from ..support.checkpoints import LINEARS, edit_json, hf_model, quantized, save, tensors, write
from ..support.llama3 import byte_tokenizer

# A checkpoint that hangs its reader hangs it for longer than this on any machine.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(60)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(hf_model(), tmp_path / "model")


# ---- sizes in the config ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: got 1000000000, but .* 3 layers"),
        ({"num_hidden_layers": 4}, "num_hidden_layers: got 4, but .* 3 layers"),
        ({"vocab_size": 2**62}, "embed_tokens.weight: got shape"),
        ({"hidden_size": 2**62}, "embed_tokens.weight: got shape"),
        ({"intermediate_size": 2**62}, "gate_proj.weight: got shape"),
        ({"num_attention_heads": 2**62}, "q_proj.weight: got shape"),
        ({"num_attention_heads": 2**62, "num_key_value_heads": 2**62}, "q_proj.weight: got shape"),
        ({"head_dim": 2**62}, "head_dim: got"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_sizes_are_compared_with_the_file_first(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    edit_json(folder / "config.json", **change)
    with pytest.raises(ValueError, match=message):
        Llama.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(folder, folder.parent / "out")


def test_a_header_larger_than_any_models(folder: Path) -> None:
    file = folder / "model.safetensors"
    with open(file, "wb") as f:
        f.write((1 << 30).to_bytes(8, "little"))
        f.truncate((1 << 30) + 8)
    with pytest.raises(ValueError, match="model.safetensors: not a valid .* a header of"):
        Llama.from_pretrained(folder)


# ---- what is no ordinary JSON file ----


def fifo(file: Path) -> None:
    os.mkfifo(file)


def zeros(file: Path) -> None:
    file.symlink_to("/dev/zero")


def sparse(file: Path) -> None:
    with open(file, "wb") as f:
        f.truncate(4 << 30)


def deep(file: Path) -> None:
    file.write_text('{"a":' * 500 + "1" + "}" * 500)


ODD = {
    fifo: "not a regular file",
    zeros: "not a regular file",
    Path.mkdir: "not a regular file",
    sparse: "got 4294967296 bytes, want at most",
    deep: "not valid JSON",
}


@pytest.mark.parametrize("make", ODD, ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "model.safetensors.index.json"]
    + ["hf_quant_config.json", "tokenizer.json"],
)
def test_json_files_are_regular_and_small(
    folder: Path, name: str, make: Callable[[Path], None]
) -> None:
    byte_tokenizer().save_pretrained(folder)
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    if name == "tokenizer.json":
        message = ODD[make] if make is not deep else "no tokenizer"  # transformers reads it
        with pytest.raises((OSError, ValueError), match=message):
            load_tokenizer(folder)
        return
    with pytest.raises((OSError, ValueError), match=f"{name}: {ODD[make]}"):
        Llama.from_pretrained(folder)


@pytest.mark.parametrize("make", [fifo, zeros], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
def test_weight_files_are_regular(folder: Path, name: str, make: Callable[[Path], None]) -> None:
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    path = folder / name if name.endswith(".gguf") else folder
    with pytest.raises(OSError, match=f"{name}: not a "):
        Llama.from_pretrained(path)


# ---- regular expressions ----

SLOW = ["(.*)*x", "(a|a|b|.)*$x", "(.*.*.*.*.*.*)*x", ".*" * 200 + "x", "(((((.*)*)*)*)*)*x"]
SLOW += ["(" * 200 + "." + ")*" * 200 + "x", "((.{1,900}){1,900}){1,900}x", "(?=(.*)*x)" * 50]
REFUSED = {
    "(": "unterminated subpattern",
    "(" * 200 + ")" * 200: "too many groups",
    "a" * 2000: "longer than",
    "a{99999999999}": "too large",
    r"(a)\1": "groupref is not supported",
    "(?<=a)b": "assert is not supported",
    "(?i:a)": "subpattern is not supported",
    "(?i)a": "flags are not supported",
    r"\b": "at is not supported",
}


@pytest.mark.parametrize("regex", [*SLOW, *REFUSED], ids=lambda regex: regex[:20])
def test_no_regex_of_a_checkpoint_hangs(folder: Path, regex: str) -> None:
    """Require an answer, whether the expression matches, takes too long or is refused."""
    ignore = [f"re:{regex}"] * 3
    quantized(folder, "row", "weight_scale", quant_method="compressed-tensors", ignore=ignore)
    try:
        Llama.from_pretrained(folder)
    except ValueError as error:
        assert "quantization_config" in str(error)
    if regex in REFUSED:
        with pytest.raises(ValueError, match=f"ignore: '.*{REFUSED[regex]}"):
            Llama.from_pretrained(folder)


MODULES = [f"model.layers.{i}.{name}" for i in (0, 12, 125) for name in ("mlp.up_proj", "norm", "")]
MODULES += ["lm_head", "", "model.embed_tokens\n"]


@pytest.mark.parametrize(
    "regex",
    [".*lm_head", r"model\.layers\.\d+\.mlp\..*", r".*\.(q|k|v|up)_proj$", "^(?!.*mlp).*layers"]
    + [r"[^.]+\.layers\.1[0-9]{1,2}\.", "model.*tokens$", r"\w+\Z", "", "(?:a|b)|.*norm$"]
    + [r"model\.layers\.(?:[02468]|12)\.", r".*?\.\S+\.[a-l]+_", r"\Amodel", "[a-k]*m"],
)
def test_a_regex_matches_as_pythons(regex: str) -> None:
    for name in MODULES:
        assert Patterns({"x": regex}).match(name) == bool(re.match(regex, name)), name


ATOMS = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\w", r"\d", r"\.", "^", "$", "[a-c_]"])
REGEXES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{2,}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
        st.tuples(st.sampled_from(["(?=", "(?!"]), inner).map(lambda pair: f"{pair[0]}{pair[1]})"),
    ),
    max_leaves=6,
)


@settings(max_examples=500, deadline=None)
@given(REGEXES, st.text("ab.c1_\n", max_size=7))
def test_any_regex_matches_as_pythons(regex: str, text: str) -> None:
    assert Patterns({"x": regex}).match(text) == bool(re.match(regex, text))


def test_a_long_list_is_no_long_wait() -> None:
    """Try 100,000 names for the 882 linears of the 405B. Formats are copied, as transformers does
    with what holds them."""
    excluded = tuple(f"layers.{i}.q" for i in range(100_000)) + ("layers.*.x", "re:.*none")
    form = copy.deepcopy(Format(("weight_scale",), False, excluded))
    names = [f"model.layers.{i}.self_attn.{name}" for i in range(126) for name in LINEARS[:7]]
    assert not any(map(form.excludes, names))
    assert copy.deepcopy(form).excludes("model.layers.7.q") and form.excludes("layers.1.x")
    many = {"quant_method": "fp8", "ignored_layers": [f"re:{i}.*x" for i in range(100_000)]}
    with pytest.raises(ValueError, match="ignored_layers: 100000 expressions"):
        parse(many)


# ---- numbers ----


@pytest.mark.parametrize("bound", ["abc", float("nan"), -1, 0, True, 10**400, 1e-300, [1.0]])
def test_a_bound_on_activations_is_a_positive_number(bound: Any) -> None:
    with pytest.raises(ValueError, match="quantization_config.activation_scale_ub: got"):
        parse({"quant_method": "fbgemm_fp8", "activation_scale_ub": bound})
    form = parse({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200})
    assert form is not None and form.activation_bound == 1200.0


@pytest.mark.parametrize("method", [["fp8"], {}, None, 7])
def test_the_name_of_a_format_is_a_string(method: Any) -> None:
    with pytest.raises(ValueError, match="quantization_config.quant_method: got"):
        parse({"quant_method": method})


def test_groups_are_an_object() -> None:
    with pytest.raises(ValueError, match="config_groups: got list"):
        parse({"quant_method": "compressed-tensors", "config_groups": [1]})


@pytest.mark.parametrize(
    ("theta", "scaling"),
    [(10000.0, RopeScaling(factor=3e38)), (1e38, RopeScaling(factor=1e9))],
    ids=["factor", "both"],
)
def test_a_rope_table_needs_frequencies(theta: float, scaling: RopeScaling | None) -> None:
    with pytest.raises(ValueError, match="frequencies or factor are zero or not finite"):
        rope_table(theta, 4, head_dim=64, scaling=scaling)


def test_degenerate_frequencies_are_refused_before_loading(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e30, "factor": 3e38}
    edit_json(folder / "config.json", rope_parameters=yarn, rope_scaling=None)
    monkeypatch.setattr(load_module, "_Checkpoint", None)
    with pytest.raises(ValueError, match="frequencies or factor"):
        Llama.from_pretrained(folder)


def test_numbers_are_named_with_their_file(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, null]}')
    with pytest.raises(ValueError, match=r"config.json: eos_token_id: got None"):
        LlamaConfig.from_pretrained(folder)


# ---- files that change while they are read ----


def replaced(file: Path, other: bytes) -> None:
    aside = file.with_suffix(".new")
    aside.write_bytes(other)
    os.replace(aside, file)


def overwritten(file: Path, other: bytes) -> None:
    file.write_bytes(other)


@pytest.mark.parametrize("change", [replaced, overwritten], ids=lambda change: change.__name__)
@pytest.mark.parametrize("when", ["after the headers", "at the end"])
@pytest.mark.parametrize("read", ["load", "quantize"])
def test_a_file_that_changes_is_noticed(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path, bytes], None],
    when: str,
    read: str,
) -> None:
    """Put other tensors of the same dtypes in the file's place: its size stays the same."""
    file, out = folder / "model.safetensors", folder.parent / "out"
    held = tensors(folder)
    write(folder, {name: -t for name, t in held.items()})
    other = file.read_bytes()
    write(folder, held)
    assert len(other) == file.stat().st_size

    def changing(function: Callable[..., Any]) -> Callable[..., Any]:
        def after(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            change(file, other)
            return result

        return after

    module = load_module if read == "load" else quantize_module
    last = "assemble" if read == "load" else "describe"
    name = "check" if when == "after the headers" else last
    original = getattr(module, name)
    if name == "assemble":
        calls = iter([original, changing(original)])  # the first is check's
        monkeypatch.setattr(module, name, lambda *a, **k: next(calls)(*a, **k))
    else:
        monkeypatch.setattr(module, name, changing(original))
    with pytest.raises(OSError, match=r"model\.safetensors: was replaced or written to"):
        if read == "load":
            Llama.from_pretrained(folder)
        else:
            quantize_checkpoint(folder, out)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_an_index_names_files_that_are_there(tmp_path: Path) -> None:
    folder = save(hf_model(), tmp_path, max_shard_size="100KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (folder / index["weight_map"]["model.norm.weight"]).unlink()
    with pytest.raises(FileNotFoundError, match="a shard of the checkpoint is missing"):
        Llama.from_pretrained(folder)
