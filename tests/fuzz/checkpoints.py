"""Load, run and quantize small checkpoints, each with some mutations.

Whatever the files hold, the answer is a model whose logits are right in shape and, if no weight was
changed, finite; or a refusal that names a file, a field or a tensor. No output folder, open file or
mapped memory is left behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from llama_fast import Llama, reference
from llama_fast.chat import load_tokenizer
from llama_fast.checkpoint.gguf_file import _NAMES, _hf_name
from llama_fast.checkpoint.quantize import quantize_checkpoint

from .drive import REFUSALS, drive

CONFIG = {
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
E4M3 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
FORMATS: dict[str, Any] = {
    "compressed": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head", "re:.*embed.*"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": E4M3}},
    },
    "fbgemm": {
        "quant_method": "fbgemm_fp8",
        "activation_scale_ub": 1200.0,
        "modules_to_not_convert": ["lm_head"],
    },
}
BASES = ("plain", "shards", "gguf", *FORMATS)
CONFIG_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
FILES = (*CONFIG_FILES, "hf_quant_config.json", "model.safetensors", "1.safetensors", "model.gguf")

# A mutation is a tuple: its kind in MUTATIONS, the file, and arguments of plain data.
Mutation = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    base: str = "plain"
    mutations: tuple[Mutation, ...] = ()


# ---- valid checkpoints ----


def weights() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    c = CONFIG
    hidden, inner, width = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * width, c["num_key_value_heads"] * width
    shapes = {"model.norm": (hidden,), "lm_head": (c["vocab_size"], hidden)}
    shapes["model.embed_tokens"] = (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
        layer = {f"self_attn.{name}": shape for name, shape in attention.items()}
        layer |= {"self_attn.o_proj": (hidden, q), "mlp.down_proj": (hidden, inner)}
        layer |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
        layer |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return {
        f"{name}.weight": torch.empty(shape).normal_(std=0.3, generator=random)
        for name, shape in shapes.items()
    }


@lru_cache(maxsize=1)
def bases() -> Path:
    """Return a folder with a folder for each of BASES."""
    top = Path(tempfile.mkdtemp(prefix="llama-fast-fuzz-"))
    held = {name: t.bfloat16() for name, t in weights().items()}
    for base in BASES:
        folder, config, tensors = top / base, dict(CONFIG), dict(held)
        folder.mkdir()
        if base == "gguf":
            write_gguf(folder / "model.gguf")
            continue
        if base in FORMATS:
            config["quantization_config"] = FORMATS[base]
            for name in held:
                if "_proj." in name:
                    q, scale = reference.quantize_fp8(held[name])
                    tensors |= {name: q, f"{name}_scale": scale}
        (folder / "config.json").write_text(json.dumps(config))
        if base == "shards":
            parts = [dict(list(tensors.items())[i::3]) for i in range(3)]
            for i, part in enumerate(parts):
                save_file(part, folder / f"{i}.safetensors")
            weight_map = {n: f"{i}.safetensors" for i, part in enumerate(parts) for n in part}
            index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        else:
            save_file(tensors, folder / "model.safetensors")
    return top


def write_gguf(path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("block_count", "num_hidden_layers"),
        ("feed_forward_length", "intermediate_size"),
        ("head_count", "num_attention_heads"),
        ("head_count_kv", "num_key_value_heads"),
        ("key_length", "head_dim"),
    ):
        getattr(writer, f"add_{key}")(CONFIG[value])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_eos_token_id(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(65 + i) for i in range(39)] + ["AB"])
    writer.add_token_types([1] * 38 + [3, 1])
    writer.add_token_merges(["A B"])
    held = weights()
    for name in _NAMES:
        layers = range(CONFIG["num_hidden_layers"]) if name.startswith(("attn", "ffn")) else (None,)
        for i in layers:
            full = f"{name}.weight" if i is None else f"blk.{i}.{name}.weight"
            writer.add_tensor(full, held.pop(_hf_name(full)).numpy())
    assert not held
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- mutations ----


def is_small(file: Path) -> bool:
    """Return whether an earlier mutation left a file there that this process may read."""
    return file.is_file() and file.stat().st_size < 1 << 20


def set_field(file: Path, path: tuple[Any, ...], value: Any) -> None:
    """Set a value at a path of keys in a JSON file, or delete it for DELETED."""
    held = json.loads(file.read_text()) if is_small(file) else {}
    at = held
    for key in path[:-1]:
        if not isinstance(at.get(key), dict):
            at[key] = {}
        at = at[key]
    if value == DELETED:
        at.pop(path[-1], None)
    else:
        at[path[-1]] = value
    file.unlink(missing_ok=True)
    file.write_text(json.dumps(held))


def set_text(file: Path, text: str) -> None:
    file.unlink(missing_ok=True)
    file.write_text(text, encoding="utf-8", errors="surrogatepass")


def cut(file: Path, share: float) -> None:
    if is_small(file):
        os.truncate(file, int(file.stat().st_size * share))


def set_bytes(file: Path, at: float, content: bytes) -> None:
    """Overwrite bytes in the file's first part, where headers are: at is a share of 2 kB."""
    if is_small(file):
        held = bytearray(file.read_bytes())
        begin = int(at * min(len(held), 2048))
        held[begin : begin + len(content)] = content
        file.write_bytes(held)


