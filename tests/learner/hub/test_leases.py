"""Leases and trees: exactly once, expiry, attempts, late trees, admission."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.hub.leases import GroupRules, after_failure, group_state
from protocols.messages import Ack, Cancel, Goodbye, Lease, Refuse
from tests.learner.hub.bench import Bench, bench, make_config, make_tree

RULES = GroupRules(group_size=4, min_group=2, max_attempts=3, filter_zero_variance=True)


def pending(at: Bench) -> int:
    return at.ledger.pending


def test_a_tree_sent_twice_is_counted_once_and_acknowledged_twice(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        tree = make_tree(at.ask(2)[0], 0)
        assert at.upload(tree) == [Ack(tree_id=tree.tree_id)]
        assert at.upload(tree) == [Ack(tree_id=tree.tree_id)]
        assert at.ledger.trees == 1


def test_a_tree_whose_ack_was_lost_with_the_hub_is_acknowledged_by_the_next_hub(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        tree = make_tree(at.ask(2)[0], 0)
        at.upload(tree)  # committed, and the hub dies before its Ack is read
        at.restart()
        (refusal,) = at.upload(tree)
        assert isinstance(refusal, Refuse) and refusal.reason == "unknown_peer"
        at.hello()
        assert at.upload(tree) == [Ack(tree_id=tree.tree_id)]
        assert at.ledger.trees == 1


def test_a_hub_that_dies_before_the_commit_has_promised_nothing(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        lease = at.ask(2)[0]
        at.journal.execute("BEGIN IMMEDIATE")
        at.hub.leases.open_group(lease.task, purpose="train", round_name=None, episodes=2, at=0.0)
        at.restart()  # the connection closes with the transaction open
        assert at.ledger.tasks == 1


def test_a_restarted_hub_renews_what_its_actors_still_hold(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        lease = at.ask(2)[0]
        at.restart()
        at.hello()
        at.beat(lease.lease_id)
        at.step(seconds=9.0)
        assert at.ledger.leases_live == 1


def test_an_actor_that_came_back_without_its_leases_loses_them_at_its_first_heartbeat(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        at.ask(2)
        at.hello()
        at.beat()
        assert at.ledger.leases_live == 0
        assert at.ledger.episodes_waiting == 2


def test_an_expired_lease_is_handed_out_again(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        first = at.ask(2)[0]
        at.step(seconds=10.0)
        at.hello("actor-1")
        second = at.ask(2, "actor-1")[0]
        assert (second.group_id, second.episodes) == (first.group_id, first.episodes)
        assert second.lease_id != first.lease_id


def test_heartbeats_keep_a_lease(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        lease = at.ask(2)[0]
        for _ in range(5):
            at.step(seconds=6.0)
            at.beat(lease.lease_id)
        assert at.ledger.leases_live == 1


def test_only_missing_episodes_are_handed_out_again(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        first = at.ask(2)[0]
        at.upload(make_tree(first, 1))
        at.step(seconds=10.0)
        at.hello("actor-1")
        assert at.ask(2, "actor-1")[0].episodes == (0,)


def test_late_trees_are_accepted_up_to_the_group_size_and_the_rest_is_surplus(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        first = at.ask(2)[0]
        at.step(seconds=10.0)
        at.hello()
        at.hello("actor-1")
        second = at.ask(2, "actor-1")[0]
        at.upload(make_tree(first, 0))
        at.upload(make_tree(second, 1))
        assert pending(at) == 2
        at.upload(make_tree(first, 1))
        at.upload(make_tree(second, 0))
        assert pending(at) == 2
        assert at.ledger.filtered_by == {"surplus": 2}


def test_a_lease_made_superfluous_by_a_late_tree_is_cancelled(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        first = at.ask(2)[0]
        at.upload(make_tree(first, 0))
        at.step(seconds=10.0)
        at.hello("actor-1")
        second = at.ask(1, "actor-1")[0]
        assert second.group_id == first.group_id
        at.hello()
        out = at.step([at.arrival(make_tree(first, 1))])
        cancels = [(o.peer, o.message) for o in out if isinstance(o.message, Cancel)]
        assert [(peer, cancel.lease_id) for peer, cancel in cancels] == [(b"actor-1", second.lease_id)]


def test_an_infrastructure_failure_is_played_again_and_then_given_up(tmp_path: Path) -> None:
    with bench(tmp_path, make_config(hub={"min_group": 2, "max_attempts": 2})) as at:
        at.start()
        first = at.ask(2)[0]
        at.upload(make_tree(first, 0))
        at.upload(make_tree(first, 1, reward=None, status="tool_failure"))
        second = at.ask(1)[0]
        assert (second.group_id, second.episodes) == (first.group_id, (1,))
        at.upload(make_tree(second, 1, reward=None, status="engine_failure"))
        assert at.ledger.episodes_abandoned == 1
        assert at.ledger.tasks_filtered == 1  # one scored tree is too few for a group
        assert at.ledger.filtered_by == {"engine_failure": 1, "group_too_small": 1, "tool_failure": 1}


def test_a_group_that_lost_an_episode_for_good_is_still_trained_on(tmp_path: Path) -> None:
    config = make_config(learner={"groups_per_step": 1, "group_size": 3}, hub={"max_attempts": 1})
    with bench(tmp_path, config) as at:
        at.start()
        lease = at.ask(3)[0]
        at.upload(make_tree(lease, 0, reward=1.0))
        at.upload(make_tree(lease, 1, reward=0.0))
        at.upload(make_tree(lease, 2, reward=None, status="cancelled"))
        batch = at.batch(1)
        assert batch is not None and len(batch.frame_counts) == 2


def test_an_actor_that_leaves_gives_its_leases_back_without_costing_an_attempt(tmp_path: Path) -> None:
    with bench(tmp_path, make_config(hub={"max_attempts": 1})) as at:
        at.start()
        at.ask(2)
        at.send("actors", "actor-0", Goodbye(reason="test"))
        assert (at.ledger.leases_live, at.ledger.episodes_waiting, at.ledger.episodes_abandoned) == (0, 2, 0)


def test_admission_stops_at_the_bound_and_failures_give_theirs_back_at_once(tmp_path: Path) -> None:
    config = make_config(hub={"max_attempts": 1}, learner={"groups_per_step": 2, "group_size": 2})
    with bench(tmp_path, config) as at:
        at.start()
        leases = at.ask(100)
        assert sum(len(lease.episodes) for lease in leases) == 8  # (eta + 1) x 2 groups x 2 trees
        at.upload(make_tree(leases[0], 0, reward=None, status="tool_failure"))
        (answer, *more) = at.upload(make_tree(leases[0], 1))
        assert isinstance(answer, Ack)  # group too small: both episodes are returned, a new group may start
        assert [lease.episodes for lease in more if isinstance(lease, Lease)] == [(0, 1)]
        assert at.hub.leases.in_flight() == 8


def test_an_actor_gets_no_more_than_it_can_play_however_often_it_asks(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        at.hello("actor-1", capacity=3)
        assert sum(len(lease.episodes) for _ in range(4) for lease in at.ask(3, "actor-1")) == 3


def test_work_is_shared_by_actors_with_room(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.trainer_hello()
        for actor in ("actor-0", "actor-1"):
            at.hello(actor)
            at.ask(4, actor)
        at.publish(0)
        held = [at.hub.leases.leased_to(actor) for actor in ("actor-0", "actor-1")]
        assert held == [4, 4]


def test_a_silent_actor_is_given_nothing(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.trainer_hello()
        at.hello()
        at.ask(4)
        at.step(seconds=5.0)
        at.publish(0)
        assert at.ledger.leases_live == 0


def test_a_lease_that_found_its_actor_gone_goes_back(tmp_path: Path) -> None:
    with bench(tmp_path) as at:
        at.start()
        received = at.lease_request(2)
        (outgoing,) = at.step([received])
        with at.journal.transaction():
            at.hub.undelivered(outgoing)
        assert (at.ledger.leases_live, at.ledger.episodes_waiting) == (0, 2)


@pytest.mark.parametrize(("attempts", "expected"), [(1, "waiting"), (2, "waiting"), (3, "abandoned")])
def test_an_episode_is_given_up_after_its_last_attempt(attempts: int, expected: str) -> None:
    assert after_failure(attempts=attempts, max_attempts=3) == expected


@pytest.mark.parametrize(
    ("states", "rewards", "expected"),
    [
        (["filled", "leased"], [1.0], ("open", None)),
        (["filled", "waiting"], [1.0], ("open", None)),
        (["filled", "filled"], [1.0, 0.0], ("complete", None)),
        (["filled", "filled", "abandoned"], [1.0, 0.0], ("complete", None)),
        (["filled", "abandoned"], [1.0], ("filtered", "group_too_small")),
        (["filled", "filled"], [0.5, 0.5], ("filtered", "zero_variance")),
        (["abandoned", "abandoned"], [], ("filtered", "group_too_small")),
    ],
)
def test_a_group_is_complete_when_no_episode_is_missing(
    states: list[str], rewards: list[float], expected: tuple[str, str | None]
) -> None:
    assert group_state(states, rewards, RULES) == expected
