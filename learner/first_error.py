"""Task groups raise groups; whoever waits for one kind of error looks it up here."""

from __future__ import annotations

from typing import TypeVar

Kind = TypeVar("Kind", bound=Exception)


def first_error(group: BaseExceptionGroup[BaseException], *kinds: type[Kind]) -> Kind | None:
    """The first error of one of these kinds anywhere in a group."""
    for error in group.exceptions:
        if isinstance(error, kinds):
            return error
        if isinstance(error, BaseExceptionGroup):
            inner = first_error(error, *kinds)
            if inner is not None:
                return inner
    return None
