"""An actor id belongs to the key that said hello under it first, and a lease to the actor it was given to."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from actors.greet import greet
from matpo.errors import UserError
from protocols.channel import HubClient, Received, new_actor_keys, new_keys
from protocols.keys import ActorKeys, HubKeys, allow
from protocols.messages import HubMessage, Refuse, Welcome
from protocols.records import Task
from tests.actors.weights.rig import learner
from tests.learner.hub.bench import Bench, bench, make_tree

OURS, THEIRS = "a" * 40, "b" * 40


def hello(at: Bench, peer: str, key: str | None, actor_id: str = "actor-0") -> HubMessage:
    received = Received(peer.encode(), at.hello_message(actor_id), (), key)
    return next(o.message for o in at.step([("actors", received)]) if o.peer == peer.encode())


def test_another_key_cannot_take_an_actor_id_not_even_after_a_restart(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.trainer_hello()
        assert isinstance(hello(at, "one", OURS), Welcome)
        for _ in range(2):
            refusal = hello(at, "two", THEIRS)
            assert refusal == Refuse(
                reason="wrong_key",
                detail="actor id 'actor-0' belongs to another key in this run; give this actor another --actor-id",
            )
            at.restart()
        assert isinstance(hello(at, "three", OURS), Welcome), "its owner comes and goes"
        assert isinstance(hello(at, "two", THEIRS, "actor-1"), Welcome), "under a name of its own the other is welcome"


def test_the_refused_one_gets_no_work_and_the_owner_keeps_its_own(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        hello(at, "one", OURS, "actor-7")
        hello(at, "two", THEIRS, "actor-7")
        assert at.ask(4, actor="two") == []
        assert len(at.ask(2, actor="one")) == 1


def test_one_key_may_serve_several_actors(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        for name in ("actor-0", "actor-1"):
            assert isinstance(hello(at, name, OURS, name), Welcome)


def test_without_keys_who_says_hello_last_has_the_name(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        for peer in ("one", "two"):
            assert isinstance(hello(at, peer, None), Welcome)
        assert [actor.peer for actor in at.hub.roster.everyone()] == [b"two"]


def test_a_tree_of_another_actors_lease_is_refused(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        at.hello("actor-1")
        lease = at.ask(2)[0]
        (refusal,) = at.upload(make_tree(lease, 0), actor="actor-1")
        assert isinstance(refusal, Refuse) and refusal.reason == "unknown_lease"
        assert "was not given to actor-1 in this run" in refusal.detail
        assert at.ledger.trees == 0


def test_a_tree_that_gives_its_task_other_words_is_refused(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        lease = at.ask(2)[0].model_copy(update={"task": Task.make("another question", ("a",))})
        (refusal,) = at.upload(make_tree(lease, 0))
        assert isinstance(refusal, Refuse) and refusal.reason == "unknown_lease"


async def test_over_the_wire_the_key_is_the_one_proven_in_the_handshake(tmp_path: Path) -> None:
    new_keys(tmp_path / "keys")
    hub_keys, ours = HubKeys.load(tmp_path / "keys"), ActorKeys.load(tmp_path / "keys")
    allow(tmp_path / "keys", new_actor_keys(tmp_path / "second", hub=hub_keys.pair.public))
    theirs = ActorKeys.load(tmp_path / "second")
    async with learner(tmp_path / "run", keys=hub_keys) as run:
        config = run.hub.config if run.hub is not None else None
        assert config is not None
        mine = Bench.hello_of(config, "actor-0")
        async with HubClient.connect(run.endpoint, keys=ours) as first:
            await greet(first, mine, deadline_s=5)
            async with HubClient.connect(run.endpoint, keys=theirs) as second:
                with anyio.fail_after(5), pytest.raises(UserError, match="belongs to another key in this run"):
                    await greet(second, mine, deadline_s=5)
        async with HubClient.connect(run.endpoint, keys=ours) as again:
            await greet(again, mine, deadline_s=5)
