"""Small games, one per way of working together, whose rewards can be read off the code."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Final

from matpo.credit.scheme import Evidence, Scheme
from matpo.sim.table import Decision, Play, Table


@dataclass(frozen=True, slots=True)
class Game:
    """A game and what its trees show of it."""

    name: str
    play: Play
    shows: frozenset[Evidence]
    group_size: int
    """Episodes that are compared."""

    def suits(self, scheme: Scheme) -> bool:
        """Whether the scheme can be tried on it: its evidence is there, and none that it does not understand."""
        return scheme.needs <= self.shows and (self.shows != REPLAYED or "counterfactuals" in scheme.needs)


def bandit(table: Table) -> float:
    """One agent, three actions."""
    _, action = table.act(Decision("agent", 0, "", 3))
    return (0.2, 0.5, 1.0)[action]


def delegation(table: Table) -> float:
    """A planner answers alone, asks one worker, or two of whom the second hardly matters. Workers are scored."""
    planner, plan = table.act(Decision("planner", 0, "", 3))
    right: list[int] = []
    for slot in range(plan):
        worker, correct = table.act(Decision("worker", 0, f"{slot} of {plan}", 2), parent=planner)
        table.earn(worker, float(correct))
        right.append(correct)
    match right:
        case [only]:
            return 0.7 * only
        case [first, second]:
            return 0.8 * first + 0.2 * second
        case _:
            return 0.3


PLANNED: Final = ((0.1, 0.9), (0.6, 0.3))
"""By the plan and what was made of it."""


def _plan(table: Table) -> tuple[int, int]:
    return table.act(Decision("planner", 0, "", 2))


def _make(table: Table, plan: tuple[int, int]) -> tuple[int, float]:
    """The actor's act, and what it is worth."""
    act, made = table.act(Decision("actor", 0, f"plan {plan[1]}", 2), parent=plan[0])
    return act, PLANNED[plan[1]][made]


def relay(table: Table) -> float:
    """A planner decides, then an actor who has read the plan."""
    return _make(table, _plan(table))[1]


def relay_replayed(table: Table) -> float:
    """The same; then both acts are drawn anew, twice each, with all that was before them as it was."""
    plan = _plan(table)
    made, reward = _make(table, plan)
    for _ in range(2):
        other = _plan(table)
        table.replay(plan[0], other[0], _make(table, other)[1])
    for _ in range(2):
        table.replay(made, *_make(table, plan))
    return reward


def writing(table: Table) -> float:
    """Generate, verify, refine, with two alternatives at the last two stages; the refined answers are scored."""
    generator, draft = table.act(Decision("generator", 0, "", 2))
    scores: list[float] = []
    for _ in range(2):
        verifier, verdict = table.act(Decision("verifier", 0, f"draft {draft}", 2), parent=generator)
        for _ in range(2):
            refiner, answer = table.act(Decision("refiner", 0, f"draft {draft}, verdict {verdict}", 2), parent=verifier)
            # A good draft is best kept, a bad one changed; a wrong verdict makes that harder.
            score = (0.6 if draft else 0.2) + (0.3 if verdict == draft else 0.0) + (0.1 if answer == verdict else -0.1)
            table.earn(refiner, score)
            scores.append(score)
    return sum(scores) / len(scores)


def joint_turns(table: Table) -> float:
    """Two agents act at once, twice, the second time with two alternatives; they must agree, and then build on it."""
    acts = [table.act(Decision(role, 0, "", actions)) for role, actions in (("first", 3), ("second", 2))]
    a, b = (action for _, action in acts)
    reward = 0.5 + 0.5 * a if a == b else 0.0
    before = table.join((acts[0][0], acts[1][0]), reward=reward)
    later: list[float] = []
    for _ in range(2):
        forks = [
            table.act(Decision(role, 1, f"after {a}{b}", 2), parent=act)
            for role, (act, _) in zip(("first", "second"), acts, strict=True)
        ]
        x, y = (action for _, action in forks)
        later.append(0.2 + 0.8 * float(x != y) if a == b else 0.4 * float(x == y))
        table.join((forks[0][0], forks[1][0]), after=before, reward=later[-1])
    return reward + sum(later) / len(later)


PAYOFF: Final = ((0.2, 0.0), (0.1, 1.0), (0.6, 0.3))


def joint_crossed(table: Table) -> float:
    """Two agents act at once, two alternatives each, and all four pairs are scored."""
    acts = [
        [table.act(Decision(role, 0, "", actions)) for _ in range(2)] for role, actions in (("first", 3), ("second", 2))
    ]
    rewards: list[float] = []
    for (one, a), (two, b) in product(*acts):
        rewards.append(PAYOFF[a][b])
        table.join((one, two), reward=rewards[-1])
    return sum(rewards) / len(rewards)


def debate(table: Table) -> float:
    """Two agents answer, read each other, and answer again; every answer is scored, the last ones make the reward."""
    acts = [table.act(Decision(role, 0, "", 3)) for role in ("first", "second")]
    for index, answer in acts:
        table.earn(index, answer / 2)
    before = table.join((acts[0][0], acts[1][0]))
    a, b = (answer for _, answer in acts)
    final: list[float] = []
    for role, (index, _), own, other in (("first", acts[0], a, b), ("second", acts[1], b, a)):
        act, answer = table.act(Decision(role, 1, f"own {own}, other {other}", 2), parent=index)
        # It is easier to be right after somebody was.
        final.append(answer * (0.4 + 0.15 * own + 0.15 * other))
        table.earn(act, final[-1])
    table.join((len(acts), len(acts) + 1), after=before)
    return sum(final) / len(final)


REPLAYED: Final = frozenset[Evidence]({"several_roles", "counterfactuals"})
ALTERNATIVES: Final = frozenset[Evidence]({"several_roles", "alternatives", "returns", "counterfactuals"})
GAMES: Final = (
    Game("bandit", bandit, frozenset(), 4),
    Game("delegation", delegation, frozenset({"several_roles", "leader", "delegation", "earned"}), 3),
    Game("relay", relay, frozenset({"several_roles"}), 4),
    Game("relay, replayed", relay_replayed, REPLAYED, 1),
    Game("writing", writing, ALTERNATIVES | {"leaf_scores"}, 2),
    Game("joint turns", joint_turns, ALTERNATIVES | {"joints", "rounds"}, 2),
    Game("joint, crossed", joint_crossed, ALTERNATIVES | {"joints"}, 2),
    Game("debate", debate, frozenset({"several_roles", "earned", "joints", "rounds"}), 2),
)
