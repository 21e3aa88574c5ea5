"""What may go wrong with a call, by whose fault it is."""

from __future__ import annotations


class ToolFailed(Exception):
    """The server's or the network's fault: masked from the loss."""


class ToolRefused(Exception):
    """The server says the caller's arguments are wrong: the model's fault."""
