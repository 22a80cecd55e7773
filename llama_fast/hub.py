"""Checkpoints by name: folders and files here, or models of the Hugging Face Hub."""

from __future__ import annotations

import json
import re
from pathlib import Path

_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# Downloaded: files of the repository's own folder. original/ holds the weights a second time.
_SMALL = ["*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*"]
_LEFT_OUT = ["*/*", "consolidated*"]


def resolve(model: str | Path, *, tokenizer: bool = False, weights: bool = False) -> Path:
    """Return the folder or file of a checkpoint.

    model: a path, in which ~ is the home folder, or a str "owner/name" or "owner/name@revision",
    the id of a model on the Hub. A path that exists wins over an id, and what is neither is
    returned as a path. Of a model on the Hub, config.json and, if wanted, the tokenizer and the
    safetensors are taken from the Hub's cache; if it lacks any, they are downloaded, with a
    progress bar on stderr.

    Raises OSError that says what to do if the model is gated, not on the Hub, or not in the cache
    while the Hub cannot be reached.
    """
    path = Path(model).expanduser()
    match = _ID.fullmatch(model) if isinstance(model, str) else None
    if match is None or path.exists() or path.suffix == ".gguf":
        return path
    try:
        from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
    except ImportError:
        raise FileNotFoundError(
            f"{model}: no such folder; to load a model of the Hub: pip install 'llama_fast[hf]'"
        ) from None
    name, revision = match.groups()
    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
        folder = Path(config).parent if isinstance(config, str) else None
        if folder is not None and not _missing(folder, tokenizer, weights):
            return folder
        if not constants.HF_HUB_OFFLINE:
            patterns = [*_SMALL, "*.safetensors"] if weights else _SMALL
            folder = Path(
                snapshot_download(
                    name, revision=revision, allow_patterns=patterns, ignore_patterns=_LEFT_OUT
                )
            )
    except Exception as error:  # of HTTP's library too, which depends on the version
        raise _explained(error, model, name) from None
    missing = ["config.json"] if folder is None else _missing(folder, tokenizer, weights)
    if missing and constants.HF_HUB_OFFLINE:
        raise FileNotFoundError(_unreachable(model, missing[0], "HF_HUB_OFFLINE is set"))
    if missing:
        raise FileNotFoundError(f"{model}: the Hub's model has no {missing[0]}")
    assert folder is not None
    return folder


def _missing(folder: Path, tokenizer: bool, weights: bool) -> list[str]:
    """Return the files that a snapshot lacks: other programs may have cached a part of it."""
    files = ["config.json"]
    if tokenizer:
        files.append("tokenizer.json")
    if weights:
        try:
            files += set(
                map(str, json.loads((folder / _INDEX).read_bytes())["weight_map"].values())
            )
        except FileNotFoundError:
            files.append(_SINGLE)
        except (ValueError, LookupError, TypeError, AttributeError):
            pass  # the loader says what is wrong with the index
    return [file for file in files if not (folder / file).is_file()]


def _explained(error: Exception, model: str | Path, name: str) -> OSError:
    """Return an error that says what to do about a failed download."""
    from huggingface_hub import constants, errors

    token = "`hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{name}"
        return PermissionError(f"{model}: is gated; accept its license at {page}, then {token}")
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{model}: the Hub's model has no such revision")
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"{model}: no such folder here, and no such model on the Hub; if it is private, {token}"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return FileNotFoundError(_unreachable(model, "it", f"{constants.ENDPOINT} does not answer"))
    text = " ".join(str(error).split())
    return OSError(f"{model}: the download failed: {type(error).__name__}: {text}")


def _unreachable(model: str | Path, missing: str, why: str) -> str:
    from huggingface_hub import constants

    return (
        f"{model}: no such folder here, and {missing} is not in the Hub's cache, "
        f"{constants.HF_HUB_CACHE}, while {why}; where there is a network, `hf download "
        f"{str(model).partition('@')[0]}` fetches it"
    )
