"""What the server and its extraction worker say to each other, one JSON line each way."""

from __future__ import annotations

from typing import TypedDict


class Request(TypedDict):
    """Header of a request; `size` bytes of body follow its line."""

    url: str
    content_type: str
    size: int


class Answer(TypedDict):
    """Text, or what was wrong."""

    title: str
    text: str
    error: str