def set_kind(file: Path, kind: str) -> None:
    """Replace a file by something else of its name."""
    held = file.read_bytes() if is_small(file) else b""
    file.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "sparse":
        file.write_bytes(held)
        os.truncate(file, 4 << 30)
    elif kind == "link":  # as in the hub's cache
        target = file.with_name("blob")
        target.write_bytes(held)
        file.symlink_to(target)
    elif kind != "missing":
        file.symlink_to({"loop": file.name, "dangling": "nowhere"}.get(kind, kind))


def set_header(file: Path, name: str, field: str, value: Any) -> None:
    """Change a tensor's entry in the header of a safetensors file; field "name" renames it."""
    if not is_small(file):
        return
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    entry = header.pop(name, None) or {"dtype": "F32", "shape": [], "data_offsets": [0, 0]}
    if field == "name":
        header[value] = entry
    elif value != DELETED:
        header[name] = entry | {field: value}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def set_tensor(file: Path, name: str, change: str) -> None:
    """Write a tensor in another dtype or shape, or with other values."""
    from safetensors.torch import load_file

    if is_small(file):
        held = load_file(file)
        held[name] = CHANGES[change](held.get(name, torch.ones(2, 2))).contiguous()
        save_file(held, file)


DELETED = "<deleted>"
MUTATIONS: dict[str, Callable[..., None]] = {
    f.__name__: f for f in (set_field, set_text, cut, set_bytes, set_kind, set_header, set_tensor)
}
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "int": lambda t: t.float().to(torch.int32),
    "fp8": lambda t: t.float().to(torch.float8_e4m3fn),
    "fp64": lambda t: t.double(),
    "fp16": lambda t: t.half(),
    "transposed": lambda t: t.t() if t.dim() == 2 else t[None],
    "longer": lambda t: torch.cat((t, t)),
    "empty": lambda t: t[:0],
    "nan": lambda t: torch.full(t.shape, math.nan),
    "zero": lambda t: torch.zeros(t.shape),
    "huge": lambda t: torch.full(t.shape, 3e38),
    "0-d": lambda t: torch.ones(()),
}
NAMES = ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.k_proj", "model.norm", "lm_head")
TENSORS = (*(f"{n}.weight" for n in NAMES), f"{NAMES[0]}.weight_scale", "x", "model.layers.7.x")
SLOW = "re:" + ".*" * 200 + "x"
VALUES = st.one_of(
    st.sampled_from(
        [None, True, False, 0, 1, -1, 2, 3, 8, 16, 17, 2**31, 2**62, 2**63, 10**9, 10**400]
        + [0.0, -0.0, 0.5, 1.0, 1e-308, 1e308, 1e-40, 1e30, math.nan, math.inf, -math.inf]
        + ["", "abc", "16", "false", "\ud800", "\0", "x" * 3000, [], [1], [1, None], [[]], {}]
        + [[2**70], {"a": 1}, ["re:(.*)*x"], [SLOW], ["re:("], ["re:" + "(" * 300], ["*" * 99]]
        + [["re:(a|a)*$"], ["lm_head"], ["layers.1"], "default", "linear", "yarn", "dynamic"]
        + ["llama3", "fp8", "modelopt", "fbgemm_fp8", [128, 128], DELETED]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
)
FIELDS = [(name,) for name in CONFIG]
FIELDS += [("rope_scaling", name) for name in CONFIG["rope_scaling"]]
FIELDS += [("rope_scaling", n) for n in ("rope_theta", "attention_factor", "beta_fast", "mscale")]
FIELDS += [("rope_parameters",), ("quantization_config",), ("new", "field")]
FIELDS += [
    ("quantization_config", name)
    for name in ("quant_method", "format", "ignore", "modules_to_not_convert", "ignored_layers")
    + ("activation_scale_ub", "weight_block_size", "quant_algo", "config_groups")
]
FIELDS += [
    ("quantization_config", "config_groups", "group_0", *rest)
    for rest in ((), ("weights",), ("weights", "strategy"), ("weights", "num_bits"))
]
OF_INDEX = [("weight_map",), ("metadata",), ("weight_map", "model.norm.weight")]
OF_INDEX += [("weight_map", "x"), ("weight_map", "lm_head.weight")]
SAFETENSORS = st.sampled_from(["model.safetensors", "1.safetensors"])
MUTATION: st.SearchStrategy[Mutation] = st.one_of(
    st.tuples(st.just("set_field"), st.just("config.json"), st.sampled_from(FIELDS), VALUES),
    st.tuples(
        st.just("set_field"),
        st.just("model.safetensors.index.json"),
        st.sampled_from(OF_INDEX),
        VALUES | st.sampled_from(["2.safetensors", "../x.safetensors", "a\0.safetensors"]),
    ),
    st.tuples(
        st.just("set_field"), st.just("generation_config.json"), st.just(("eos_token_id",)), VALUES
    ),
    st.tuples(
        st.just("set_field"),
        st.just("hf_quant_config.json"),
        st.sampled_from([("quantization",), ("quantization", "quant_algo")]),
        VALUES | st.just("FP8"),
    ),
    st.tuples(
        st.just("set_text"),
        st.sampled_from(CONFIG_FILES),
        st.sampled_from(["", "{", "[" * 5000, '{"a":' * 90 + "1" + "}" * 90, "\ufeff{}", "\ud800"])
        | st.sampled_from(["[1]", "1" * 5000, '{"vocab_size": 1e999}', "nul", "null", "{}"]),
    ),
    st.tuples(st.just("cut"), st.sampled_from(FILES), st.floats(0, 1)),
    st.tuples(
        st.just("set_bytes"),
        st.sampled_from(FILES),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=8),
    ),
    st.tuples(
        st.just("set_kind"),
        st.sampled_from(FILES),
        st.sampled_from(["fifo", "folder", "sparse", "link", "missing", "loop", "dangling"])
        | st.sampled_from(["/dev/zero", "/dev/null", "/dev/tty", "/proc/self/mem"]),
    ),
    st.tuples(
        st.just("set_header"),
        SAFETENSORS,
        st.sampled_from(TENSORS),
        st.sampled_from(["name", "dtype", "shape", "data_offsets"]),
        st.sampled_from(["BF16", "F8_E4M3", "I64", "F7", "x", [], [16], [2**62, 4], [-1], [0, 8]])
        | st.sampled_from([[16, 24], [8, 0], [2**64, 0], DELETED, "model.layers.00.x"]),
    ).filter(lambda m: m[3] != "name" or isinstance(m[4], str)),
    st.tuples(
        st.just("set_tensor"),
        SAFETENSORS,
        st.sampled_from(TENSORS),
        st.sampled_from(sorted(CHANGES)),
    ),
)
CASES = st.builds(
    Case, st.sampled_from(BASES), st.lists(MUTATION, min_size=1, max_size=3).map(tuple)
)


