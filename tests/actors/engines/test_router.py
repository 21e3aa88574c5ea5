"""An engine behind a router, with stubs: tokens go through it, weights past it, and it can be passed by."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from actors.engines.sglang import router as sglang_router
from actors.engines.sglang.engine import SglangEngine
from matpo.errors import UserError
from tests.actors.engines.models import make_model, weights_of
from tests.actors.engines.stub import Stub, StubRouter
from tests.actors.engines.test_fleet import ask, serving, settings_of
from tests.actors.engines.test_sglang import sums_of


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    return make_model("qwen3", tmp_path)


@asynccontextmanager
async def routed(
    model: PreTrainedModel, folder: Path, *stubs: Stub
) -> AsyncIterator[tuple[SglangEngine, StubRouter, list[str]]]:
    """An engine on a router in front of the stubs."""
    async with serving(model, *stubs) as urls:
        router = StubRouter(workers=list(urls))
        async with router.serve():
            settings = settings_of((), router=router.url)
            async with SglangEngine.open(folder, settings, seed=0) as engine:
                yield engine, router, urls


async def test_behind_a_router_tokens_come_through_it_and_weights_go_past_it(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    stubs = (Stub(), Stub())
    async with routed(model, tmp_path, *stubs) as (engine, router, _):
        await engine.load(weights_of(model), version=4)
        answers = [await ask(engine, "group-1") for _ in range(4)]
    assert [answer.versions.tolist() for answer in answers] == [[4] * 5] * 4
    assert len(router.routing_keys) == 4 and len(set(router.routing_keys)) == 1
    for stub in stubs:
        assert len(stub.asked("/generate")) == 2 and len(stub.asked("/update_weights_from_disk")) == 1
    keys = {str(body["extra_key"]) for stub in stubs for body in stub.asked("/generate")}
    assert len(keys) == 1  # the servers hold the same weights: what one knows of a prefix is true on the other


async def test_workers_that_join_or_leave_a_router_are_noticed(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_router, "LOOK_S", 0.05)
    stubs = (Stub(), Stub())
    async with routed(model, tmp_path, *stubs) as (engine, router, urls):
        await engine.load(weights_of(model), version=4)
        late = Stub(checksums=sums_of(model))
        async with late.serve():
            router.workers[:] = [urls[0], late.url]
            await engine.fleet.wait(lambda: {s.name for s in engine.fleet.usable} == {urls[0], late.url})
            assert [body["weight_version"] for body in late.asked("/update_weights_from_disk")] == ["4"]
            assert (await ask(engine, "g")).versions.tolist() == [4] * 5
            await engine.load(weights_of(model), version=5)
    assert len(stubs[1].asked("/update_weights_from_disk")) == 1


async def test_a_router_is_passed_by_while_one_of_its_workers_holds_doubtful_weights(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    good, bad = Stub(), Stub(refuses_weights=True)
    async with routed(model, tmp_path, good, bad) as (engine, router, _):
        await engine.load(weights_of(model), version=4)
        answers = [await ask(engine, f"g{n}") for n in range(4)]
        assert not router.routing_keys and not bad.asked("/generate")
        bad.refuses_weights = False
        await engine.fleet.wait(lambda: len(engine.fleet.usable) == 2)
        answers.append(await ask(engine, "g"))
        assert len(router.routing_keys) == 1
    assert [answer.versions.tolist() for answer in answers] == [[4] * 5] * 5


async def test_a_router_that_dies_is_passed_by(model: PreTrainedModel, tmp_path: Path) -> None:
    async with serving(model, Stub()) as urls:
        router = StubRouter(workers=list(urls))
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(router.serve())
            settings = settings_of((), router=router.url)
            async with SglangEngine.open(tmp_path, settings, seed=0) as engine:
                await engine.load(weights_of(model), version=4)
                await stack.aclose()
                assert (await ask(engine, "g")).versions.tolist() == [4] * 5


async def test_a_router_without_workers_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    async with serving(model):
        router = StubRouter(workers=[])
        async with router.serve():
            with pytest.raises(UserError, match="has no workers"):
                async with SglangEngine.open(tmp_path, settings_of((), router=router.url), seed=0):
                    pass
