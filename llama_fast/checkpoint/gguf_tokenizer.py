"""The tokenizer in a GGUF file, as transformers' fast tokenizer.

transformers reads it too, but slowly, and with faults that change tokens: its version 4.57 takes
another end-of-text token and adds BOS always, and no version knows that Llama 3 merges no word
which is a token by itself. So byte-level tokenizers, those since Llama 3, are made here of the
file's lists, and only SentencePiece's by transformers. Source: llama-vocab.cpp of llama.cpp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .gguf_header import Header

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")  # tokenizer.ggml.pre: how text is split
_SPLITS = (*_LLAMA3, "smollm", "gpt-2")
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens


def load_gguf_tokenizer(path: Path) -> Any:
    """Build the tokenizer. Raises ImportError without transformers or gguf, and ValueError for a
    broken one, or a kind that is not known here."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    header = Header(path)
    model, pre, adds_bos, template = header.values(
        *(f"tokenizer.{key}" for key in ("ggml.model", "ggml.pre", "ggml.add_bos_token")),
        "tokenizer.chat_template",
    )
    if model != "llama" and (model != "gpt2" or pre not in _SPLITS):
        raise ValueError(
            f"{path}: tokenizer.ggml.model: got {model!r} with pre {pre!r}, want 'llama', or "
            f"'gpt2' with one of {', '.join(_SPLITS)}; or copy the original model's "
            "tokenizer.json and tokenizer_config.json beside the file"
        )
    try:
        backend = _byte_level(header, pre) if model == "gpt2" else _sentencepiece(path)
        ids = header.values(*(f"tokenizer.ggml.{key}_token_id" for key in _SPECIAL.values()))
        special = {
            f"{name}_token": backend.id_to_token(i)
            for name, i in zip(_SPECIAL, ids, strict=True)
            if i is not None
        }
        if adds_bos is None:
            adds_bos = model == "llama" or pre in _LLAMA3
        begins = [(special["bos_token"], ids[0])] if adds_bos and ids[0] is not None else []
        backend.post_processor = processors.TemplateProcessing(
            single=[*(token for token, _ in begins), "$A"], special_tokens=begins
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=template,
            clean_up_tokenization_spaces=False,
            **special,
        )
    except Exception as error:  # of many types, with one meaning for a user
        raise ValueError(f"{path}: no tokenizer that can be read: {error}") from None


def _byte_level(header: Header, pre: str) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tokens, merges, types = header.values(
        *(f"tokenizer.ggml.{key}" for key in ("tokens", "merges", "token_type"))
    )
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre in _LLAMA3))
    split = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "gpt-2": [],
    }.get(pre, [pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated")])
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _LLAMA3)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, by_bytes])
    backend.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, types or (), strict=bool(types))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    backend.add_special_tokens([token for token in added if token.special])
    backend.add_tokens([token for token in added if not token.special])
    return backend


def _sentencepiece(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
    ).backend_tokenizer