# ---- a case ----


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def named(error: BaseException, folder: Path) -> bool:
    """Return whether a message names a file or a tensor of the checkpoint, or a field."""
    fields = {name for path in FIELDS for name in path} | {"num_hidden_layers", "scaling"}
    text = str(error)
    return str(folder) in text or any(x in text for x in (*fields, "model.", "lm_head", "rope"))


def attempt(folder: Path, function: Callable[[], Any]) -> Any:
    """Return the function's result, or None for a refusal that names what it refuses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function()
    except REFUSALS as error:
        if not named(error, folder) or len(str(error)) > 1500:
            raise AssertionError(f"a refusal that names nothing, or too much: {error}") from error
        return None


def check(case: Case) -> int:
    with tempfile.TemporaryDirectory(prefix="llama-fast-case-") as top:
        folder, before = Path(top) / "model", open_files()
        shutil.copytree(bases() / case.base, folder)
        for kind, file, *arguments in case.mutations:
            with contextlib.suppress(Exception):  # where an earlier mutation left what is no JSON
                MUTATIONS[kind](folder / file, *arguments)
        path = folder / "model.gguf" if case.base == "gguf" else folder
        model = attempt(folder, lambda: Llama.from_pretrained(path, torch.float32))
        if model is not None:
            config = model.config
            tokens = torch.arange(min(5, config.vocab_size, config.max_position_embeddings))[None]
            logits = model(tokens)
            assert logits.shape == (*tokens.shape, config.vocab_size)
            kept = ("set_field", "set_text", "set_kind")
            if all(kind in kept for kind, *_ in case.mutations):
                assert logits.isfinite().all(), "logits are not finite"
        del model
        if case.base == "gguf":
            attempt(folder, lambda: load_tokenizer(path))
        out = Path(top) / "new" / "out"
        summary = attempt(folder, lambda: quantize_checkpoint(path, out))
        if summary is None:
            assert os.listdir(top) == ["model"], "an output was left behind"
        else:
            assert attempt(folder, lambda: Llama.from_pretrained(out)) is not None
        assert open_files() == before, "a file was left open"
    return 1


FAILED = (
    Case(mutations=(("set_field", "config.json", ("num_hidden_layers",), 10**9),)),
    Case(mutations=(("set_kind", "config.json", "fifo"),)),
    Case(mutations=(("set_kind", "config.json", "/dev/zero"),)),
    Case(mutations=(("set_kind", "generation_config.json", "fifo"),)),
    Case(mutations=(("set_kind", "config.json", "sparse"),)),
    Case("shards", (("set_kind", "model.safetensors.index.json", "fifo"),)),
    Case(
        "compressed",
        (("set_field", "config.json", ("quantization_config", "ignore"), ["re:(.*)*x"]),),
    ),
    Case(
        "compressed",
        (("set_field", "config.json", ("quantization_config", "ignore"), ["re:" + "(" * 300]),),
    ),
    Case(mutations=(("set_field", "config.json", ("rms_norm_eps",), 10**400),)),
    Case(
        "fbgemm",
        (("set_field", "config.json", ("quantization_config", "activation_scale_ub"), "abc"),),
    ),
    Case(mutations=(("set_field", "config.json", ("eos_token_id",), [2, None]),)),
    Case(mutations=(("set_field", "config.json", ("tie_word_embeddings",), "false"),)),
    Case(mutations=(("set_field", "config.json", ("rope_scaling", "factor"), 1e-308),)),
    Case(mutations=(("set_field", "config.json", ("quantization_config", "quant_method"), []),)),
    Case("gguf", (("set_bytes", "model.gguf", 0.0, b"GGUF\3\0\0\0" + b"\xff" * 16),)),
)


def run(seconds: float, seed: int, count: int | None = None) -> int:
    try:
        check(Case("gguf"))  # and whatever is imported late
        return drive(check, CASES, FAILED, seconds, seed, count)
    finally:
        shutil.rmtree(bases(), ignore_errors=True)
        bases.cache_clear()
