"""The settings of a run: one frozen tree read from TOML, closed choices, unknown keys refused, defaults only here."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

import orjson
from pydantic import BaseModel, Field, field_validator, model_validator

from matpo.attention_config import AttentionChoice, check_attention
from matpo.collapse_config import Collapse as Collapse
from matpo.combinations import misfit, refusal, shown
from matpo.credit.agent_turn import AgentTurn
from matpo.credit.broadcast import Broadcast as Broadcast
from matpo.credit.chosen import Credit as Credit
from matpo.endpoint_config import Endpoint as Endpoint
from matpo.engine_config import EmbeddedEngine as EmbeddedEngine
from matpo.engine_config import Engine as Engine
from matpo.engine_config import SglangEngine as SglangEngine
from matpo.hub_config import Freshness as Freshness
from matpo.hub_config import Hub as Hub
from matpo.lora_config import PROJECTIONS as PROJECTIONS
from matpo.lora_config import Lora as Lora
from matpo.objective_config import Cispo as Cispo
from matpo.objective_config import Clip as Clip
from matpo.objective_config import Decoupled as Decoupled
from matpo.objective_config import Dppo as Dppo
from matpo.objective_config import Gspo as Gspo
from matpo.objective_config import IcePop as IcePop
from matpo.objective_config import M2po as M2po
from matpo.objective_config import Objective as Objective
from matpo.objective_config import Reinforce as Reinforce
from matpo.objective_config import Tis as Tis
from matpo.objective_config import Topr as Topr
from matpo.replay_config import Replay, idle, stateful
from matpo.rewards_config import Rewards as Rewards
from matpo.section import Device, Name, Section
from matpo.tools_config import McpServer as McpServer
from matpo.tools_config import ServerExtras as ServerExtras
from matpo.tools_config import Tools as Tools
from matpo.trained_roles import contradiction
from matpo.weights_config import ActorWeights as ActorWeights
from matpo.workflow_config import PlannerWorker, SingleAgent, Workflow, cast


class Sampling(Section):
    """How tokens are drawn."""

    temperature: float = Field(default=1.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0 keeps every token."""
    max_tokens: int = Field(default=256, ge=1)
    """Most tokens one turn may sample."""


class Run(Section):
    """What the run is called, where it lives and how long it lasts."""

    name: Name = "run"
    dir: Path = Path("runs")
    """Parent folder; the run's own folder is `dir/name-<time>` unless resumed."""
    seed: int = 0
    steps: int = Field(default=100, ge=0)
    """Optimizer steps."""


class Model(Section):
    """The language model: a Hugging Face folder."""

    path: Path
    lora: Lora | None = None
    """Train an adapter of the model instead of all its weights."""
    chat_template: Path | None = None
    """A jinja file used instead of the tokenizer's own template."""

    @property
    def served_adapter(self) -> Lora | None:
        """The adapter that engines load; None where they get whole weights."""
        return self.lora if self.lora is not None and self.lora.publish == "adapter" else None


class WorldData(Section):
    """The generated fictional world: multi-hop questions over documents that a search server serves."""

    kind: Literal["world"] = "world"
    worlds: int = Field(default=200, ge=1)
    """How many worlds to draw questions from."""
    first_seed: int = Field(default=0, ge=0)
    """World seeds are first_seed … first_seed + worlds - 1; keep training and evaluation apart."""
    questions: int = Field(default=4096, ge=1)
    hops: tuple[int, ...] = (1, 2, 3)
    """`ask = "questions"`: facts a question's answer takes."""
    ask: Literal["questions", "facts"] = "questions"
    """`facts`: the task is a fact, its object the answer; nothing needs to be looked up."""

    @model_validator(mode="after")
    def _effective(self) -> WorldData:
        if self.ask == "facts" and self.changed("hops"):
            raise ValueError('hops has no effect with ask = "facts"; remove it')
        return self


class JsonlData(Section):
    """One JSON object a line: question, answers (list) and optional metadata and tool_arguments."""

    kind: Literal["jsonl"] = "jsonl"
    path: Path
    limit: int | None = Field(default=None, ge=1)


