"""What a fetch gives: a page, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass


class FetchFailed(Exception):
    """The page could not be had; says why."""


class NotThere(FetchFailed):
    """The server says that there is no such page for us (status 4xx)."""


@dataclass(frozen=True, slots=True)
class Page:
    """What a server answered."""

    url: str
    """After redirects."""
    content_type: str
    body: bytes
    truncated: bool
