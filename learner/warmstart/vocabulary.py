"""The quick start's closed vocabulary: a word-level tokenizer whose every name is one token, and its chat template.

The fixed pieces of a Hermes/Qwen tool call are single tokens too, so that a one-million-parameter model spends its
capacity on what to ask. Encoding is additive at message boundaries: each message starts with its role token and ends
with ``<|end|>``.
"""

from __future__ import annotations

import string
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from matpo.datasets import world

PLANNER_PROMPT = "plan"
WORKER_PROMPT = "work"
ALONE_PROMPT = "plan work"
"""Of an agent that does both by itself."""
RECAP = "question : {question} subtask : {subtask}"
"""A worker's first user message."""
INSTRUCTION = "report"
"""The user message after which a worker writes its summary."""
DONE = "done"
"""What a worker says when it has searched enough."""
UNKNOWN_FACT = "{subtask} unknown"
"""A worker's summary when the fact is not among its hits."""

END = "<|end|>"
PAD = "<|pad|>"
UNKNOWN = "<|unk|>"
ROLES = ("system", "user", "assistant", "tool")
SEARCH_CALL = '<tool_call>{"name": "search", "arguments": {"query": "'
WORKER_CALL = '<tool_call>{"name": "worker", "arguments": {"subtask": "'
CALL_END = '"}}</tool_call>'
BOX = "\\boxed{"
BOX_END = "}"
HIT_MARKS = tuple(f"[{rank}]" for rank in range(1, 7))
_EXTRA_WORDS = ". ? : question subtask report done unknown plan work no results error invalid call answer"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] | trim -}}{%- endif -%}"
    "{%- for call in message.get('tool_calls') or [] -%}"
    "{%- set function = call.function if call.function is defined else call -%}"
    '{{- \'<tool_call>{"name": "\' + function.name + \'", "arguments": \' '
    "+ (function.arguments if function.arguments is string else function.arguments | tojson) + '}</tool_call>' -}}"
    "{%- endfor -%}"
    "{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""Every message is ``<|role|>content<|end|>``, so a conversation is the plain concatenation of its messages."""


def words() -> list[str]:
    """Every ordinary word once, in a fixed order: names, relations, the words of the templates, a few fixed ones."""
    found: dict[str, None] = {}
    for names in world.NAMES.values():
        found.update(dict.fromkeys(names))
    found.update((relation.name, None) for relation in world.RELATIONS)
    for template in world.TEMPLATES:
        fields = string.Formatter().parse(template.text)
        found.update((word, None) for literal, *_ in fields for word in literal.split())
    found.update(dict.fromkeys(_EXTRA_WORDS.split()))
    return list(found)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer with its chat template; `<|end|>` is both the end of a message and the end of a sample."""
    special = [PAD, UNKNOWN, END, *(f"<|{role}|>" for role in ROLES)]
    pieces = [SEARCH_CALL, WORKER_CALL, CALL_END, BOX, BOX_END, *HIT_MARKS]
    vocabulary = {token: index for index, token in enumerate([*special, *pieces, *words()])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False) for token in pieces])
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja into ``folder``; returns it."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(str(folder))
    return tokenizer
