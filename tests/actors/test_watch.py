"""The actor names what it waits for: a frozen engine, server, tool server or hub, and itself out of work."""

from __future__ import annotations

from collections.abc import Iterator

from structlog.testing import capture_logs

from actors.engines.engine import EngineHealth
from actors.watch import Watch
from matpo.waits import Condition, waiting


class Quiet:
    """An engine whose health a test sets."""

    version = 3

    def __init__(self) -> None:
        self.running = self.sampled = 0
        self.silent: tuple[str, ...] = ()

    async def health(self) -> EngineHealth:
        return EngineHealth("ready", "two servers", self.running, 0, self.sampled, silent=self.silent)


class Scene:
    """A watch over parts that a test freezes, on a clock that it turns."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.engine = Quiet()
        self.waiting_for: Condition | None = None
        self.tools: dict[str, float] = {"search": 0.0}
        self.watch = Watch("actor-0", self.engine, own=[self], tools=self, clock=lambda: self.now_s)

    def silent(self) -> Iterator[tuple[str, float]]:
        yield from self.tools.items()

    async def names(self, *, after_s: float = 0.0, hub: bool = True) -> dict[str, float]:
        """Wait → how long it has lasted."""
        self.now_s += after_s
        if hub:
            self.watch.hear()
        return {wait.what: wait.since_s for wait in (await self.watch.look())[1]}


async def test_a_silent_hub_is_named_and_forgotten_when_it_speaks() -> None:
    scene = Scene()
    assert await scene.names(after_s=5.0, hub=False) == {}
    with capture_logs() as lines:
        for _ in range(3):
            await scene.names(after_s=10.0, hub=False)
    assert [line["name"] for line in lines] == ["hub"]
    assert await scene.names() == {}


async def test_an_engine_with_requests_and_no_token_is_named() -> None:
    scene = Scene()
    assert await scene.names(after_s=50.0) == {}
    scene.engine.running = 3
    assert await scene.names() == {}
    assert await scene.names(after_s=6.0) == {"a token of the engine": 6.0}
    scene.engine.sampled += 1
    assert await scene.names(after_s=6.0) == {}
    assert await scene.names(after_s=7.0) == {"a token of the engine": 7.0}
    scene.engine.running = 0
    assert await scene.names(after_s=7.0) == {}


async def test_a_silent_server_of_several_is_named_by_itself() -> None:
    scene = Scene()
    scene.engine.silent = ("http://127.0.0.1:30001",)
    await scene.names()
    assert await scene.names(after_s=4.0) == {"an answer of engine server http://127.0.0.1:30001": 4.0}


async def test_a_tool_server_that_owes_an_answer_is_named() -> None:
    scene = Scene()
    scene.tools["search"] = 4.0
    assert await scene.names() == {}
    scene.tools["search"] = 12.0
    assert await scene.names() == {"an answer of tool server search": 12.0}


async def test_what_player_and_follower_wait_for_is_told_too() -> None:
    scene = Scene()
    scene.waiting_for = waiting("leases")
    await scene.names()
    assert await scene.names(after_s=3.0) == {"leases": 3.0}
