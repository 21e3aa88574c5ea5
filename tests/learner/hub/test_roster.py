"""What the hub knows of its actors, from their own words."""

from __future__ import annotations

from learner.hub.roster import Roster
from protocols.messages import PROTOCOL, Heartbeat, Hello


def test_the_prefix_hit_rate_is_that_of_all_prompt_tokens_together() -> None:
    roster = Roster(silence_limit_s=10)
    assert roster.prefix_hit_rate is None
    for name, prompted, cached in ((b"a", 300, 30), (b"b", 100, 70)):
        hello = Hello(protocol=PROTOCOL, actor_id=name.decode(), tokenizer_digest="t", config_digest="c", capacity=1)
        roster.hello(name, hello, set(), now_s=0.0)
        actor = roster.at(name)
        assert actor is not None
        beat = Heartbeat(
            leases=(),
            version=0,
            live_episodes=0,
            outbox_trees=0,
            sampled_tokens=0,
            prompt_tokens=prompted,
            cached_tokens=cached,
        )
        roster.heartbeat(actor, beat)
    assert roster.prefix_hit_rate == 0.25  # (30 + 70) / (300 + 100)
