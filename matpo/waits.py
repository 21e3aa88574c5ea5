"""Every wait that can last: its name, its limit and what would help, in one place for hub, trainer and actors.

A wait that passes its limit is a stall. It is logged once by the process that sees it, and shown by `matpo doctor`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import structlog

from protocols.messages import Wait

log: structlog.stdlib.BoundLogger = structlog.get_logger()

WaitName = Literal[
    # seen by the hub
    "first_weights", "actors", "actor", "trainer",
    # by the trainer, or by the hub in its place
    "batch", "step", "publish", "checkpoint", "hub_answer",
    # by an actor
    "hub", "leases", "outbox", "weights", "weights_turn", "weights_bytes", "weights_loaded", "engine",
    "engine_server", "tool_server", "engine_start", "tool_server_start",
    # by the doctor
    "hub_status",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Named:
    """What is true of every wait of one name. `{…}` in the texts is filled in by whoever waits."""

    what: str
    limit_s: float
    remedy: str


WAITS: Final[Mapping[WaitName, Named]] = {
    "first_weights": Named(
        "the first weights",
        60.0,
        "the trainer loads its model; if this lasts, see logs/trainer.jsonl and logs/learner.out",
    ),
    "actors": Named("an actor", 60.0, "start matpo-actor with --hub and the address in hub.json"),
    "actor": Named(
        "a heartbeat of {actor}",
        20.0,
        "frozen, overloaded or cut off: see logs/{actor}.jsonl; its leases are handed out again after hub.lease_s",
    ),
    "trainer": Named(
        "a sign of life of the trainer",
        20.0,
        "it loads its model, or is frozen (it last waited for {stage}): see logs/trainer.jsonl and logs/learner.out,"
        " or kill it: the learner starts another",
    ),
    "batch": Named(
        "the batch of step {step}",
        60.0,
        "{have} of {need} groups are complete; start more actors or raise freshness.eta",
    ),
    "step": Named(
        "step {step} to be computed",
        300.0,
        "if it never ends, see logs/trainer.jsonl; if it is only slow, lower learner.micro_batch_tokens",
    ),
    "publish": Named("the weights of step {step} to be written", 60.0, "see the disk of RUN/weights"),
    "checkpoint": Named("the checkpoint of step {step} to be written", 300.0, "see the disk of RUN/checkpoints"),
    "hub_answer": Named(
        "an answer of the hub", 20.0, "the hub is frozen or restarting: see logs/hub.jsonl and `matpo doctor`"
    ),
    "hub": Named(
        "a sign of life of the hub",
        20.0,
        "the hub is frozen, restarting or cut off: see its logs/hub.jsonl; trees are kept and sent when it is back",
    ),
    "leases": Named("leases", 60.0, "the trainer is busy or the hub's admission is full; raise freshness.eta"),
    "outbox": Named(
        "the hub to acknowledge trees (outbox or its disk full)",
        60.0,
        "start the hub, free disk space below --state, or raise actor.outbox_limit_trees",
    ),
    "weights": Named("weights of version {version}", 60.0, "see the trainer's log and the actor's weight follower"),
    "weights_turn": Named(
        "another actor of this machine that brings weights {version}",
        60.0,
        "it is taken over when it stalls; see {folder}",
    ),
    "weights_bytes": Named("the bytes of weights {version}", 60.0, "see the hub's log and the network"),
    "engine": Named(
        "a token of the engine",
        30.0,
        "{running} requests run; it is frozen or overloaded: {detail}; see logs/{actor}*",
    ),
    "weights_loaded": Named("the engine to load weights {version}", 60.0, "see the engine's log"),
    "engine_server": Named(
        "an answer of engine server {server}",
        20.0,
        "others take its requests; after 60 s without an answer it is killed and started again; see logs/{actor}*",
    ),
    "tool_server": Named(
        "an answer of tool server {server}",
        20.0,
        "its calls fail in time and it is replaced after three; see the server's own log, or raise its timeout_s",
    ),
    "engine_start": Named("its engine to start", 300.0, "it loads the model; see logs/{actor}*"),
    "tool_server_start": Named(
        "the first answer of tool server {server}",
        20.0,
        "after its start_timeout_s it is killed and started again, twice; see the server's own log",
    ),
    "hub_status": Named(
        "the hub",
        10.0,
        "process {pid} is frozen or overloaded; see logs/hub.jsonl, or `kill -9 {pid}`: the learner starts another",
    ),
}


@dataclass(frozen=True, slots=True)
class Condition:
    """Something that is being waited for at this moment."""

    name: WaitName
    what: str
    remedy: str
    who: str | None
    """None: the process whose book it is."""
    since_s: float | None
    """Since this monotonic moment; None: since it was first named."""


def waiting(name: WaitName, *, who: str | None = None, since_s: float | None = None, **details: str | int) -> Condition:
    """The condition `name` as `who` meets it, its texts filled in with `details`."""
    named = WAITS[name]
    return Condition(name, named.what.format(**details), named.remedy.format(**details), who, since_s)


class WaitBook:
    """Remembers since when each condition has held without a break."""

    def __init__(self, who: str) -> None:
        """`who` waits where a condition names nobody else."""
        self._who = who
        self._since: dict[tuple[str, str], float] = {}
        self._reported: set[tuple[str, str]] = set()

    def update(self, conditions: Iterable[Condition], now_s: float) -> tuple[Wait, ...]:
        """The waits of this moment; conditions not named any more are over."""
        current = {(condition.who or self._who, condition.what): condition for condition in conditions}
        self._since = {
            key: self._since.get(key, now_s) if condition.since_s is None else condition.since_s
            for key, condition in current.items()
        }
        return tuple(
            Wait(
                name=condition.name,
                who=key[0],
                what=condition.what,
                since_s=round(now_s - self._since[key], 3),
                limit_s=WAITS[condition.name].limit_s,
                remedy=condition.remedy,
            )
            for key, condition in current.items()
        )

    def new_stalls(self, waits: Iterable[Wait]) -> list[Wait]:
        """Of all the waits of this moment, those that passed their limit since they were last asked for here."""
        stalls = {(wait.who, wait.what): wait for wait in waits if wait.since_s > wait.limit_s}
        fresh = [wait for key, wait in stalls.items() if key not in self._reported]
        self._reported = set(stalls)
        return fresh


def log_stalls(book: WaitBook, waits: Iterable[Wait]) -> None:
    """Log each wait once when it has become a stall: who waits for what, since when, and what would help."""
    for wait in book.new_stalls(waits):
        log.warning(
            "stall",
            name=wait.name,
            who=wait.who,
            waits_for=wait.what,
            since_s=round(wait.since_s, 1),
            remedy=wait.remedy,
        )
