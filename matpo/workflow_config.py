"""Settings of the topologies: who acts, in which order, how often. What the agents are like is in `episode.roles`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from matpo.section import Section

Agents = Annotated[tuple[str, ...], Field(min_length=1)]


class SingleAgent(Section):
    """`episode.root` answers alone."""

    kind: Literal["single_agent"] = "single_agent"


class PlannerWorker(Section):
    """MATPO: `episode.root` delegates to the roles in its `delegates`, which may delegate in turn."""

    kind: Literal["planner_worker"] = "planner_worker"


class Magrpo(Section):
    """MAGRPO (arXiv 2508.04652): all agents answer at once and are scored together, for `turns` turns."""

    kind: Literal["magrpo"] = "magrpo"
    agents: Agents
    """Roles, in the order in which the reward reads their answers."""
    turns: int = Field(default=2, ge=1)
    samples: int = Field(default=1, ge=1)
    """Answers each agent draws per turn. With more than one an episode branches: every joint answer is followed up."""
    pairing: Literal["aligned", "cross"] = "aligned"
    """Joint answers: the j-th of every agent together, or every combination (samples to the power of the agents)."""
    follow: Literal["all", "best"] = "all"
    """Joint answers that get a next turn: all, or the best scored one (AT-GRPO)."""
    feedback: Literal["full", "passed", "none"] = "full"
    """What `{feedback}` tells of the reward: what the measure says, only whether all is well, or nothing."""
    next_message: str = "{feedback}\nAnswer again, and better."
    """Opens every turn but the first; `{peers}` are the answers of the others."""
    stop_above: float | None = None
    """Joint answers that score more on average are not followed up."""

    @model_validator(mode="after")
    def _effective(self) -> Magrpo:
        if self.samples == 1 and (idle := self.changed("pairing", "follow")):
            raise ValueError(f"{idle} have no effect with samples = 1; remove them or draw more samples")
        if self.turns == 1 and (idle := self.changed("follow", "feedback", "next_message", "stop_above")):
            raise ValueError(f"{idle} have no effect with turns = 1; remove them or play more turns")
        return self


class Debate(Section):
    """MAPoRL (arXiv 2502.18439): all agents answer, read one another's answers, and answer again."""

    kind: Literal["debate"] = "debate"
    agents: Annotated[tuple[str, ...], Field(min_length=2)]
    rounds: int = Field(default=3, ge=1)
    stop_on_consensus: bool = False
    """No further round once all answers agree."""
    next_message: str = "The others answered:\n{peers}\nConsider what they say, then answer the question again."


class GenerateVerifyRefine(Section):
    """MALT (arXiv 2412.01928): answers, critiques of each answer, refined answers to each critique; n³ leaves."""

    kind: Literal["generate_verify_refine"] = "generate_verify_refine"
    generator: str = "generator"
    verifier: str = "verifier"
    refiner: str = "refiner"
    samples: int = Field(default=3, ge=1)
    """n: answers per question, critiques per answer and refinements per critique."""
    verify_message: str = "{question}\n\nProposed answer:\n{answer}\n\nIs it right? If not, say what is wrong with it."
    refine_message: str = (
        "{question}\n\nProposed answer:\n{answer}\n\nA critic says:\n{critique}\n\nGive the final answer."
    )


class LeaderPeers(Section):
    """MLPO (arXiv 2507.08960): peers answer, the leader answers after reading them, the peers after reading it."""

    kind: Literal["leader_peers"] = "leader_peers"
    leader: str = "leader"
    peers: Agents
    rounds: int = Field(default=2, ge=1)
    leader_message: str = "{question}\n\nAnswers of your peers:\n{peers}\n\nWeigh them and answer the question."
    next_leader_message: str = "Your peers now answer:\n{peers}\n\nWeigh them and answer the question."
    next_peer_message: str = "The leader says:\n{leader}\n\nAnswer the question again."


class SimulatedUser(Section):
    """SWEET-RL (arXiv 2503.15478): an agent asks a simulated user, who knows more, and then answers."""

    kind: Literal["simulated_user"] = "simulated_user"
    agent: str = "agent"
    user: str = "user"
    turns: int = Field(default=10, ge=1)
    """Most messages of the agent; its last one is its answer."""
    answer_mark: str = Field(default="\\boxed{", min_length=1)
    """A message of the agent that holds this is its answer."""
    user_message: str = "You want help with this:\n{question}\nYou know:\n{hidden}\nThe assistant says:\n{message}"
    """First message the user role reads; `{hidden}` is the task's metadata of this name, else its first answer."""
    next_user_message: str = "{message}"
    last_message: str = "{message}\n\nThis is your last message: answer now."
    """What carries the user's words to the agent's last turn."""


Workflow = Annotated[
    SingleAgent | PlannerWorker | Magrpo | Debate | GenerateVerifyRefine | LeaderPeers | SimulatedUser,
    Field(discriminator="kind"),
]


def cast(workflow: Workflow, root: str) -> tuple[str, ...]:
    """The roles that act by themselves; others act only where these delegate to them."""
    match workflow:
        case SingleAgent() | PlannerWorker():
            return (root,)
        case Magrpo(agents=agents) | Debate(agents=agents):
            return agents
        case GenerateVerifyRefine():
            return (workflow.generator, workflow.verifier, workflow.refiner)
        case LeaderPeers(leader=leader, peers=peers):
            return (leader, *peers)
        case SimulatedUser(agent=agent, user=user):
            return (agent, user)