Dataset = Annotated[WorldData | JsonlData, Field(discriminator="kind")]


class Data(Section):
    train: Dataset
    evaluation: Dataset


class Role(Section):
    """One role of the shared policy."""

    system: str
    """System prompt. `{tools}` is replaced by the tool list when the chat template renders no tools itself."""
    tools: tuple[str, ...] = ()
    """MCP tools this role may call, as `server__tool` or a bare name that is unique; `server__*` allows all."""
    delegates: tuple[str, ...] = ()
    """Roles this one may call, each as a tool of the same name with the argument `subtask`."""
    description: str = "Solves one subtask and reports back."
    """Shown to the roles that may delegate to this one."""
    max_turns: int = Field(default=20, ge=1)
    max_context_tokens: int = Field(default=4096, ge=16)
    sampling: Sampling = Sampling()
    summary: Literal["always", "on_overflow", "never"] = "never"
    """Ask for a final report in one extra turn without tools."""
    summary_instruction: str = "This is your last turn. Do not call tools. Report your conclusion and what supports it."
    summary_failed_instruction: str | None = None
    """Used instead when turns or context ran out before the task was solved; None: the same instruction."""
    summary_reserve_tokens: int = Field(default=256, ge=1)
    """Context kept free for the final report."""
    recap: bool = True
    """Start a delegated role with the main question beside its subtask."""
    first_message: str = "Main question: {question}\nYour subtask: {subtask}"
    """First user message of a delegated role; the root role gets the question as it is."""
    report_limit_characters: int = Field(default=20_000, ge=1)
    """A report is cut to this length before it returns to its caller."""
    report_message: str = "{report}"
    """The user message that carries a report back to its caller."""
    tool_result_limit_characters: int = Field(default=20_000, ge=1)
    endpoint: Endpoint | None = None
    """Another model plays this role, which is thereby frozen: it has no tools, and none of its tokens are trained."""

    @model_validator(mode="after")
    def _plain_elsewhere(self) -> Role:
        if self.endpoint is not None and (self.tools or self.delegates or self.summary != "never"):
            raise ValueError("a role with an endpoint has no tools, delegates or summary; remove them")
        return self


