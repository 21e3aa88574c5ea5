"""Finds what a user can fix inside the errors of task groups."""

from __future__ import annotations

from matpo.errors import UserError
from protocols.keys import BadKeys
from protocols.refusals import ChannelError


def user_error(error: BaseException) -> UserError | None:
    """What a user can fix about an error, or about the first such error of a group."""
    if isinstance(error, BaseExceptionGroup):
        return next((found for inner in error.exceptions if (found := user_error(inner)) is not None), None)
    if isinstance(error, ChannelError | BadKeys):
        return UserError(str(error))
    return error if isinstance(error, UserError) else None
