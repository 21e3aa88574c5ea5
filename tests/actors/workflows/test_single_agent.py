"""One role, alone."""

from __future__ import annotations

from actors.scene import Scene
from actors.workflows.single_agent import single_agent
from matpo.config import Sampling
from tests.actors.fakes import Say, last_message, settings, stage, task


async def test_the_root_role_answers_the_question_by_itself() -> None:
    async def script(prompt: str, sampling: Sampling) -> Say | str:
        return f"You asked: {last_message(prompt)}"

    on_stage, _ = stage(settings({"solver": {"system": "Solve."}}, workflow="single_agent"), script)
    scene = Scene(on_stage, task("Who?"), "train", group_id="g")
    await single_agent(scene)
    assert [(run.role, run.parent, run.final, run.status) for run in scene.runs] == [
        ("solver", None, "You asked: Who?", "done")
    ]
