"""Tests of models named by an id of the Hub: its cache's layout, a Hub served here, and errors of
huggingface_hub's own types."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from llama_fast import Llama, LlamaConfig, chat, hub
from llama_fast.cli import main

from .support.checkpoints import hf_model, save
from .support.llama3 import byte_tokenizer

ID, COMMIT = "meta-llama/Llama-3.1-8B-Instruct", "0123456789abcdef0123456789abcdef01234567"
pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a checkpoint in two shards, with what a repository of Meta's holds beside it."""
    torch.manual_seed(0)
    folder = save(hf_model(), tmp_path_factory.mktemp("hub"), max_shard_size="400KB")
    byte_tokenizer().save_pretrained(folder)
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"a pickle")
    (folder / "original" / "params.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def cache(root: Path, checkpoint: Path, leave_out: str = "", revision: str = "main") -> Path:
    """Lay out a cache as huggingface_hub does, and return the snapshot: its files are links into
    blobs/."""
    repository = root / f"models--{ID.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(COMMIT)
    for file in checkpoint.iterdir():
        if file.is_file() and not (leave_out and file.match(leave_out)):
            held = file.read_bytes()
            blob = repository / "blobs" / hashlib.sha256(held).hexdigest()
            blob.write_bytes(held)
            (snapshot / file.name).symlink_to(Path("../..") / "blobs" / blob.name)
    return snapshot


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty cache, in a working folder that is empty too."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_a_cached_model_loads_everywhere(
    checkpoint: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = cache(home, checkpoint)
    assert hub.resolve(ID, tokenizer=True, weights=True) == snapshot
    assert (snapshot / "config.json").is_symlink()
    assert LlamaConfig.from_pretrained(ID) == LlamaConfig.from_pretrained(checkpoint)
    tokens = torch.tensor([[1, 5, 9]])
    assert torch.equal(Llama.from_pretrained(ID)(tokens), Llama.from_pretrained(checkpoint)(tokens))
    assert chat.load_tokenizer(ID).encode("Hi") == chat.load_tokenizer(checkpoint).encode("Hi")
    Path("text").write_text("Once upon a time")
    for argv in (
        ["generate", "--model", ID, "--prompt", "Hi", "--max-new-tokens", "2", "--speculate", ID],
        ["perplexity", "--model", ID, "--text", "text", "--against", ID],
        ["quantize", ID, "out"],
        ["generate", "--model", "out", "--prompt", "Hi", "--max-new-tokens", "2"],
    ):
        assert main(argv) == 0, capsys.readouterr().err


def test_a_plan_needs_the_config_only(
    checkpoint: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache(home, checkpoint, "*[!g].*")
    found = []
    for name in (ID, str(checkpoint)):
        assert main(["plan", "--model", name, "--context", "64", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)[0] | {"model": ""})
    assert found[0] == found[1]


def test_a_revision(checkpoint: Path, home: Path) -> None:
    snapshot = cache(home, checkpoint, revision="v1.0")
    for revision in ("v1.0", COMMIT):
        assert hub.resolve(f"{ID}@{revision}", weights=True) == snapshot
    with pytest.raises(FileNotFoundError, match=rf"{ID}: no such folder here, and config.json is"):
        hub.resolve(ID)


def test_paths(checkpoint: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder wins over an id, and ~ is the home folder."""
    cache(home, checkpoint)
    Path(ID).parent.mkdir()
    Path(ID).symlink_to(checkpoint)
    assert hub.resolve(ID) == Path(ID)
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert LlamaConfig.from_pretrained(f"~/{checkpoint.name}").vocab_size == 320
    for path in ("none", "./a/b", "a/b/c", "/a/b", "a/", "~/a", "..", "", "a/b.gguf", Path("a/b")):
        assert hub.resolve(path) == Path(path).expanduser()


@pytest.mark.parametrize(
    ("leave_out", "missing", "weights"),
    [
        ("tokenizer.json", "tokenizer.json", False),
        ("model-00002*", "model-00002-of-0000", True),
        ("model*", "model.safetensors", True),
        ("*", "config.json", True),
    ],
)
def test_offline_and_not_all_of_it_cached(
    checkpoint: Path, home: Path, leave_out: str, missing: str, weights: bool
) -> None:
    snapshot = cache(home, checkpoint, leave_out)
    with pytest.raises(FileNotFoundError) as caught:
        hub.resolve(ID, tokenizer=not weights, weights=weights)
    message = str(caught.value)
    assert message.startswith(f"{ID}: no such folder here, and {missing}")
    assert f"is not in the Hub's cache, {home}, while HF_HUB_OFFLINE is set" in message
    assert message.endswith(f"`hf download {ID}` fetches it")
    if missing != "config.json":
        assert hub.resolve(ID) == snapshot  # as much as a config needs is there


def test_without_huggingface_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="a/b: no such folder; to load a model of the Hub"):
        Llama.from_pretrained("a/b")


# ---- a Hub served here ----


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of a Hub. state: answers by status, and the requests."""

    folder: Path
    status = 200
    error = ""
    requests: list[str]

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        type(self).requests.append(f"{self.command} {path}")
        info = path.startswith("/api/models/")
        if self.status != 200 and not (info and self.error == "GatedRepo"):
            return self.answer(
                self.status, b"{}", {"X-Error-Code": self.error} if self.error else {}
            )
        names = [
            str(file.relative_to(self.folder))
            for file in sorted(self.folder.rglob("*"))
            if file.is_file()
        ]
        if "/tree/" in path:
            entries = [self.entry(name) for name in names]
            self.answer(200, json.dumps(entries).encode())
        elif info:
            siblings = [{"rfilename": name} for name in names]
            about = {"id": ID, "sha": COMMIT, "siblings": siblings, "private": False}
            self.answer(200, json.dumps(about).encode())
        else:
            held = (self.folder / path.partition(f"/resolve/{COMMIT}/")[2]).read_bytes()
            tag = hashlib.sha256(held).hexdigest()
            self.answer(200, held, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})

    def entry(self, name: str) -> dict[str, Any]:
        held = (self.folder / name).read_bytes()
        oid = hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()
        return {"type": "file", "path": name, "size": len(held), "oid": oid}

    def answer(self, status: int, held: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(held))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(held)


@pytest.fixture
def served(checkpoint: Path) -> Iterator[tuple[str, type[Hub]]]:
    handler = type("Served", (Hub,), {"folder": checkpoint, "requests": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


@pytest.fixture
def resolve(tmp_path: Path) -> Callable[..., list[str]]:
    """Return resolve(endpoint, *calls): what each call of hub.resolve gives or raises, in a process
    of its own, as huggingface_hub reads the endpoint when it is imported."""

    def run(endpoint: str, *calls: dict[str, Any]) -> list[str]:
        script = (
            "import json, sys, types, importlib.util\n"
            f"spec = importlib.util.spec_from_file_location('hub', {hub.__file__!r})\n"
            "hub = importlib.util.module_from_spec(spec); spec.loader.exec_module(hub)\n"
            "for call in json.loads(sys.argv[1]):\n"
            "    try: print(hub.resolve(**call))\n"
            "    except Exception as error: print(f'{type(error).__name__}: {error}')\n"
        )
        environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", script, json.dumps(calls)],
            env={**os.environ, **environment, "HF_HUB_ETAG_TIMEOUT": "5"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_downloads_what_is_needed_and_once(
    served: tuple[str, type[Hub]], resolve: Callable[..., list[str]], checkpoint: Path
) -> None:
    endpoint, handler = served
    wanted = [
        {"model": ID},
        {"model": ID, "tokenizer": True},
        {"model": ID, "weights": True},
        {"model": ID, "tokenizer": True, "weights": True},
    ]
    snapshots = {*resolve(endpoint, *wanted)}
    (snapshot,) = map(Path, snapshots)
    assert snapshot.name == COMMIT
    got = {path.name for path in snapshot.iterdir()}
    held = {path.name for path in checkpoint.iterdir()}
    assert got == held - {"original", "pytorch_model.bin"}
    loads = [request for request in handler.requests if request.startswith("GET /meta-llama")]
    assert len(loads) == len(got) == len(set(loads))
    first_weight = next(i for i, load in enumerate(loads) if load.endswith(".safetensors"))
    assert all(load.endswith(".safetensors") for load in loads[first_weight:])
    assert torch.equal(
        Llama.from_pretrained(snapshot).weights.embedding,
        Llama.from_pretrained(checkpoint).weights.embedding,
    )
    handler.requests.clear()
    assert {*resolve(endpoint, *wanted)} == snapshots
    assert handler.requests == []


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (
            401,
            "GatedRepo",
            "PermissionError: {id}: is gated; accept its license at {at}/{id}, then",
        ),
        (
            403,
            "GatedRepo",
            "PermissionError: {id}: is gated; accept its license at {at}/{id}, then",
        ),
        (401, "RepoNotFound", "FileNotFoundError: {id}: no such folder here, and no such model on"),
        (404, "RepoNotFound", "FileNotFoundError: {id}: no such folder here, and no such model on"),
        (404, "RevisionNotFound", "FileNotFoundError: {id}: the Hub's model has no such revision"),
    ],
)
def test_what_the_hub_refuses(
    status: int,
    code: str,
    error: str,
    served: tuple[str, type[Hub]],
    resolve: Callable[..., list[str]],
) -> None:
    endpoint, handler = served
    handler.status, handler.error = status, code
    (got,) = resolve(endpoint, {"model": ID, "tokenizer": True, "weights": True})
    assert got.startswith(error.format(id=ID, at=endpoint))
    assert "Revision" in code or "`hf auth login`, or set HF_TOKEN" in got


def test_no_network(resolve: Callable[..., list[str]]) -> None:
    (got,) = resolve("http://127.0.0.1:9", {"model": ID})
    assert "it is not in the Hub's cache" in got and "127.0.0.1:9 does not answer" in got
