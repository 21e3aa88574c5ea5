"""The one place that keeps secrets to themselves: what a setting shows of its value, and what a text may say.

Values of `env` and `headers`, keys in urls and arguments, and what `${VAR}` stands for are never written to a run's
config, nor printed. Those that look like a secret are also struck from every log, metric, error and tool result.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Final
from urllib.parse import quote

from pydantic import PlainSerializer

HIDDEN: Final = "<hidden>"

_REFERENCE: Final = re.compile(r"\$\{(?:env:)?[A-Za-z_]\w*\}")
_SCHEMES: Final = frozenset({"", "bearer", "basic", "token", "apikey"})
"""What may stand before a reference in a header and is no secret."""
_WORDS: Final = (
    r"(?:[a-z]*key|[a-z]*token|[a-z]*secret|pass|passwd|password|passphrase|pat|credentials?|auth|authorization|bearer"
    r"|cookies?|signature|headers?)"
)
_TELLING: Final = re.compile(rf"(?i)(?:^|[^a-z]){_WORDS}(?:$|[^a-z])")
"""Names of what is a secret: API_KEY, --auth-token; not --tokenizer."""
_FLAG: Final = re.compile(r"--?[A-Za-z][\w-]*")
_TAKES_ASSIGNMENT: Final = frozenset({"-e", "--env"})
_ISSUED: Final = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:sk|pk|rk|tvly|glpat|xox[a-z]|npm|pypi)[-_]|gh[pos]_|github_pat_|hf_|AKIA|AIza)[-\w]{12,}"
)
"""The forms in which well-known services issue keys."""
_USERINFO: Final = re.compile(r"(?<=://)([^/@\s]+)(?=@)")
_QUERY_VALUE: Final = re.compile(r"(?<==)[^&#]+")
_SHORTEST: Final = 6
"""Shorter values are not searched for: they would be found in words."""


def shown(value: str) -> str:
    """What a setting shows of a value that may be secret: references to variables, and nothing else."""
    return value if _REFERENCE.sub("", value).strip().lower() in _SCHEMES else HIDDEN


def shown_url(url: str) -> str:
    """A url without user, password and the values of its query."""
    address, mark, query = url.partition("?")
    address = _USERINFO.sub(lambda match: shown(match[1]), address)
    return address + mark + _QUERY_VALUE.sub(lambda match: shown(match[0]), query)


def shown_arguments(arguments: Sequence[str]) -> list[str]:
    """A command's arguments without those that follow `--api-key` and its like, or look like a key themselves."""
    seen: list[str] = []
    before = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if _FLAG.fullmatch(before) and _TELLING.search(before) and not _FLAG.match(argument):
            seen.append(shown(argument))
        elif equals and (_TELLING.search(name) or before in _TAKES_ASSIGNMENT):
            seen.append(f"{name}={shown(value)}")
        else:
            seen.append(shown_url(_ISSUED.sub(HIDDEN, argument)))
        before = argument
    return seen


def shown_setting(name: str | None, value: object) -> object:
    """What an error quotes of a setting. Known settings hold no keys: `name` is None for them, and only a value that
    looks like a key is hidden. An unknown one may have been meant for a key: `name` is what it was called."""
    if isinstance(value, dict):
        return {key: shown_setting(None if name is None else str(key), inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shown_setting(name, inner) for inner in value]
    if name is not None and _TELLING.search(name):
        return HIDDEN
    return _USERINFO.sub(HIDDEN, _ISSUED.sub(HIDDEN, value)) if isinstance(value, str) else value


def _maybe(show: Callable[[str], str]) -> Callable[[str | None], str | None]:
    return lambda value: None if value is None else show(value)


Secret = Annotated[str, PlainSerializer(shown, when_used="json")]
"""A setting that may be a secret; as JSON it shows only references."""
SecretUrl = Annotated[str | None, PlainSerializer(_maybe(shown_url), when_used="json")]
SecretArguments = Annotated[tuple[str, ...], PlainSerializer(shown_arguments, when_used="json", return_type=list[str])]


class _Veil:
    """Texts to be struck out."""

    def __init__(self) -> None:
        self._texts: set[str] = set()
        self._pattern: re.Pattern[str] | None = None

    def add(self, secret: str) -> None:
        forms = {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], quote(secret, safe="")}
        if not forms <= self._texts:
            self._texts |= forms
            longest_first = sorted(self._texts, key=len, reverse=True)
            self._pattern = re.compile("|".join(re.escape(text) for text in longest_first))

    def over(self, text: str) -> str:
        return text if self._pattern is None else self._pattern.sub(HIDDEN, text)


_ALL, _NAMED = _Veil(), _Veil()


def conceal(name: str, value: str) -> None:
    """Strike this value of a variable, header or setting from every text of this process from now on.

    Paths, short words and addresses are left readable unless their name says that they are secret.
    """
    for secret in {value, value.rsplit(" ", 1)[-1]}:  # `Bearer abc` is told by `abc` too
        telling = bool(_TELLING.search(name)) or _ISSUED.search(secret) is not None
        if len(secret) < _SHORTEST or os.path.exists(secret) or HIDDEN in secret or _REFERENCE.search(secret):
            continue
        if telling:
            _NAMED.add(secret)
        if telling or _looks_random(secret):
            _ALL.add(secret)


def conceal_url(url: str) -> None:
    """The same for user, password and query values of a url."""
    address, _, query = url.partition("?")
    for match in [*_USERINFO.finditer(address), *_QUERY_VALUE.finditer(query)]:
        for part in match[0].split(":"):
            conceal("key", part)


def conceal_arguments(arguments: Sequence[str]) -> None:
    """The same for a command's arguments."""
    for argument, seen in zip(arguments, shown_arguments(arguments), strict=True):
        if seen != argument:
            conceal("key", argument.partition("=")[2] if seen.endswith(f"={HIDDEN}") else argument)


def hide(text: str) -> str:
    """The text as people may read it: in logs, metrics and errors."""
    return _ALL.over(text)


def hide_from_model(text: str) -> str:
    """The text as a model may read it. Only what is certainly secret is struck out: a word of an ordinary setting may
    be part of an answer."""
    return _NAMED.over(text)


def _looks_random(value: str) -> bool:
    if " " in value or "://" in value:
        return False
    return len(value) >= 12 or (len(value) >= 8 and any(character.isdigit() for character in value))
