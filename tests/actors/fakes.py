"""Small real stand-ins: tokenizers built here, an engine that answers by a script, tools that are functions."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import JsonValue
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actors.elsewhere import NOBODY, Elsewhere
from actors.engines.engine import EngineHealth, Generation, LoadReport
from actors.render import Renderer
from actors.scene import Stage, Toolbox
from actors.tools.plane import ToolResult, ToolSpec
from matpo.config import Config, Sampling
from protocols.records import Outcome, StopReason, Task, Tokens, version_of
from protocols.weights import Weights

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN = (
    "{% if tools %}{{ '<|im_start|>system\\n' + messages[0].content + '\\n\\n# Tools\\n<tools>' }}"
    "{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}{{ '\\n</tools><|im_end|>\\n' }}"
    "{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
    "{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' or m.role == 'assistant' %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% elif m.role == 'tool' %}"
    "{% if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
STRICT = (
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' + (m.content | trim) + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TINY = (
    "{%- for m in messages -%}{{- '<|' + m['role'] + '|>' + (m['content'] | trim) + '<|end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def byte_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    """Byte level, with two merges so that joining texts can change tokens; ids of bytes first, then the marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline = "Ċ"
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    vocabulary |= {newline * 2: 256, "th": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(newline, newline), ("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in ("<|im_start|>", "<|im_end|>", "<pad>")])
    return _fast(tokenizer, template, eos_token="<|im_end|>", pad_token="<pad>")


def word_tokenizer(words: str) -> PreTrainedTokenizerFast:
    """The kind the quick start uses: a closed vocabulary, one token a word, marks for roles, TINY template."""
    marks = ["<|pad|>", "<|unk|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    pieces = ['<tool_call>{"name": "worker", "arguments": {"subtask": "', '"}}</tool_call>', "\\boxed{", "}"]
    known = [*marks, *pieces, *dict.fromkeys(words.split())]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(known)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    return _fast(tokenizer, TINY, eos_token="<|end|>", pad_token="<|pad|>")


def _fast(tokenizer: Tokenizer, template: str, **marks: str) -> PreTrainedTokenizerFast:
    build: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    return build(tokenizer_object=tokenizer, chat_template=template, **marks)


def decoded(tokenizer: PreTrainedTokenizerFast, tokens: Tokens) -> str:
    """All tokens as text, marks included."""
    return str(tokenizer.backend_tokenizer.decode(tokens.tolist(), skip_special_tokens=False))


@dataclass(frozen=True)
class Say:
    """What the engine samples: this text, with or without the end token."""

    text: str
    stop: StopReason = "stop"
    new_version: int | None = None
    """The weights change before the second half of the tokens."""


Script = Callable[[str, Sampling], Awaitable[Say | str]]
"""(whole prompt as text, sampling) → what to say; may wait, may raise EngineFailure."""


class ScriptedEngine:
    """Says what its script says, token by token as the tokenizer writes it; log-probability −0.5 each."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, script: Script) -> None:
        self._tokenizer = tokenizer
        self._script = script
        self._version = version_of(lineage=0, step=3)
        self.digests: dict[int, str] = {}
        self._use(self._version)
        self.prompts: list[Tokens] = []
        self.samplings: list[Sampling] = []

    @property
    def version(self) -> int:
        return self._version

    def _use(self, version: int) -> None:
        self._version, self.digests[version] = version, f"digest-{version}"

    async def generate(
        self, tokens: Tokens, sampling: Sampling, *, deadline_s: float, group: str = "", adapter: str | None = ""
    ) -> Generation:
        self.prompts.append(tokens)
        self.samplings.append(sampling)
        said = await self._script(decoded(self._tokenizer, tokens), sampling)
        said = Say(said) if isinstance(said, str) else said
        ids = self._tokenizer.encode(said.text, add_special_tokens=False)
        ids = [*ids, self._tokenizer.eos_token_id] if said.stop == "stop" else ids
        stop = said.stop
        if len(ids) > sampling.max_tokens:
            ids, stop = ids[: sampling.max_tokens], "length"
        versions = np.full(len(ids), self._version, dtype=np.int32)
        if said.new_version is not None:
            self._use(said.new_version)
            versions[len(ids) // 2 :] = said.new_version
        return Generation(np.array(ids, dtype=np.int32), np.full(len(ids), -0.5, dtype=np.float32), versions, stop)

    async def load(self, weights: Weights, *, version: int, file: Path | None = None) -> LoadReport:
        self._use(version)
        return LoadReport(version, self.digests[version], 0.0)

    async def health(self) -> EngineHealth:
        return EngineHealth("ready", "scripted", 0, 0, 0)


def result(text: str, outcome: Outcome = "ok", *, tool: str = "search") -> ToolResult:
    """An answer of the server `<tool>_server`."""
    return ToolResult(text, outcome, f"{tool}_server", tool, 0.0, len(text))


Tool = Callable[[Mapping[str, JsonValue]], Awaitable[str | ToolResult]]


@dataclass
class FakeTools:
    """Tools that are async functions of their arguments; `required` strings are their parameters."""

    tools: Mapping[str, tuple[Tool, tuple[str, ...]]] = field(default_factory=dict)
    seen: list[tuple[str, dict[str, JsonValue]]] = field(default_factory=list)

    def specs(self, patterns: Sequence[str], *, hidden: frozenset[str] = frozenset()) -> Sequence[ToolSpec]:
        return [self._spec(name, hidden) for name in sorted(self.tools) if name in patterns]

    def _spec(self, name: str, hidden: frozenset[str]) -> ToolSpec:
        names = [n for n in self.tools[name][1] if n not in hidden]
        properties: dict[str, JsonValue] = {n: {"type": "string"} for n in names}
        schema: dict[str, JsonValue] = {"type": "object", "properties": properties, "required": [*names]}
        return ToolSpec(name, f"{name}_server", name, f"The {name} tool.", schema)

    def episode(self) -> FakeTools:
        return self

    def close(self) -> None:
        """Nothing belongs to one episode."""

    async def call(
        self, name: str, arguments: Mapping[str, JsonValue], *, fixed: Mapping[str, JsonValue]
    ) -> ToolResult:
        merged = {**arguments, **fixed}
        self.seen.append((name, merged))
        answer = await self.tools[name][0](merged)
        return answer if isinstance(answer, ToolResult) else result(answer, tool=name)


def settings(roles: Mapping[str, Mapping[str, object]], **episode: object) -> Config:
    """A config with these roles, and a credit that suits; the first is the root, where the workflow has one."""
    if not isinstance(episode.get("workflow"), dict):
        episode = {"root": next(iter(roles)), **episode}
    return Config.model_validate(
        {
            "model": {"path": "unused"},
            "data": {"train": {"kind": "world"}, "evaluation": {"kind": "world"}},
            "actor": {"engine": {"max_context_tokens": 100_000}},
            "episode": {"roles": roles, **episode},
            "learner": {"credit": "counterfactual" if "replay" in episode else "broadcast"},
        }
    )


def stage(
    config: Config,
    script: Script,
    *,
    tools: Toolbox | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    elsewhere: Elsewhere = NOBODY,
) -> tuple[Stage, ScriptedEngine]:
    """A stage with a scripted engine; byte-level ChatML unless told otherwise."""
    tokenizer = tokenizer or byte_tokenizer()
    engine = ScriptedEngine(tokenizer, script)
    renderer = Renderer(tokenizer)
    tools = tools or FakeTools()
    made = Stage(config, engine=engine, tools=tools, renderer=renderer, actor_id="actor-0", elsewhere=elsewhere)
    return made, engine


def task(question: str = "Who?", answer: str = "Ann", **more: dict[str, JsonValue]) -> Task:
    return Task.make(question, (answer,), more.get("metadata"), None)


def call(name: str, **arguments: JsonValue) -> str:
    """A call in the JSON form."""
    body = ", ".join(f'"{key}": "{value}"' for key, value in arguments.items())
    return f'<tool_call>{{"name": "{name}", "arguments": {{{body}}}}}</tool_call>'


def last_message(prompt: str) -> str:
    """The last message before the generation prompt of a ChatML prompt."""
    found: list[str] = re.findall(r"<\|im_start\|>\w+\n(.*?)<\|im_end\|>", prompt, flags=re.DOTALL)
    return found[-1]
