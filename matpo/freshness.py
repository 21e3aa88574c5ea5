"""How far data may lag behind the weights: how many episodes may start, and how old a token is. Pure arithmetic."""

from __future__ import annotations

import math

from protocols.records import Record, step_of


def admissible(*, version: int, step: int, steps: int, eta: int, trees_per_step: int, in_flight: int) -> int:
    """Episodes that may start now, sampled by weights of `version` steps, so that none trains more than `eta` later.

    `in_flight` counts episodes admitted and not yet trained, filtered or given up: waiting for an actor, being played,
    or pending in the journal. It is the design's `admitted - returned < (version + eta + 1) * trees_per_step` with the
    `step * trees_per_step` trees already trained taken off both sides; `version` is behind `step` until the weights of
    `step` are published. Never more than the run of `steps` steps needs.
    """
    ahead = min(version + eta + 1, steps) - step
    return max(0, ahead * trees_per_step - in_flight)


def distance(*, version: int, current: int) -> int:
    """Optimizer steps between the weights `version` and `current`.

    Lineages do not add to it: a resumed learner is given the batches after its checkpoint once more, in the same order,
    so step n of a new lineage is step n of the old one up to rounding. Weights of an abandoned lineage may even be
    ahead of the current ones, hence the absolute value.
    """
    return abs(step_of(current) - step_of(version))


class Forecast(Record):
    """What the rule of thumb says of a configuration."""

    in_flight: int
    """Episodes that all actors play at once."""
    trees_per_step: int
    eta: int
    eta_needed: int
    """Smallest eta that keeps every actor and the trainer busy."""
    busy: bool
    advice: str


def forecast(*, in_flight: int, trees_per_step: int, eta: int) -> Forecast:
    """Rule of thumb from simulation (design §6): eta >= 1 + 2.5 * in-flight / batch keeps actors and trainer busy."""
    needed = math.ceil(1 + 2.5 * in_flight / trees_per_step)
    if eta >= needed:
        advice = f"freshness.eta = {eta} is enough for {in_flight} live episodes at {trees_per_step} trees per step"
    else:
        affordable = max(1, math.floor((eta - 1) / 2.5 * trees_per_step))
        advice = (
            f"freshness.eta = {eta} holds actors back now and then: {in_flight} live episodes at {trees_per_step} trees"
            f" per step want {needed}; raise freshness.eta, or lower actor.concurrency to {affordable} in all"
        )
    return Forecast(
        in_flight=in_flight,
        trees_per_step=trees_per_step,
        eta=eta,
        eta_needed=needed,
        busy=eta >= needed,
        advice=advice,
    )
