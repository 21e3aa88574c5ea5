"""Where episodes are played: what all episodes of an actor share (`Stage`) and what one of them collects (`Scene`)."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, Self

from pydantic import JsonValue

from actors.calls import AGENT_SERVER, FORMATS, CallFormat, Offer, function_schema
from actors.conversation import Conversation
from actors.elsewhere import NOBODY, Elsewhere
from actors.engines.engine import Engine
from actors.heard import START, Heard, Node
from actors.render import Opening, Renderer
from actors.tools.plane import ToolResult, ToolSpec
from matpo.config import Config, Role, Sampling
from matpo.errors import UserError
from matpo.rewards.measure import Measure
from matpo.rewards.score import Scorer
from matpo.rewards.verdict import UNKNOWN, Verdict
from matpo.rewards_config import SANDBOXED
from protocols.messages import Purpose
from protocols.records import INFRASTRUCTURE, Joint, Status, Task, ToolSpan, WeightStamp

_PLACE = re.compile(r"\{([a-z]+)\}")


def fill(template: str, **values: str) -> str:
    """Replace `{name}` by `values[name]` in one pass, so that braces inside a value mean nothing."""
    return _PLACE.sub(lambda match: values.get(match[1], match[0]), template)


class EpisodeToolbox(Protocol):
    """The tools of one episode, whose agents may share what a server keeps for them."""

    async def call(
        self, name: str, arguments: Mapping[str, JsonValue], *, fixed: Mapping[str, JsonValue]
    ) -> ToolResult:
        """Call a tool by its model-facing name; a bad tool or server is in the answer, never raised."""
        ...

    def close(self) -> None:
        """The episode is over."""
        ...


class Toolbox(Protocol):
    """What a stage needs of `actors.tools.plane.ToolPlane`."""

    def specs(self, patterns: Sequence[str], *, hidden: frozenset[str] = frozenset()) -> Sequence[ToolSpec]:
        """The tools that match, in a fixed order, without the arguments named in `hidden`."""
        ...

    def episode(self) -> EpisodeToolbox:
        """The tools for one more episode."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """A role, ready to be played: its first prompt's frame and what it may call."""

    role: Role
    offers: Mapping[str, Offer]
    opening: Opening
    sampling: Sampling


class Stage:
    """The engine, the tools, the tokenizer and the roles that every episode of this actor uses."""

    def __init__(
        self,
        config: Config,
        *,
        engine: Engine,
        tools: Toolbox,
        renderer: Renderer,
        actor_id: str,
        elsewhere: Elsewhere = NOBODY,
    ) -> None:
        self.config = config
        self.engine = engine
        self.tools = tools
        self.renderer = renderer
        self.actor_id = actor_id
        self.calls: CallFormat = FORMATS[config.episode.call_format]
        self.elsewhere = elsewhere
        self.measure = Measure(config.rewards, chat=elsewhere.judge)
        self.score = Scorer(config.rewards)
        self.code_tool = self._code_tool()
        self._parts: dict[tuple[str, frozenset[str], Purpose], Part] = {}
        for name in config.episode.roles:
            self.part(name, hidden=frozenset(), purpose="train")

    @classmethod
    def open(
        cls, config: Config, *, engine: Engine, tools: Toolbox, actor_id: str, elsewhere: Elsewhere = NOBODY
    ) -> Self:
        """Load the tokenizer and check roles, templates, tools and rewards; `UserError` names what does not fit."""
        renderer = Renderer.load(config.model)
        return cls(config, engine=engine, tools=tools, renderer=renderer, actor_id=actor_id, elsewhere=elsewhere)

    def _code_tool(self) -> str | None:
        """The model-facing name of the tool that runs code for the reward; None where none does."""
        rewards = self.config.rewards
        if rewards.answer not in SANDBOXED:
            return None
        try:
            found = self.tools.specs([rewards.code_tool])
        except UserError as error:
            raise UserError(f"rewards.code_tool: {error}") from error
        if len(found) != 1:
            names = [spec.name for spec in found]
            raise UserError(f"rewards.code_tool = {rewards.code_tool!r} must name one tool, not {names}")
        return found[0].name

    def stamps(self, versions: Sequence[int]) -> tuple[WeightStamp, ...]:
        """The digests of the weights that sampled an episode's tokens."""
        digests = self.engine.digests
        return tuple(WeightStamp(version=version, digest=digests[version]) for version in versions)

    def part(self, name: str, *, hidden: frozenset[str], purpose: Purpose) -> Part:
        """The role `name` for tasks that fix the arguments named in `hidden`."""
        key = (name, hidden, purpose)
        part = self._parts.get(key)
        if part is None:
            part = self._parts[key] = self._prepare(name, hidden, purpose)
        return part

    def _prepare(self, name: str, hidden: frozenset[str], purpose: Purpose) -> Part:
        episode = self.config.episode
        role = episode.roles[name]
        try:
            offers = {spec.name: _offer(spec) for spec in self.tools.specs(role.tools, hidden=hidden)}
        except UserError as error:
            raise UserError(f"episode.roles.{name}.tools: {error}") from error
        for callee in role.delegates:
            if callee in offers:
                raise UserError(
                    f"episode.roles.{name} may call both a tool and a role named {callee!r}; rename the role"
                )
            offers[callee] = _delegation(callee, episode.roles[callee])
        schemas = [function_schema(offer) for offer in offers.values()]
        by_template = episode.call_format == "json" and self.renderer.lists_tools(schemas)
        listing = "" if by_template else self.calls.describe(tuple(offers.values()))
        system = fill(role.system, tools=listing).strip()
        sampling = role.sampling
        if purpose == "eval":
            sampling = sampling.model_copy(update={"temperature": self.config.evaluation.temperature})
        return Part(role, offers, self.renderer.opening(system, schemas if by_template else ()), sampling)


