"""One agent: generates, runs the calls of its message, reads the results, until it has an answer or a limit ends it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from actors.calls import AGENT_SERVER, BadCall, Block, Call, Offer, fault
from actors.conversation import Conversation
from actors.engines.engine import EngineFailure, Generation
from actors.heard import Place
from actors.render import Message
from actors.scene import Run, Scene, fill
from actors.together import together
from actors.tools.plane import ToolResult
from matpo.config import Sampling
from protocols.records import INFRASTRUCTURE, Outcome, Status, StopReason, ToolSpan, TurnKind

MAX_CALLS_PER_TURN = 16
"""Calls of one message beyond this many are refused: a babbling model must not start a thousand workers."""
MAX_DEPTH = 8
"""Agents above one another; roles may delegate in circles."""
REFUSED = ""
"""Server name of the span of a call that was refused before it reached anyone."""


@dataclass(frozen=True, slots=True)
class Report:
    """What an agent hands back to whoever called it."""

    text: str
    outcome: Outcome


Delegate = Callable[[str, str, tuple[int, int]], Awaitable[Report]]
"""(role, subtask, parent) → report: how a workflow lets one agent call another."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """Something the model is told."""

    kind: TurnKind
    text: str
    call_id: str | None = None


@dataclass(frozen=True, slots=True)
class _Result:
    """What came of one call."""

    kind: TurnKind
    text: str
    outcome: Outcome
    server: str
    tool: str


class Agent:
    """A role playing in a scene. Its run joins the scene's tree when it is made."""

    def __init__(
        self,
        scene: Scene,
        role: str,
        opening: str | Conversation,
        *,
        parent: tuple[int, int] | None = None,
        subtask: str | None = None,
        delegate: Delegate | None = None,
    ) -> None:
        """`opening` is the first user message, or the conversation to go on from."""
        self._scene, self._stage = scene, scene.stage
        self._part = scene.part(role)
        self._role = self._part.role
        self._delegate = delegate
        if isinstance(opening, str):
            opening = Conversation.begin(role, self._stage.renderer.first(self._part.opening, opening))
        self.run = Run(role, parent, opening, subtask)
        self.index = scene.join(self.run)
        self._limit = min(self._role.max_context_tokens, self._stage.config.actor.engine.max_context_tokens)
        self._depth = scene.depth(self.index)
        self._outage = False
        self._unread: list[_Entry] = []

    async def play(self) -> Report:
        """Play until the end and return the report. Raises nothing of the engine's or a tool's making."""
        run, role = self.run, self._role
        reserve = self._reserve()
        try:
            status = await self._turns(reserve)
            if role.summary == "always" or (role.summary == "on_overflow" and status == "context_limit"):
                await self._summarise(status)
        except EngineFailure:
            run.final, status = None, "engine_failure"
        run.status = "tool_failure" if self._outage and status != "engine_failure" else status
        return self._report()

    def again(self, message: str) -> Agent:
        """The same agent's next act, opened by a user message: a trajectory of its own, which follows this one.

        All that was seen and said before is its prompt, so that every act can be credited for itself.
        """
        run = self.run
        talk = run.talk.fork()
        talk.append("instruction", self._stage.renderer.follow(run.talk.last_sampled, [Message("user", message)])[0])
        return Agent(self._scene, run.role, talk, parent=(self.index, len(run.talk.turns) - 1), delegate=self._delegate)

    async def _turns(self, reserve: int) -> Status:
        """The turn loop. Leaves the final message in the run, if there is one."""
        for turns_left in range(self._role.max_turns - 1, -1, -1):
            text, stop = await self._sample(reserve)
            if stop is None:
                return "context_limit"
            blocks = self._stage.calls.parse(text)
            if not blocks:
                self._conclude(text)
                return "done" if stop == "stop" else "context_limit"
            self._unread = await self._perform(blocks)
            if turns_left and not self._tell(self._unread, reserve):
                return "context_limit"
        return "turn_limit"

    async def _sample(self, reserve: int) -> tuple[str, StopReason | None]:
        """One message and why it ended; None where no room is left for one."""
        talk, sampling = self.run.talk, self._part.sampling
        room = self._limit - reserve - len(talk)
        if room < 1:
            return "", None
        if room < sampling.max_tokens:
            sampling = sampling.model_copy(update={"max_tokens": room})
        place = (self.run.node, len(talk.turns))
        generation = await self._scene.heard.completions.ask(place, partial(self._generate, sampling))
        if not len(generation.tokens):
            return "", None
        stop: StopReason = generation.stop
        if stop == "length" and len(generation.tokens) >= room:
            stop = "context"
        talk.append_sampled(generation, stop)
        return self._stage.renderer.text(generation.tokens), stop

    async def _generate(self, sampling: Sampling) -> Generation:
        """Ask the engine, and once more from the same tokens if it fails."""
        stage, prompt, group = self._stage, self.run.talk.tokens, self._scene.group_id
        deadline_s, lora = stage.config.actor.generate_timeout_s, stage.config.model.lora
        adapter, generate = "" if lora is None else lora.adapter_of(self.run.role), stage.engine.generate
        try:
            return await generate(prompt, sampling, deadline_s=deadline_s, group=group, adapter=adapter)
        except EngineFailure:
            return await generate(prompt, sampling, deadline_s=deadline_s, group=group, adapter=adapter)

    async def _perform(self, blocks: Sequence[Block]) -> list[_Entry]:
        """Run the calls of one message side by side; the results come back in the order of the calls."""
        turn = len(self.run.talk.turns) - 1
        return await together([partial(self._answer, block, turn, number) for number, block in enumerate(blocks)])

    async def _answer(self, block: Block, turn: int, number: int) -> _Entry:
        """Run one call, or say why not; either way a span records it."""
        scene, call_id = self._scene, f"{self.index}.{turn}.{number}"
        started_s = scene.elapsed_s
        reason = self._refusal(block, number)
        if isinstance(block, BadCall) or reason is not None:
            name = "" if isinstance(block, BadCall) else block.name
            result = _Result("tool_result", f"Error: {reason}", "model_error", REFUSED, name)
        elif (offer := self._part.offers[block.name]).server == AGENT_SERVER:
            report = await self._hand_over(offer.name, str(block.arguments["subtask"]).strip(), turn)
            result = _Result("worker_report", report.text, report.outcome, AGENT_SERVER, offer.name)
        else:
            result = await self._use(offer, block, (self.run.node, turn, number))
        scene.spans.append(
            ToolSpan(
                trajectory=self.index,
                turn=turn,
                call_id=call_id,
                server=result.server,
                tool=result.tool,
                outcome=result.outcome,
                started_s=started_s,
                seconds=scene.elapsed_s - started_s,
                result_bytes=len(result.text.encode()),
            )
        )
        return _Entry(result.kind, result.text, call_id)

    def _refusal(self, block: Block, number: int) -> str | None:
        """Why a call is not run, in words the model can act on."""
        if isinstance(block, BadCall):
            return block.reason
        if number >= MAX_CALLS_PER_TURN:
            return f"more than {MAX_CALLS_PER_TURN} calls in one message; make fewer"
        offer = self._part.offers.get(block.name)
        if offer is not None and offer.server == AGENT_SERVER and self._depth >= MAX_DEPTH:
            return f"no more than {MAX_DEPTH} agents may stand above one another; do it yourself"
        return fault(block, self._part.offers)

    async def _use(self, offer: Offer, call: Call, place: Place) -> _Result:
        """Call an MCP tool. An outage is told to the model, and masks the episode."""
        answer = await self._scene.heard.results.ask(place, partial(self._call, offer, call))
        self._outage = self._outage or answer.outcome == "infrastructure"
        self.run.results.append(answer.text)
        return _Result("tool_result", answer.text, answer.outcome, answer.server, answer.tool)

    async def _call(self, offer: Offer, call: Call) -> ToolResult:
        """As much of a tool's result as this role reads."""
        fixed = self._scene.task.tool_arguments.get(offer.tool, {})
        answer = await self._scene.tools.call(offer.name, call.arguments, fixed=fixed)
        return replace(answer, text=_cut(answer.text, self._role.tool_result_limit_characters))

    async def _hand_over(self, role: str, subtask: str, turn: int) -> Report:
        """Let another agent work on a subtask."""
        if self._delegate is None:
            raise ValueError(f"role {self.run.role!r} may delegate to {role!r} but its workflow gave it no way to")
        report = await self._delegate(role, subtask, (self.index, turn))
        message = self._stage.config.episode.roles[role].report_message
        return Report(fill(message, report=report.text), report.outcome)

    def _tell(self, entries: Sequence[_Entry], reserve: int) -> bool:
        """Append what the model is to read next; False, and nothing appended, where no room to answer would be left."""
        talk, renderer = self.run.talk, self._stage.renderer
        as_tool = self._stage.config.episode.results_as == "tool" and renderer.has_tool_role
        messages = [Message("tool" if as_tool and e.kind == "tool_result" else "user", e.text) for e in entries]
        added = renderer.follow(talk.last_sampled, messages)
        if len(talk) + sum(map(len, added)) + reserve >= self._limit:
            return False
        for entry, tokens in zip(entries, added, strict=True):
            talk.append(entry.kind, tokens, call_id=entry.call_id)
        self._unread = []
        return True

    def _instruction(self, status: Status) -> _Entry:
        failed = self._role.summary_failed_instruction
        text = self._role.summary_instruction if status == "done" or failed is None else failed
        question, subtask = self._scene.task.question, self.run.subtask or self._scene.task.question
        return _Entry("instruction", fill(text, question=question, subtask=subtask))

    def _reserve(self) -> int:
        """Tokens kept free for the final report and the instruction that asks for it."""
        if self._role.summary == "never":
            return 0
        texts = {self._instruction("done").text, self._instruction("turn_limit").text}
        none, renderer = self.run.talk.last_sampled, self._stage.renderer
        asked = max(len(renderer.follow(none, [Message("user", text)])[0]) for text in texts)
        return asked + self._role.summary_reserve_tokens

    async def _summarise(self, status: Status) -> None:
        """One extra turn without tools, whose message is the report; results not yet read come with the instruction."""
        if not len(self.run.talk.last_sampled):
            return
        instruction = self._instruction(status)
        reserve = self._role.summary_reserve_tokens
        if not self._tell([*self._unread, instruction], reserve) and not self._tell([instruction], 0):
            return
        text, stop = await self._sample(0)
        if stop is not None:
            self._conclude(text)

    def _conclude(self, text: str) -> None:
        self.run.final = self._stage.calls.strip(text) or None

    def _report(self) -> Report:
        """What the caller reads: the final message, or what became of the agent."""
        run = self.run
        if run.status in INFRASTRUCTURE:
            reason = run.status.replace("_", " ")
            return Report(f"Error: {run.role} broke off ({reason}); try again or go on without it", "infrastructure")
        if run.final is None:
            reason = run.status.replace("_", " ")
            return Report(
                f"Error: {run.role} ended without a report ({reason}); give it a smaller subtask", "model_error"
            )
        return Report(_cut(run.final, self._role.report_limit_characters), "ok")


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … (cut at {limit} characters)"