class Episode(Section):
    """How agents interact."""

    workflow: Workflow = PlannerWorker()
    """The topology, by its name or with its settings: { kind = "magrpo", agents = [...] } (docs/topologies.md)."""
    root: str = "planner"
    """`planner_worker`, `single_agent`: the role that gets the question and whose final answer is scored."""
    roles: dict[str, Role]
    call_format: Literal["json", "xml"] = "json"
    """Hermes/Qwen JSON in <tool_call> tags, or MATPO's <use_mcp_tool> XML."""
    results_as: Literal["tool", "user"] = "tool"
    """Who tool results speak as: `tool` where the chat template has that role (else `user`), or always `user`."""
    timeout_s: float = Field(default=600.0, gt=0)
    """An episode that lasts longer is cancelled and masked; so is each of its replays."""
    replay: Replay | None = None
    """Play other choices at decisions of every training episode to its end, for `counterfactual` credit."""

    @field_validator("workflow", mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        """A workflow whose defaults do may be given by its name."""
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _roles_exist(self) -> Episode:
        rooted = isinstance(self.workflow, PlannerWorker | SingleAgent)
        if rooted and self.root not in self.roles:
            raise ValueError(f"episode.root is {self.root!r}, which is not among the roles {sorted(self.roles)}")
        if not rooted and self.changed("root"):
            raise ValueError(f"episode.root has no effect with workflow {self.workflow.kind!r}; remove it")
        if unknown := sorted(set(cast(self.workflow, self.root)) - set(self.roles)):
            raise ValueError(f"episode.workflow names the roles {unknown}, not among {sorted(self.roles)}")
        for name, role in self.roles.items():
            unknown = sorted(set(role.delegates) - set(self.roles))
            if unknown:
                raise ValueError(f"episode.roles.{name}.delegates names {unknown}, not among {sorted(self.roles)}")
            if role.delegates and isinstance(self.workflow, SingleAgent):
                raise ValueError(f"episode.workflow single_agent has nobody to delegate to; empty delegates of {name}")
        return self


class Actor(Section):
    """One `matpo-actor` process."""

    count: int = Field(default=2, ge=1)
    """Actors that `matpo run` starts on this machine."""
    concurrency: int = Field(default=64, ge=1)
    """Live episodes per actor."""
    engine: Engine = EmbeddedEngine()
    weights: ActorWeights = ActorWeights()
    generate_timeout_s: float = Field(default=120.0, gt=0)
    outbox_limit_trees: int = Field(default=2_000, ge=1)
    """Finished trees kept on disk while the hub is away; then playing pauses."""

    @field_validator("engine", mode="before")
    @classmethod
    def _default_engine(cls, value: object) -> object:
        """Options of the default engine may be given without its kind."""
        return {"kind": EmbeddedEngine().kind, **value} if isinstance(value, dict) else value


class Learner(Section):
    """One `matpo-learner`: what a step trains on and how."""

    groups_per_step: int = Field(default=16, ge=1)
    group_size: int = Field(default=8, ge=2)
    """G, episodes per task."""
    credit: Credit = Broadcast()
    weighting: Literal["tree", "token", "trajectory", "constant"] = "tree"
    constant_tokens: int = Field(default=1024, ge=1)
    """`constant` weighting (Dr. GRPO): every tree is divided by this many tokens."""
    role_factors: dict[str, float] = Field(default={})
    """Multiplies the loss weight of a role's tokens; 1 for roles not named, 0 freezes a role."""
    objective: Objective = Dppo()
    optimizer_steps_per_batch: int = Field(default=1, ge=1)
    lr: float = Field(default=1e-5, gt=0)
    lr_schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    grad_clip: float = Field(default=1.0, gt=0)
    collapse: Collapse = Collapse()
    ess_guard: bool = False
    """Multiply the rate by sqrt(ESS), the effective share of samples (Σ R)² / (T Σ R²) (VCPO, arXiv 2602.17616)."""
    zero_variance: Literal["keep", "filter", "resample"] = "keep"
    """Groups that teach nothing because all advantages are 0: `keep` them among the step's trees, `filter` them out, or
    `resample`: the hub closes groups of equal rewards before the step and admits others (dynamic sampling)."""
    device: Device = "cpu"
    """`cpu` or `cuda`; of several ranks each takes a GPU of its own."""
    ranks: int = Field(default=1, ge=1)
    """Processes on this machine that train together, one a GPU; on several machines `accelerate launch` says it."""
    rank_timeout_s: float = Field(default=900.0, gt=0)
    """Longest a rank waits for another before it gives up and all are started again; above the time of a checkpoint."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; master weights and log-probabilities stay float32."""
    attention: AttentionChoice = "auto"
    """How shared prefixes are computed once (docs/training.md); "packed" shares nothing and serves every model."""
    publish_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    threads: int = Field(default=1, ge=1)
    micro_batch_tokens: int = Field(default=16_384, ge=64)
    """Most distinct tokens computed at once."""
    gradient_checkpointing: Literal["auto", "always", "never"] = "auto"
    """Compute layers twice instead of keeping what they computed; `auto`: for micro-batches that would not fit."""
    checkpoint_every_steps: int = Field(default=20, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _attention_runs(self) -> Learner:
        check_attention(self.attention, device=self.device, dtype=self.dtype)
        return self

    @model_validator(mode="after")
    def _rollback_possible(self) -> Learner:
        if self.collapse.action == "rollback" and self.keep_checkpoints < 2:
            raise ValueError(
                'learner.collapse.action = "rollback" goes back to a checkpoint of before the first sign; set'
                " learner.keep_checkpoints to 2 or more"
            )
        return self

    @property
    def trees_per_step(self) -> int:
        """Trees one optimizer step consumes when every group is complete."""
        return self.groups_per_step * self.group_size


class Evaluation(Section):
    """Held-out questions played with other sampling, beside training."""

    questions: int = Field(default=200, ge=0)
    """Before the first and after the last step."""
    every_steps: int = Field(default=0, ge=0)
    """0: only before and after."""
    questions_during: int = Field(default=64, ge=0)
    temperature: float = Field(default=0.0, ge=0)


class Config(Section):
    """Everything a run needs to know. `matpo config FILE` prints it resolved."""

    run: Run = Run()
    model: Model
    data: Data
    episode: Episode
    tools: Tools = Tools()
    actor: Actor = Actor()
    hub: Hub = Hub()
    freshness: Freshness = Freshness()
    learner: Learner = Learner()
    rewards: Rewards = Rewards()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.hub.min_group > self.learner.group_size:
            raise ValueError(
                f"hub.min_group ({self.hub.min_group}) must be at most learner.group_size ({self.learner.group_size})"
            )
        if self.hub.keep_trained != "all" and self.learner.keep_checkpoints < 2:
            raise ValueError(
                f"hub.keep_trained = {self.hub.keep_trained!r} needs a checkpoint to fall back to; set"
                " learner.keep_checkpoints to 2 or more"
            )
        engine = self.actor.engine
        if self.actor.count > 1 and isinstance(engine, SglangEngine) and engine.exclusive:
            raise ValueError(
                f"actor.count = {self.actor.count}, and all of them would use the same servers or GPUs; set it to 1 and"
                " give that actor several servers"
            )
        if self.actor.weights.relay_key is not None and self.hub.key_dir is None:
            raise ValueError("actor.weights.relay_key has no effect without keys; set hub.key_dir")
        return self

    @model_validator(mode="after")
    def _roles_trained(self) -> Config:
        roles = self.episode.roles
        reason = contradiction(
            self.model.lora,
            self.learner.role_factors,
            roles=roles,
            elsewhere=[name for name, role in roles.items() if role.endpoint is not None],
            greedy=[name for name, role in roles.items() if role.sampling.temperature == 0],
        )
        if reason is not None:
            raise ValueError(reason)
        return self

    @model_validator(mode="after")
    def _goes_together(self) -> Config:
        episode, learner = self.episode, self.learner
        delegates = {name: role.delegates for name, role in episode.roles.items()}
        earn, replay = self.rewards.workers != "none", episode.replay is not None
        shows = shown(episode.workflow, episode.root, delegates, workers_earn=earn, replayed=replay)
        reason = refusal(episode.workflow.kind, shows, learner.credit, learner.objective)
        if self.rewards.local is not None and not isinstance(learner.credit, AgentTurn):
            reason = reason or f"rewards.local has no effect with learner.credit {learner.credit.name!r}; remove it"
        reason = reason or misfit(episode.workflow.kind, learner.credit, tuple(delegates), learner.zero_variance)
        if replay:
            reason = reason or idle(episode.workflow, learner.credit) or stateful(self.tools.mcpServers)
        if reason is not None:
            raise ValueError(reason)
        return self

    @model_validator(mode="after")
    def _adapters_served(self) -> Config:
        engine = self.actor.engine
        if self.model.served_adapter is not None and isinstance(engine, SglangEngine):
            instead = 'or set model.lora.publish = "merged"'
            if engine.handover != "disk":
                raise ValueError(f'model.lora is served from folders; set actor.engine.handover = "disk", {instead}')
            if engine.router is not None:
                raise ValueError(
                    f"model.lora is not served behind a router; name the servers in actor.engine.urls, {instead}"
                )
            if engine.swap != "retract":
                raise ValueError("with model.lora nothing is swapped under a request; remove actor.engine.swap")
        return self

    @property
    def shared_digest(self) -> str:
        """Digest of what actors and learner must agree on, exchanged when an actor says hello."""
        parts = [self.episode, self.tools, self.rewards, self.learner.group_size, self.model.lora]
        content = [p.model_dump(mode="json") if isinstance(p, BaseModel) else p for p in parts]
        return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]
