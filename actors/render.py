"""Turns messages into tokens and sampled tokens into text: each new message is rendered as what it adds, never again.

A conversation only ever grows. What the policy sampled stays as it was sampled; new messages go through the model's own
chat template, rendered after a stand-in for the assistant's turn, and what follows that stand-in is appended.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise, takewhile
from typing import Literal, cast

import numpy as np
from jinja2 import TemplateError
from pydantic import JsonValue
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from matpo.config import Model
from matpo.errors import UserError
from matpo.model_files import chat_template, model_folder
from protocols.records import Tokens

Speaker = Literal["system", "user", "assistant", "tool"]
ToolSchema = Mapping[str, JsonValue]

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One text at a time needs no thread pool, whose mere existence makes every child process print a warning.

_SLOT = "SL{}OT"
_ASSISTANT = "ASSIS0TANT"
_CACHED_CHARACTERS = 2_000
"""Texts up to this length are kept with their tokens; longer ones (pages, documents) rarely come twice."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat."""

    role: Speaker
    content: str


@dataclass(frozen=True, slots=True)
class Frame:
    """Constant text around the contents of some messages: `texts[0] + content + texts[1] + …`."""

    texts: tuple[str, ...]
    trims: bool
    """The template strips white space around contents."""
    leads: tuple[int, ...] = ()
    """Characters before the second, third … content that open its message rather than close the one before."""

    def fill(self, contents: Sequence[str]) -> tuple[str, list[int]]:
        """The whole text, and the character at which each message but the first begins."""
        parts, starts, length = [self.texts[0]], [], len(self.texts[0])
        for content, after in zip(contents, self.texts[1:], strict=True):
            piece = content.strip() if self.trims else content
            parts += (piece, after)
            length += len(piece) + len(after)
            starts.append(length)
        return "".join(parts), [start - lead for start, lead in zip(starts[:-1], self.leads, strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class Opening:
    """A conversation's first prompt but for the user's message: system message, tool list, generation prompt."""

    tokens: Tokens
    """How every such prompt begins; nothing but a control token ends it, so that what follows cannot change it."""
    frame: Frame
    """The rest."""


_PROBES = ("x", " x", "\nx", "0", ".", "é")
"""Beginnings that join differently with what stands before them, in one tokenizer or another."""


class Renderer:
    """A tokenizer with its chat template. Not tied to a role; safe to share between episodes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if tokenizer.chat_template is None:
            raise UserError("the tokenizer has no chat template; set model.chat_template to a jinja file")
        self._chat = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._ends = frozenset(i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id) if isinstance(i, int))
        control = sorted(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
        self._control = re.compile("|".join(map(re.escape, control))) if control else None
        self._follow: dict[tuple[Speaker, ...], Frame] = {}
        self._encode: Callable[[str], Tokens] = lru_cache(maxsize=8_192)(self._encode_afresh)
        self.has_tool_role = self._renders([Message("user", "Q"), Message("assistant", "A"), Message("tool", "T")])
        self._has_system = self._renders([Message("system", "S"), Message("user", "Q")])
        self._has_runs = self._renders([Message("user", "Q"), Message("assistant", "A"), *[Message("user", "T")] * 2])
        self._closing_text = self._after_assistant([])
        self._closing = self._encode_afresh(self._closing_text)

    @classmethod
    def load(cls, model: Model) -> Renderer:
        """Read the tokenizer of a Hugging Face folder; no torch needed."""
        folder = model_folder(model)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"model.path {str(folder)!r} has no tokenizer that can be read: {reason}") from error
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise UserError(f"model.path {str(model.path)!r} has no tokenizer.json; save its fast tokenizer there")
        template = chat_template(model)
        if template is not None:
            tokenizer.chat_template = template
        return cls(tokenizer)

    def lists_tools(self, tools: Sequence[ToolSchema]) -> bool:
        """Whether the template itself writes `tools` into the prompt."""
        messages = [Message("system", "S"), Message("user", "Q")]
        return bool(tools) and self._chat_text(messages, tools=tools) != self._chat_text(messages)

    def opening(self, system: str, tools: Sequence[ToolSchema]) -> Opening:
        """The opening of a role's conversations; its constant part is tokenised here, once and for all."""
        if system and not self._has_system:
            return self._opening(
                self._frame(lambda c: self._chat_text([Message("user", f"{system}\n\n{c[0].strip()}")], tools=tools), 1)
            )
        head = [Message("system", system)] if system else []
        return self._opening(self._frame(lambda c: self._chat_text([*head, Message("user", c[0])], tools=tools), 1))

    def first(self, opening: Opening, content: str) -> Tokens:
        """Tokens of the first prompt with `content` as the user's message."""
        text, _ = opening.frame.fill([self._tame(content)])
        return np.concatenate([opening.tokens, self._encoded(text)])

    def follow(self, sampled: Tokens, messages: Sequence[Message]) -> list[Tokens]:
        """What `messages` add after an assistant turn that sampled `sampled`: one token array per message.

        The first also closes the turn where sampling stopped before its end token, the last also holds the next
        generation prompt. Where the template refuses one user message after another they become one, in the first.
        """
        if not self._has_runs and len(messages) > 1 and any(message.role == "user" for message in messages):
            merged = Message("user", "\n\n".join(message.content for message in messages))
            return [*self.follow(sampled, [merged]), *[np.empty(0, dtype=np.int32)] * (len(messages) - 1)]
        frame = self._frame_after(tuple(message.role for message in messages))
        text, starts = frame.fill([self._tame(message.content) for message in messages])
        if starts:
            encoding = self._backend.encode(text, add_special_tokens=False)
            ids, firsts = _array(encoding.ids), [start for start, _ in encoding.offsets]
            cuts = [bisect_right(firsts, start - 1) for start in starts]
        else:
            ids, cuts = self._encoded(text), []
        already = self._overlap(sampled, ids)
        edges = [already, *(max(already, cut) for cut in cuts), len(ids)]
        return [ids[a:b] for a, b in pairwise(edges)]

    def said(self, content: str) -> Tokens:
        """An assistant turn that somebody else wrote, up to its closing text."""
        return self._encoded(self._tame(content))

    def text(self, sampled: Tokens) -> str:
        """The message in sampled tokens, without the end of its turn."""
        ids: list[int] = sampled.tolist()
        ids = ids[: len(ids) - self._overlap(sampled, self._closing)]
        while ids and ids[-1] in self._ends:
            ids.pop()
        return self._backend.decode(ids, skip_special_tokens=False)

    def decode(self, tokens: Tokens) -> str:
        """All tokens as text, control tokens included; for people to read."""
        return self._backend.decode(tokens.tolist(), skip_special_tokens=False)

    def _encode_afresh(self, text: str) -> Tokens:
        # The batch form can leave out offsets, a third of the work.
        tokens = _array(self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)
        tokens.setflags(write=False)  # it may be kept and shared
        return tokens

    def _opening(self, frame: Frame) -> Opening:
        """Cut after the last control token before the user's message, unless the tokenizer looks across it."""
        head, *texts = frame.texts
        marks = [] if self._control is None else list(self._control.finditer(head))
        cut = marks[-1].end() if marks else 0
        opening = Opening(self._encode_afresh(head[:cut]), replace(frame, texts=(head[cut:], *texts)))
        for probe in _PROBES:
            whole = self._encode_afresh(frame.fill([probe])[0])
            if not np.array_equal(self.first(opening, probe), whole):
                return Opening(_array(()), frame)
        return opening

    def _encoded(self, text: str) -> Tokens:
        return self._encode(text) if len(text) <= _CACHED_CHARACTERS else self._encode_afresh(text)

    def _tame(self, content: str) -> str:
        """Break up control tokens in contents, so that no tool result or report can speak for another role."""
        if self._control is None:
            return content
        return self._control.sub(lambda match: f"{match[0][0]} {match[0][1:]}", content)

    def _overlap(self, sampled: Tokens, following: Tokens) -> int:
        """How many tokens of the turn's closing text the policy sampled itself."""
        for count in range(min(len(self._closing), len(sampled), len(following)), 0, -1):
            if sampled[-count:].tolist() == following[:count].tolist():
                return count
        return 0

    def _frame_after(self, roles: tuple[Speaker, ...]) -> Frame:
        frame = self._follow.get(roles)
        if frame is None:
            frame = self._frame(
                lambda contents: self._after_assistant([Message(r, c) for r, c in zip(roles, contents, strict=True)]),
                len(roles),
            )
            leads = tuple(
                _common_suffix(text, self._opens(role)) for text, role in zip(frame.texts[1:-1], roles[1:], strict=True)
            )
            frame = self._follow[roles] = replace(frame, leads=leads)
        return frame

    def _opens(self, role: Speaker) -> str:
        """What the template writes between the end of an assistant turn and the content of a message of `role`."""
        return self._frame_after((role,)).texts[0].removeprefix(self._closing_text)

    def _after_assistant(self, messages: Sequence[Message]) -> str:
        """What the template writes after an assistant turn when `messages` follow it (and a generation prompt)."""
        question = Message("user", "Q")
        text = self._chat_text([question, Message("assistant", _ASSISTANT), *messages], generate=bool(messages))
        head, found, tail = text.partition(_ASSISTANT)
        prompt = self._chat_text([question])
        if not found or (messages and not prompt.startswith(head)):
            roles = ", ".join(message.role for message in messages) or "no message"
            raise UserError(
                f"the chat template rewrites what came before an assistant turn when {roles} follows;"
                " give a model.chat_template that only appends"
            )
        return tail

    def _frame(self, render: Callable[[Sequence[str]], str], count: int) -> Frame:
        """Find the constant text around `count` contents, and whether the template trims them."""
        slots = [_SLOT.format(index) for index in range(count)]
        plain = render(slots)
        texts, rest = [], plain
        for slot in slots:
            before, found, rest = rest.partition(slot)
            if not found or slot in rest:
                raise UserError("the chat template drops or repeats a message; give another model.chat_template")
            texts.append(before)
        frame = Frame((*texts, rest), trims=False, leads=(0,) * (count - 1))
        padded = [f"\n {slot} \n" for slot in slots]
        shown = render(padded)
        if shown == frame.fill(padded)[0]:
            return frame
        if shown == plain:
            return replace(frame, trims=True)
        raise UserError("the chat template trims some messages and not others; give another model.chat_template")

    def _renders(self, messages: Sequence[Message]) -> bool:
        """Whether the template accepts these roles in this order and shows the last message."""
        try:
            return messages[-1].content in self._template(messages, (), True)
        except TemplateError:
            return False

    def _chat_text(
        self, messages: Sequence[Message], *, tools: Sequence[ToolSchema] = (), generate: bool = True
    ) -> str:
        try:
            return self._template(messages, tools, generate)
        except TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise UserError(
                f"the chat template cannot render {roles}: {error}; give another model.chat_template"
            ) from error

    def _template(self, messages: Sequence[Message], tools: Sequence[ToolSchema], generate: bool) -> str:
        text = self._chat.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in messages],
            tools=[{"type": "function", "function": dict(tool)} for tool in tools] or None,
            add_generation_prompt=generate,
            tokenize=False,
        )
        return cast(str, text)


def _array(ids: Sequence[int]) -> Tokens:
    return np.fromiter(ids, dtype=np.int32, count=len(ids))


def _common_suffix(one: str, other: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(other), strict=False)))
