"""What a SGLang server offers: the one place that knows which version brought what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from actors.engines.sglang.client import ServerRefused, SglangClient
from matpo.config import SglangEngine as Settings

LOOK_DEADLINE_S: Final = 30.0
CHECKSUMS, BRACKET = "/weights_checker", "/begin_weight_update"


@dataclass(frozen=True, slots=True)
class Features:
    """Found by asking: forks and nightly builds make version numbers a poor guide."""

    bracketed: bool
    """Updates by tensor or broadcast stand between /begin_weight_update and /end_weight_update (after 0.5.17)."""
    spans: bool
    """Replies say which version sampled which token; came together with the brackets."""
    checksums: bool
    """The server tells the checksums of its weights."""


async def look(client: SglangClient, settings: Settings) -> Features:
    """Ask the server. Raises `ServerRefused` where it lacks what the settings ask for."""
    try:
        paths = await client.paths(deadline_s=LOOK_DEADLINE_S)
    except ServerRefused as error:
        raise ServerRefused(
            f"the server at {client.url} does not say what it offers ({error}); start it without DISABLE_OPENAPI_DOC"
        ) from error
    found = Features(bracketed=BRACKET in paths, spans=BRACKET in paths, checksums=CHECKSUMS in paths)
    for needed in ("/generate", "/pause_generation", "/continue_generation", "/abort_request"):
        if needed not in paths:
            raise ServerRefused(f"the server at {client.url} has no {needed}; use SGLang 0.5.17 or newer")
    if not found.spans and settings.swap != "abort":
        raise ServerRefused(
            f"the server at {client.url} does not say which weights sampled which token, as SGLang does after 0.5.17;"
            ' upgrade it or set actor.engine.swap = "abort"'
        )
    if settings.attest and not found.checksums:
        raise ServerRefused(
            f"the server at {client.url} has no {CHECKSUMS}; upgrade it or set actor.engine.attest = false"
        )
    return found