def _offer(spec: ToolSpec) -> Offer:
    return Offer(spec.name, spec.server, spec.tool, spec.description, spec.parameters)


def _delegation(name: str, role: Role) -> Offer:
    subtask: dict[str, JsonValue] = {"type": "string", "description": "What to do, with everything needed to do it."}
    parameters: dict[str, JsonValue] = {
        "type": "object",
        "properties": {"subtask": subtask},
        "required": ["subtask"],
    }
    return Offer(name, AGENT_SERVER, name, role.description, parameters)


@dataclass(slots=True, eq=False)
class Run:
    """One agent's part in an episode, filled in while it plays."""

    role: str
    parent: tuple[int, int] | None
    talk: Conversation
    subtask: str | None
    status: Status = "cancelled"
    """Until it ends by itself."""
    final: str | None = None
    """Its last message without thinking and tool blocks; None if it never gave one."""
    results: list[str] = field(default_factory=list)
    """Texts of its tool results, in the order they arrived."""
    node: Node = START
    """Its place in the tree, told when it joins."""


class Scene:
    """One episode being played. Agents join it by themselves; whatever happens, what they did so far is here.

    Close it when the episode is over.
    """

    def __init__(
        self, stage: Stage, task: Task, purpose: Purpose, *, group_id: str, heard: Heard | None = None
    ) -> None:
        """`heard`: what a replay is to hear again."""
        self.stage = stage
        self.tools = stage.tools.episode()
        self.task = task
        self.purpose: Purpose = purpose
        self.group_id = group_id
        self.heard = heard or Heard()
        self.runs: list[Run] = []
        self.spans: list[ToolSpan] = []
        self.joints: list[Joint] = []
        self._earned: dict[int, float | None] = {}
        self._hanging = Counter[tuple[Node, int]]()
        self.started_at = time.time()
        self._began = time.monotonic()
        self._hidden = frozenset(name for fixed in task.tool_arguments.values() for name in fixed)

    def close(self) -> None:
        """Let go of what only this episode used."""
        self.tools.close()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the episode began."""
        return time.monotonic() - self._began

    def part(self, role: str) -> Part:
        """The role as this episode's task needs it."""
        return self.stage.part(role, hidden=self._hidden, purpose=self.purpose)

    def join(self, run: Run) -> int:
        """Add an agent's run; returns the index of its trajectory. Callers join before those they call."""
        above, turn = (START, -1) if run.parent is None else (self.runs[run.parent[0]].node, run.parent[1])
        run.node = (*above, (turn, self._hanging[above, turn]))
        self._hanging[above, turn] += 1
        self.runs.append(run)
        return len(self.runs) - 1

    def depth(self, index: int) -> int:
        """How many callers stand above an agent."""
        run = self.runs[index]
        above = int(run.subtask is not None)
        while run.parent is not None:
            run = self.runs[run.parent[0]]
            above += run.subtask is not None
        return above

    def earn(self, index: int, score: float | None) -> None:
        """Say what the act of an agent was worth."""
        self._earned[index] = score

    @property
    def earned(self) -> tuple[float | None, ...]:
        """One per agent, or empty if nobody's acts were scored."""
        return tuple(self._earned.get(index) for index in range(len(self.runs))) if self._earned else ()

    async def appraise(self, *runs: Run) -> Verdict:
        """What the final messages of these agents are worth together; unknown if one broke off or called in vain."""
        if any(run.status in INFRASTRUCTURE for run in runs):
            return UNKNOWN
        answers = tuple(run.final or "" for run in runs)
        place = tuple((run.node, len(run.talk.turns)) for run in runs)
        return await self.heard.verdicts.ask(place, partial(self.stage.measure, self.task, answers, self._run_code))

    async def _run_code(self, program: str) -> str | None:
        """The reward's sandbox: a tool call that is in no agent's conversation."""
        assert self.stage.code_tool is not None, "only measures that run code ask for it"
        answer = await self.tools.call(self.stage.code_tool, {"code": program}, fixed={})
        return None if answer.outcome == "infrastructure" else answer.text
