"""What goes together: the matrix, and the same answer when a config is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from matpo.cli.main import dispatch
from matpo.cli.matrix import OBJECTIVES, matrix
from matpo.combinations import AT_MOST, MEANING, REMEDY, Kind, fitting, refusal, shown
from matpo.credit.broadcast import Broadcast
from matpo.credit.chosen import SCHEMES
from matpo.credit.magrpo import Magrpo as MagrpoCredit
from matpo.errors import UserError
from matpo.load import load_config
from matpo.objective_config import Clip, Dppo, Topr
from matpo.workflow_config import Debate, LeaderPeers, Magrpo, PlannerWorker, Workflow

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "tiny"
KINDS: tuple[Kind, ...] = get_args(Kind)


def shows(
    workflow: Workflow, *, delegates: tuple[str, ...] = (), workers_earn: bool = False, replayed: bool = False
) -> frozenset[str]:
    return shown(workflow, "planner", {"planner": delegates}, workers_earn=workers_earn, replayed=replayed)


def test_every_topology_is_in_the_matrix_and_every_lack_has_words() -> None:
    assert set(AT_MOST) == {
        get_args(part.model_fields["kind"].annotation)[0] for part in get_args(get_args(Workflow)[0])
    }
    assert set().union(*AT_MOST.values()) == set(MEANING)
    assert set().union(*(scheme.needs for scheme in SCHEMES)) <= set(MEANING)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_config_of_a_topology_loads_with_exactly_the_schemes_that_fit(kind: Kind) -> None:
    config = load_config(TINY / f"{kind}.toml")
    delegates = {name: role.delegates for name, role in config.episode.roles.items()}
    earn = config.rewards.workers != "none"
    seen = shown(config.episode.workflow, config.episode.root, delegates, workers_earn=earn, replayed=False)
    for name in (scheme.model_fields["name"].default for scheme in SCHEMES):
        if name in fitting(seen):
            leader = ', role = "leader"' if (kind, name) == ("leader_peers", "orchestrator_only") else ""
            override = f'learner.credit={{name = "{name}"{leader}}}'
            chosen = load_config(TINY / f"{kind}.toml", [override]).learner.credit
            assert chosen.name == name
        else:
            with pytest.raises(UserError, match=f"learner.credit '{name}' needs "):
                load_config(TINY / f"{kind}.toml", [f"learner.credit={name}"])


def test_what_a_topology_shows_depends_on_its_settings() -> None:
    assert shows(PlannerWorker()) == frozenset()
    assert shows(PlannerWorker(), delegates=("planner",)) == {"leader", "delegation"}
    full = shows(PlannerWorker(), delegates=("worker",), workers_earn=True, replayed=True)
    assert full == AT_MOST["planner_worker"]
    drawn = {"alternatives", "returns", "counterfactuals"}
    assert shows(Magrpo(agents=("a", "b"), turns=1)) == {"several_roles", "joints", *drawn}
    assert shows(Magrpo(agents=("a", "a"), turns=2)) == {"joints", "rounds", "returns"}
    assert shows(Magrpo(agents=("a", "b"), turns=2, samples=2, follow="best")) == (
        AT_MOST["magrpo"] - {"returns", "counterfactuals"}
    )
    assert shows(Debate(agents=("a", "b")), replayed=True) - shows(Debate(agents=("a", "b"))) == {"counterfactuals"}
    assert "rounds" not in shows(Debate(agents=("a", "b"), rounds=1))
    assert "rounds" not in shows(LeaderPeers(peers=("a",), rounds=1))


@pytest.mark.parametrize(
    ("file", "overrides", "message"),
    [
        ("planner_worker", ["learner.credit=node_local"], "a reward for every single act, not shown by"),
        ("planner_worker", ["learner.credit=node_local"], "; set rewards.workers"),
        ("debate", ["learner.credit=magrpo"], "; take one of broadcast, leave_one_out, role_group"),
        ("debate", ["learner.credit=look_ahead", "learner.zero_variance=resample"], "set it to 'filter'"),
        ("leader_peers", ['learner.credit={name="orchestrator_only", role="boss"}'], "learner.credit.role is 'boss'"),
        ("leader_peers", ["learner.credit=orchestrator_only"], "learner.credit.role must name the leader"),
        ("planner_worker", ["learner.credit=counterfactual"], "what other choices at a decision led to, not shown by"),
        ("planner_worker", ["learner.credit=counterfactual"], "; set episode.replay"),
        ("planner_worker", ["episode.replay={}"], "episode.replay has no effect with learner.credit 'broadcast'"),
        (
            "generate_verify_refine",
            ["episode.replay={}", "learner.credit=counterfactual"],
            "episode.workflow.samples is 2; set that to 1",
        ),
        (
            "planner_worker",
            [
                "episode.replay={}",
                "learner.credit=counterfactual",
                'tools.mcpServers.search.matpo={scope="episode", bare_names=true}',
            ],
            "tool server 'search' keeps a state for each episode",
        ),
        (
            "magrpo",
            ['learner.credit={name="magrpo", baseline="max"}', "learner.objective.name=topr"],
            "gives no advantage above 0, and objective 'topr'",
        ),
        (
            "magrpo",
            ['learner.credit={name="magrpo", baseline="max"}', "learner.objective.sequence_mask=1.0"],
            "gives no advantage above 0, and sequence_mask",
        ),
    ],
)
def test_a_combination_that_makes_no_sense_is_refused_with_the_remedy(
    file: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_config(TINY / f"{file}.toml", overrides)
    assert message in str(caught.value)


def test_every_remedy_is_for_something_a_topology_may_lack() -> None:
    assert set(REMEDY) <= set(MEANING)
    assert refusal("single_agent", frozenset(), Broadcast(), Dppo()) is None
    assert refusal("magrpo", frozenset(MEANING), MagrpoCredit(baseline="max"), Clip()) is None
    assert refusal("magrpo", frozenset(MEANING), MagrpoCredit(), Topr()) is None


def test_the_matrix_has_a_row_per_scheme_and_names_every_objective(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["config", "--matrix"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines() == list(matrix())
    for scheme in SCHEMES:
        assert f"\n{scheme.model_fields['name'].default} " in printed
    for objective in OBJECTIVES:
        assert objective.model_fields["name"].default in printed


def test_config_without_a_file_says_what_it_wants() -> None:
    with pytest.raises(UserError, match="needs a file"):
        dispatch(["config"])
