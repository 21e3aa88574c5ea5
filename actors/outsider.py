"""A role played by a model elsewhere: frozen, without tools, its words in the tree but none of them to be trained."""

from __future__ import annotations

from functools import partial

from actors.agent import Report
from actors.conversation import Conversation
from actors.render import Message
from actors.scene import Run, Scene
from matpo.rewards.judge import ChatFailed


class Outsider:
    """One act of such a role. Its run joins the scene's tree when it is made."""

    def __init__(
        self,
        scene: Scene,
        role: str,
        message: str,
        *,
        parent: tuple[int, int] | None = None,
        subtask: str | None = None,
        before: Outsider | None = None,
    ) -> None:
        """`before` is the act of the same agent that this one follows."""
        self._scene, self._part = scene, scene.part(role)
        renderer = scene.stage.renderer
        if before is None:
            system = self._part.role.system
            self._messages = [*([Message("system", system)] if system else []), Message("user", message)]
            talk = Conversation.begin(role, renderer.first(self._part.opening, message))
        else:
            said = Message("assistant", before.run.final or "")
            self._messages = [*before._messages, said, Message("user", message)]
            talk = before.run.talk.fork()
            talk.append("instruction", renderer.follow(before.run.talk.last_sampled, [Message("user", message)])[0])
        self.run: Run = Run(role, parent, talk, subtask)
        self.index = scene.join(self.run)

    async def play(self) -> Report:
        """Ask for one message. Raises nothing of the model's making."""
        run, stage = self.run, self._scene.stage
        question = partial(stage.elsewhere.roles[run.role].complete, self._messages, self._part.sampling)
        try:
            text = await self._scene.heard.words.ask((run.node, len(run.talk.turns)), question)
        except ChatFailed:
            run.status = "engine_failure"
            return Report(f"Error: {run.role} could not be asked; try again or go on without it", "infrastructure")
        run.talk.append("worker_report", stage.renderer.said(text))
        run.final = stage.calls.strip(text) or None
        run.status = "done"
        return Report((run.final or "")[: self._part.role.report_limit_characters], "ok")

    def again(self, message: str) -> Outsider:
        """The same agent's next act, which follows this one."""
        parent = (self.index, len(self.run.talk.turns) - 1)
        return Outsider(self._scene, self.run.role, message, parent=parent, before=self)
