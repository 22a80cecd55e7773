"""A model for lm-evaluation-harness: the harness's command with --model llama_fast.

    python -m llama_fast.lm_eval run --model llama_fast \\
        --model_args pretrained=Llama-3.1-8B,quantize=fp8 --tasks hellaswag

This takes all of lm_eval's options. In Python, `import llama_fast.lm_eval` registers the model for
lm_eval.simple_evaluate(model="llama_fast"): the harness finds models of other packages only when
they are imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from .chat import load_tokenizer
from .generation.logprobs import score
from .model import Llama


class _Finished(Exception):
    """Every text of a batch has its stop string."""


@register_model("llama_fast")
class LlamaFastLM(TemplateLM):
    """A checkpoint, with quantize and dtype as for Llama.from_pretrained.

    batch_size: prompts that are generated together. Contexts are cut at the front to max_length
    tokens, by default the model's positions. Tokens, prefixes and stop strings are treated as the
    harness's own model "hf" does.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "bfloat16",
        quantize: str | None = None,
        device: str | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_batch_size: int | None = None,  # of the harness's automatic choice, which "hf" has
    ) -> None:
        super().__init__()
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            device = None  # the command's default is cuda:0
        self.tokenizer: Any = load_tokenizer(pretrained)
        self.model = Llama.from_pretrained(pretrained, getattr(torch, dtype), quantize, device)
        self.max_length = int(max_length or self.model.config.max_position_embeddings)
        self.batch_size = 8 if str(batch_size).startswith("auto") else int(batch_size)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if add_special_tokens is None:  # the tokenizer's choice, unless the text begins with BOS
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        # A model reads max_length tokens, and the last token is not read.
        texts = [(context + new)[-(self.max_length + 1) :] for _, context, new in requests]
        first = [
            max(len(text) - len(new), 1) for text, (_, _, new) in zip(texts, requests, strict=True)
        ]
        sums, greedy = [0.0] * len(texts), [True] * len(texts)
        with tqdm(total=len(texts), desc="loglikelihood", disable=disable_tqdm) as bar:
            left = [len(text) - start for text, start in zip(texts, first, strict=True)]
            for scored in score(self.model, texts, first):
                values = scored.logprobs().double().tolist()
                equal = (scored.logits.argmax(-1) == scored.targets).tolist()
                at = 0
                for i, count in scored.runs:
                    sums[i] += sum(values[at : at + count])
                    greedy[i] &= all(equal[at : at + count])
                    at, left[i] = at + count, left[i] - count
                    bar.update(left[i] == 0)
        answers = list(zip(sums, greedy, strict=True))
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        sums = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            sums.append(sum(value for value, _ in self._loglikelihood_tokens(parts, True)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, sums[-1])
        return sums

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for batch in self._batches(requests):
                settings = requests[batch[0]].args[1]
                contexts = [requests[i].args[0] for i in batch]
                for i, text in zip(batch, self._generate(contexts, settings), strict=True):
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                bar.update(len(batch))
        return texts

    def _batches(self, requests: Any) -> Iterator[list[int]]:
        """Yield indices of requests with the same settings and similar lengths."""
        keys = [(repr(request.args[1]), len(request.args[0])) for request in requests]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        for _, same in groupby(order, key=lambda i: keys[i][0]):
            indices = list(same)
            for at in range(0, len(indices), self.batch_size):
                yield indices[at : at + self.batch_size]

    def _generate(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        options: dict[str, Any] = dict(normalize_gen_kwargs(settings))
        stops, count = options["until"], options["max_gen_toks"]
        room = self.max_length - count
        if room < 1:
            raise ValueError(f"max_gen_toks: got {count}, want less than {self.max_length} tokens")
        prompts = [self.tok_encode(context)[-room:] for context in contexts]
        new: list[list[int]] = [[] for _ in prompts]
        stopped = [False] * len(prompts)

        def collect(i: int, token: int) -> None:
            new[i].append(token)
            if not stopped[i]:
                text = self.tokenizer.decode(new[i], skip_special_tokens=True)
                stopped[i] = token in ends or any(stop in text for stop in stops)
            if all(stopped):
                raise _Finished

        ends = {self.eot_token_id, *self.model.config.eos_token_id}
        with suppress(_Finished):
            self.model.generate(
                prompts,
                count,
                temperature=options.get("temperature", 1.0) if options["do_sample"] else 0.0,
                top_p=options.get("top_p", 1.0),
                top_k=options.get("top_k", 0),
                stop_ids=tuple(ends),
                on_token=collect,
            )
        return [
            postprocess_generated_text(
                self.tokenizer.decode(ids, skip_special_tokens=True), stops, None
            )
            for ids in new
        ]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
