"""Is the final answer right? Extraction, normalised exact match and token F1, as SQuAD and HotpotQA score them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOX = "\\boxed{"


def boxed(text: str) -> str | None:
    """Content of the last closed `\\boxed{…}`, braces inside included; None if there is none.

    A box that is never closed does not count, and neither does `\\boxed` without braces.
    """
    found = None
    at = text.find(_BOX)
    while at >= 0:
        start = at + len(_BOX)
        end = _closing_brace(text, start)
        if end is not None:
            found = text[start:end].strip()
        at = text.find(_BOX, start)
    return found


def extract_answer(text: str) -> str:
    """The answer in a final message: its last box, else its last `<answer>` tag, else all of it."""
    box = boxed(text)
    if box is not None:
        return box
    tags = _TAG.findall(text)
    return str(tags[-1] if tags else text).strip()


def normalise(answer: str) -> str:
    """Lower case, punctuation and articles dropped, single spaces; lower case alone where that would leave nothing."""
    words = _ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split()
    return " ".join(words or answer.lower().split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the normalised answer equals any normalised reference, else 0.0. An empty answer is never right."""
    given = normalise(answer)
    return float(bool(given) and any(given == normalise(reference) for reference in references))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Best harmonic mean, over the references, of word precision and recall after normalisation."""
    return max((_f1(normalise(answer).split(), normalise(r).split()) for r in references), default=0.0)


def cover(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of the references that at least one answer names: for agents that divide the work, all at once."""
    given = {normalise(answer) for answer in answers}
    wanted = {normalise(reference) for reference in references}
    return len(given & wanted) / len(wanted)


def volunteer(answers: Sequence[str], references: Sequence[str]) -> float:
    """1.0 if exactly one of the agents gives a right answer, else 0.0: the others must leave it to that one."""
    return float(sum(exact_match(answer, references) for answer in answers) == 1)


def _f1(given: Sequence[str], wanted: Sequence[str]) -> float:
    shared = sum((Counter(given) & Counter(wanted)).values())
    if shared == 0:
        return 0.0
    return 2 * shared / (len(given) + len(wanted))


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for at in range(start, len(text)):
        if text[at] == "{":
            depth += 1
        elif text[at] == "}":
            depth -= 1
            if depth == 0:
                return at
    return None
