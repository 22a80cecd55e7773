"""Tests of the model for lm-evaluation-harness, beside the harness's own for transformers. They are
skipped where lm_eval is not installed, which continuous integration leaves out: 0.5 GB with what it
needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'llama_fast[lm_eval]'")

import llama_fast.lm_eval as adapter  # noqa: E402

from .support.checkpoints import hf_model, save  # noqa: E402
from .support.llama3 import byte_tokenizer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

DOCUMENTS = [
    {
        "question": "Two and two are",
        "choices": [" four", " five", """ a "long" story"""],
        "gold": 0,
    },
    {"question": "Grass is", "choices": [" blue", " green"], "gold": 1},
    {"question": "<|begin_of_text|>Hi", "choices": [" you", " there"], "gold": 1},
    {"question": "x" * 300, "choices": ["y", "x"], "gold": 1},
]
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATE = """
task: local_generate
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["'a", "\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[0]}}"
metric_list: [{metric: word_perplexity}]
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    model = hf_model(max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id)
    folder = save(model, tmp_path_factory.mktemp("checkpoint"))
    tokenizer.save_pretrained(folder)
    return folder


def evaluate(folder: Path, model: str, checkpoint: Path, **options: Any) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    (folder / "data.json").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    for name, task in (("choice", CHOICE), ("generate", GENERATE), ("rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(task.replace("FILE", str(folder / "data.json")))
    return lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": str(checkpoint), "dtype": "float32", **options},
        tasks=["local_choice", "local_generate", "local_rolling"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        device="cpu" if model == "hf" or torch.cuda.is_available() else "cuda:0",  # its default
        batch_size=1 if model == "hf" else 3,  # "hf" looks for BOS in a batch's first text only
        bootstrap_iters=0,
    )


def test_every_response_is_that_of_the_harness_with_transformers(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare three kinds of requests on local data, one longer than the model's positions."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    theirs = evaluate(tmp_path, "hf", checkpoint)
    ours = evaluate(tmp_path, "llama_fast", checkpoint)
    assert {task: len(samples) for task, samples in ours["samples"].items()} == {
        "local_choice": 4,
        "local_generate": 4,
        "local_rolling": 4,
    }
    for task, samples in theirs["samples"].items():
        for expected, got in zip(samples, ours["samples"][task], strict=True):
            if task == "local_generate":
                assert got["resps"] == expected["resps"], got["doc"]
                continue
            for a, b in zip(got["resps"], expected["resps"], strict=True):
                a, b = (a[0], b[0]) if isinstance(a[0], tuple) else (a, b)
                # fp32: 2e-5 of a sum of some hundred logarithms
                assert torch.tensor(float(a[0])).isclose(torch.tensor(float(b[0])), rtol=2e-5), task
                assert a[1:] == b[1:]
    for task, results in theirs["results"].items():
        for name, value in results.items():
            if isinstance(value, str):
                continue
            assert ours["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)


def test_stop_strings_end_the_computation(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapter.LlamaFastLM(str(checkpoint), "float32")
    counts: list[int] = []
    generate = type(model.model).generate

    def counted(self: Any, prompts: Any, count: int, **options: Any) -> Any:
        on_token = options.pop("on_token")
        seen = lambda i, token: (counts.append(token), on_token(i, token))  # noqa: E731
        return generate(self, prompts, count, **options, on_token=seen)

    monkeypatch.setattr(type(model.model), "generate", counted)
    (whole,) = model._generate(["abc"], {"until": [], "max_gen_toks": 40})
    assert len(counts) == 40 or model.tokenizer.eos_token_id in counts
    counts.clear()
    stop = whole[3:5]
    assert model._generate(["abc"], {"until": [stop], "max_gen_toks": 40}) == [whole.split(stop)[0]]
    assert len(counts) < 10
