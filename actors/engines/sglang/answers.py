"""SGLang's replies to /generate, parsed straight to arrays and checked: token-exact, each token with its version."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Final, Literal

import numpy as np
import orjson

from protocols.records import Floats, Tokens

Finish = Literal["stop", "length", "abort"]
ROWS: Final = b'"output_token_logprobs":[['
BARE: Final = bytes.maketrans(b"n", b"9")
"""Together with the loss of brackets and letters: `[-0.5,7,null],[…` becomes `-0.5,7,9,…`."""
UNVERSIONED: Final = -1
"""Version of weights the server was started with: nobody announced them."""


class BadAnswer(Exception):
    """A reply is not what the interface promises; the message says where."""


class UnknownWeights(BadAnswer):
    """Tokens were sampled with weights nobody announced: the server was restarted behind our back."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """One reply, or one event of a streamed reply."""

    tokens: Tokens
    logprobs: Floats
    total: int
    """Tokens the request has sampled so far; more than `len(tokens)` where a stream sends only what is new."""
    spans: tuple[tuple[int, int, int], ...] | None
    """(version, first, end) over the request's sampled tokens; None from a server that does not report them."""
    version: int
    """Of the weights in use when the reply was written."""
    finish: Finish | None
    """None: more is to come."""
    detail: str
    """Why the server aborted."""
    cached: int
    """Prompt tokens whose keys and values the server still had."""


def parse_answer(content: bytes, *, filtered: bool) -> Answer:
    """Parse the JSON of one reply.

    `filtered`: the request used top-k or top-p, so the log-probabilities are those of the returned sampling support
    (renormalised over it) instead of those over the whole vocabulary. Raises `BadAnswer`.
    """
    try:
        reply = orjson.loads(_with_bare_rows(content))
        meta = reply["meta_info"]
        finish, detail = _finish(meta.get("finish_reason"))
        rows = meta.get("output_token_logprobs") or []
        if rows and isinstance(rows[0], list):
            rows = list(chain.from_iterable(rows))
        # The last event of an aborted stream repeats the last token, though it may have been sent; its rows do not.
        ids = rows[1::3] if finish == "abort" else reply["output_ids"]
        tokens = np.fromiter(ids, dtype=np.int32, count=len(ids))
        if rows[1::3] != ids:
            raise BadAnswer(
                f"the server reports log-probabilities of {len(rows) // 3} tokens for {len(ids)} other ones"
            )
        logprobs = np.fromiter(rows[::3], dtype=np.float32, count=len(ids))
        if logprobs.max(initial=0) > 1:
            raise BadAnswer("the server reports a log-probability that is none")
        if filtered and ids:
            logprobs = _of_support(meta.get("output_token_sampling_logprobs"), len(tokens))
        spans = meta.get("weight_versions")
        return Answer(
            tokens=tokens,
            logprobs=logprobs,
            total=int(meta["completion_tokens"]),
            spans=None
            if spans is None
            else tuple((_version(s["version"]), int(s["start"]), int(s["end"])) for s in spans),
            version=_version(meta.get("weight_version")),
            finish=finish,
            detail=detail,
            cached=int(meta.get("cached_tokens") or 0),
        )
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        shown = content[:200].decode("utf-8", "replace")
        raise BadAnswer(f"the server's reply cannot be read ({type(error).__name__}: {error}): {shown}") from error


def versions_of(answer: Answer, count: int, *, before: int, after: int) -> Tokens:
    """The version that sampled each of a request's first `count` tokens [count].

    `before` and `after` are the versions in use when the request was sent and when it was answered; where they are
    equal a server without spans is good enough. Raises `BadAnswer` where the spans leave a token out, `UnknownWeights`
    where they name weights without a version.
    """
    if answer.spans is None:
        if UNVERSIONED in (before, after):
            raise UnknownWeights("the server sampled tokens with weights nobody announced")
        if before != after:
            raise BadAnswer("this server does not say which weights sampled which token; use actor.engine.swap = abort")
        return np.full(count, after, dtype=np.int32)
    versions, covered = np.empty(count, dtype=np.int32), 0
    for version, first, end in answer.spans:
        if version == UNVERSIONED:
            raise UnknownWeights(f"the server sampled tokens {first} to {end} with weights nobody announced")
        if first != covered:
            break
        versions[first:end], covered = version, end
    if covered < count:
        raise BadAnswer(f"the server's version spans {answer.spans} do not cover {count} tokens")
    return versions


def _with_bare_rows(content: bytes) -> bytes:
    """Write the rows [log-probability, token, null] of a compact reply as one flat list of numbers: hundreds of small
    lists cost more than all the rest of a reply. Anything else, say rows with the tokens' texts, stays as it is.
    """
    found = content.find(ROWS)
    if found < 0:
        return content
    start = found + len(ROWS) - 1
    quote = content.find(b'"', start)
    stop = content.rfind(b"]]", start, quote if quote >= 0 else len(content)) + 1
    if stop <= start:
        return content
    return content[:start] + content[start:stop].translate(BARE, b"[]ul") + content[stop:]


def _of_support(values: object, count: int) -> Floats:
    if not isinstance(values, list) or len(values) != count:
        raise BadAnswer("the server reports no log-probabilities over the support of top-k and top-p")
    return np.array(values, dtype=np.float32)


def _finish(reason: object) -> tuple[Finish | None, str]:
    if reason is None:
        return None, ""
    if not isinstance(reason, dict):
        raise BadAnswer(f"finish_reason is {reason!r}")
    match reason.get("type"):
        case "stop":
            return "stop", ""
        case "length":
            return "length", ""
        case "abort":
            return "abort", str(reason.get("message", ""))
        case other:
            raise BadAnswer(f"finish_reason is {other!r}")


def _version(name: object) -> int:
    text = str(name)
    return int(text) if text.isdecimal() else UNVERSIONED
