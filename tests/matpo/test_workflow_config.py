"""Topologies in the config: short forms, roles that must exist, options without effect."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from matpo.config import Config, Episode, Role
from matpo.rewards_config import Rewards
from matpo.workflow_config import Debate, Magrpo, PlannerWorker
from tests.actors.fakes import settings

ROLES: dict[str, dict[str, object]] = {"one": {"system": "1"}, "two": {"system": "2"}}


def test_a_workflow_may_be_given_by_its_name_alone() -> None:
    assert settings(ROLES, workflow="planner_worker").episode.workflow == PlannerWorker()
    assert settings(ROLES, workflow={"kind": "debate", "agents": ["one", "two"]}).episode.workflow == Debate(
        agents=("one", "two")
    )


def test_a_resolved_config_reads_back_as_it_was_written() -> None:
    config = settings(ROLES, workflow={"kind": "magrpo", "agents": ["one", "two"], "turns": 1})
    assert Config.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("episode", "message"),
    [
        ({"workflow": {"kind": "magrpo", "agents": ["one", "three"]}}, r"names the roles \['three'\]"),
        ({"workflow": {"kind": "leader_peers", "peers": ["one"]}}, r"names the roles \['leader'\]"),
        ({"workflow": {"kind": "debate", "agents": ["one", "two"]}, "root": "one"}, "episode.root has no effect"),
        ({"workflow": {"kind": "debate", "agents": ["one"]}}, "at least 2"),
        ({"workflow": "tournament"}, "does not match any of the expected tags"),
    ],
)
def test_a_topology_that_does_not_fit_its_roles_is_refused(episode: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Episode.model_validate({"roles": ROLES, **episode})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairing": "cross"}, r"\['pairing'\] have no effect with samples = 1"),
        ({"follow": "best"}, r"\['follow'\] have no effect with samples = 1"),
        ({"turns": 1, "stop_above": 0.5}, r"\['stop_above'\] have no effect with turns = 1"),
        ({"turns": 1, "feedback": "none"}, r"\['feedback'\] have no effect with turns = 1"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Magrpo.model_validate({"agents": ["one", "two"], **options})


def test_a_role_played_elsewhere_has_no_tools() -> None:
    with pytest.raises(ValidationError, match="no tools, delegates or summary"):
        Role.model_validate({"system": "", "tools": ["x"], "endpoint": {"url": "http://x/v1", "model": "m"}})


@pytest.mark.parametrize("url", ["x/v1", "http://user:key@x/v1", "http://x/v1?key=1"])
def test_an_endpoint_is_a_plain_address(url: str) -> None:
    with pytest.raises(ValidationError, match="api_key_env"):
        Role.model_validate({"system": "", "endpoint": {"url": url, "model": "m"}})


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({"code_test_timeout_s": 1.0}, "no effect with answer = 'exact_match'"),
        ({"parts": {"total": {"function": "a:b", "weight": 1.0}}}, r"may not be called \['total'\]"),
        ({"answer": "exact"}, "answer"),
        ({"answer": "module:"}, "answer"),
    ],
)
def test_reward_options_that_cannot_be_meant_are_refused(rewards: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Rewards.model_validate(rewards)
