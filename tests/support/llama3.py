"""Make tokenizers for tests: a byte-level one, and Llama 3's own from its published ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from .checkpoints import hf_model

CONTROL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
]

# The shape of Llama 3.1's template, without its tools and dates.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# Renders messages and functions as the template that Meta publishes with Llama 3.1 does, without
# its options (built-in tools, functions in the system message, another date).
TOOL_TEMPLATE = """\
{%- macro head(role) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}{% endmacro %}
{%- set own = messages[0].role == 'system' %}
{{- bos_token + head('system') }}
{{- 'Environment: ipython\\n' if tools is not none else '' }}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n' }}
{{- (messages[0].content | trim if own else '') + '<|eot_id|>' }}
{%- for message in (messages[1:] if own else messages) %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length > 1 %}{{ raise_exception('one call a turn') }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- head('assistant') + '{"name": "' + call.name + '", "parameters": ' }}
        {{- (call.arguments | tojson) + '}' }}
    {%- elif message.role in ('tool', 'ipython') %}
        {{- head('ipython') + (message.content | tojson) }}
    {%- else %}
        {{- head(message.role) }}
        {%- if loop.first and tools is not none %}
            {{- 'Given the following functions, please respond with a JSON for a function call ' }}
            {{- 'with its proper arguments that best answers the given prompt.\\n\\n' }}
            {{- 'Respond in the format {"name": function name, "parameters": dictionary of ' }}
            {{- 'argument name and its value}.Do not use variables.\\n\\n' }}
            {%- for tool in tools %}{{ (tool | tojson(indent=4)) + '\\n\\n' }}{% endfor %}
        {%- endif %}
        {{- message.content | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ head('assistant') }}{% endif %}
"""

RANKS = Path(
    os.environ.get(
        "LLAMA3_TOKENIZER",
        Path(__file__).parents[3] / "shared" / "data" / "llama3_tokenizer.model",
    )
)


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each byte, then Llama 3's first control tokens. Every
    character outside ASCII takes several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL[:11])
    return _finished(tokenizer, chat_template)


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """Return Llama 3's 128,256 tokens, or skip the test: the ranks have their own license."""
    if not RANKS.exists():
        pytest.skip(f"no {RANKS.name}: set LLAMA3_TOKENIZER to Llama 3's tokenizer.model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # or tiktoken leaves a copy behind
        converter = TikTokenConverter(vocab_file=str(RANKS), extra_special_tokens=CONTROL)
        return _finished(converter.converted(), CHAT_TEMPLATE)


def _finished(tokenizer: Tokenizer, chat_template: str | None) -> PreTrainedTokenizerFast:
    bos = CONTROL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|eot_id|>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=True,  # as Llama 3.1's own config says
    )


def save_reciter(folder: Path, tokenizer: PreTrainedTokenizerFast, after: str, text: str) -> Path:
    """Save a checkpoint that, greedily, says text and <|eot_id|> once it has read `after`.

    Attention and feed-forward add nothing, so the head sees the last token's embedding. The head's
    row for a token is the embedding of the token before it. No token may occur twice.
    """
    chain = tokenizer.encode(after + text, add_special_tokens=False)
    start = len(tokenizer.encode(after, add_special_tokens=False)) - 1
    chain = [*chain[start:], tokenizer.eos_token_id]
    assert len(set(chain)) == len(chain), "a token comes twice"
    model = hf_model(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[chain[1:]] = model.model.embed_tokens.weight[chain[:-1]]
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
