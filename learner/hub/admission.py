"""Who is let in: actors with the run's settings, and those who only pull its weights."""

from __future__ import annotations

from dataclasses import dataclass

from learner.hub.journal import Journal
from matpo.config import Config
from protocols.messages import PROTOCOL, Hello, PullHello, Refuse


@dataclass(frozen=True, slots=True)
class Admission:
    """What a newcomer must agree with."""

    config: Config
    journal: Journal
    """Remembers which key every actor id belongs to: the one that said hello under it first."""
    run: str
    tokenizer: str
    """Digest of the tokenizer."""

    def refusal(self, hello: Hello | PullHello, key: str | None, *, draining: str | None) -> Refuse | None:
        """Why the newcomer, who proved to own `key` (None: no keys here), must stay outside; None lets it in.

        `draining`: why the run is ending, if it is. Call it inside a transaction.
        """
        if draining is not None:
            return Refuse(reason="draining", detail=f"the run is ending ({draining})")
        if isinstance(hello, PullHello):
            return hello.refusal(self.run)
        if hello.protocol != PROTOCOL:
            detail = f"actor speaks protocol {hello.protocol}, this hub {PROTOCOL}; install the same matpo on both"
            return Refuse(reason="wrong_protocol", detail=detail)
        if hello.tokenizer_digest != self.tokenizer:
            detail = f"actor has tokenizer {hello.tokenizer_digest}, this run {self.tokenizer}; use the same model.path"
            return Refuse(reason="wrong_config", detail=detail)
        expected = self.config.shared_digest
        if hello.config_digest != expected:
            detail = (
                f"actor has config {hello.config_digest}, this run {expected};"
                " give both the same [episode], [tools], [rewards] and learner.group_size"
            )
            return Refuse(reason="wrong_config", detail=detail)
        return None if key is None else self._bind(hello.actor_id, key)

    def _bind(self, actor_id: str, key: str) -> Refuse | None:
        name = f"key of actor {actor_id}"
        self.journal.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (name, key))
        owner = self.journal.row("SELECT value FROM meta WHERE key = ?", (name,))
        if owner == (key,):
            return None
        detail = f"actor id {actor_id!r} belongs to another key in this run; give this actor another --actor-id"
        return Refuse(reason="wrong_key", detail=detail)
