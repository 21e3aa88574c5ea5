"""Finds what a user can fix inside the errors of task groups."""

from __future__ import annotations

from matpo.errors import UserError, first_error
from protocols.keys import BadKeys
from protocols.refusals import ChannelError


def user_error(error: BaseException) -> UserError | None:
    """What a user can fix about an error, or about the first such error of a group."""
    kinds = (UserError, ChannelError, BadKeys)
    found = first_error(error, *kinds) if isinstance(error, BaseExceptionGroup) else error
    if isinstance(found, ChannelError | BadKeys):
        return UserError(str(found))
    return found if isinstance(found, UserError) else None
