"""A tokenizer for plain texts, without transformers, which takes 0.8 s to import and load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .files import read_json

GENERAL = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that do as tokenizer.json says
_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_TOKENS = tuple(f"{name}_token" for name in _NAMED)
# What tokenizer_config.json may hold without changing a text's ids.
_HARMLESS = {
    *_TOKENS, "added_tokens_decoder", "backend", "chat_template", "clean_up_tokenization_spaces",
    "is_local", "local_files_only", "model_input_names", "model_max_length", "name_or_path",
    "padding_side", "tokenizer_class",
}  # fmt: skip
_OTHERS = ("added_tokens.json", "special_tokens_map.json")  # older files, which may add tokens


class PlainTokenizer:
    """What generate needs of a tokenizer for texts that no chat template renders."""

    def __init__(self, tokenizer: Any, eos: str | None) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = None if eos is None else tokenizer.token_to_id(eos)
        self.added_tokens_decoder = tokenizer.get_added_tokens_decoder()

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer.encode(text).ids}

    def decode(self, ids: list[int], skip_special_tokens: bool = False, **_: Any) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


def load_plain(folder: Path) -> PlainTokenizer | None:
    """Return the tokenizer of a folder, or None where transformers might add to tokenizer.json or
    change it. Raises OSError or ValueError for a file that is not JSON."""
    file, config_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not file.is_file() or not config_file.is_file():
        return None
    config, held = read_json(config_file), read_json(file)
    listed = config.get("added_tokens_decoder")
    if config.get("tokenizer_class") not in GENERAL or not {*config} <= _HARMLESS:
        return None
    if listed is None and any((folder / name).exists() for name in _OTHERS):
        return None
    if held.get("truncation") or held.get("padding") or held.get("post_processor") is None:
        return None
    if (held.get("pre_tokenizer") or {}).get("add_prefix_space"):  # transformers 4 turns it off
        return None
    added = {token["id"]: token for token in held.get("added_tokens", ())}
    for index, token in (listed or {}).items():
        if added.get(int(index)) != {"id": int(index), **token}:
            return None
    special = {token["content"] for token in added.values() if token["special"]}
    named = [_content(config.get(name)) for name in _TOKENS]
    if not {name for name in named if name is not None} <= special:
        return None
    import tokenizers

    return PlainTokenizer(tokenizers.Tokenizer.from_file(str(file)), named[_NAMED.index("eos")])


def _content(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token
