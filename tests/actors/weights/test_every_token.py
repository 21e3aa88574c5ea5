"""Every sampled token carries the version that sampled it, and that version's digest is the published one: through
deltas, a damaged delta and a learner that went back to a checkpoint, each recomputed with Hugging Face in float32."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from actors.engines.embedded.engine import EmbeddedEngine
from actors.engines.engine import Engine, Generation
from matpo.config import EmbeddedEngine as Settings
from matpo.config import Sampling
from protocols.messages import WeightsReady
from protocols.records import Floats, Tokens, lineage_of
from tests.actors.engines.models import END, make_model, weights_of
from tests.actors.weights.rig import Actor, learner

PLAYERS, TOKENS = 2, 24


@dataclass
class Play:
    """Answers sampled while weights changed underneath."""

    engine: Engine
    answers: list[tuple[Tokens, Generation]] = field(default_factory=list)
    changed: anyio.Event = field(default_factory=anyio.Event)

    async def run(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        while True:
            prompt = random.integers(0, END, 6).astype(np.int32)
            answer = await self.engine.generate(prompt, Sampling(max_tokens=TOKENS), deadline_s=60.0)
            self.answers.append((prompt, answer))
            self.changed.set()
            self.changed = anyio.Event()

    async def wait_sampled(self, version: int) -> None:
        """Until an answer came that the version had a part in."""
        while not any(version in answer.versions for _, answer in self.answers):
            await self.changed.wait()


def moved(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model some steps away: close enough for deltas, far enough for other probabilities."""
    torch.manual_seed(seed)
    copied = deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter) * (torch.rand_like(parameter) < 0.2))
    return copied


def recomputed(models: dict[int, PreTrainedModel], prompt: Tokens, answer: Generation) -> Floats:
    """log p of every token under its recorded version. Over a swap, keys and values stay as they were computed."""
    cache, fed, picked = DynamicCache(), prompt.tolist(), []
    with torch.no_grad():
        for token, version in zip(answer.tokens.tolist(), answer.versions.tolist(), strict=True):
            logits = models[version](torch.tensor([fed]), past_key_values=cache).logits[0, -1]
            picked.append(float(torch.log_softmax(logits.float(), dim=-1)[token]))
            fed = [token]
    return np.asarray(picked, dtype=np.float32)


async def test_versions_and_digests_are_right_on_every_token(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    models: dict[int, PreTrainedModel] = {}
    published: dict[int, WeightsReady] = {}
    async with (
        learner(tmp_path / "run", limit_s=90.0) as run,
        EmbeddedEngine.open(tmp_path / "model", Settings(max_batch=4, max_context_tokens=64), seed=1) as engine,
        anyio.create_task_group() as tasks,
    ):
        actor, play = Actor("a", run.endpoint, engine, tmp_path / "a"), Play(engine)

        async def publish(step: int, *, spoil: bool = False) -> None:
            nonlocal model
            model = moved(model, seed=len(models))
            ready = await run.publish(weights_of(model), step=step, spoil=spoil)
            models[ready.version], published[ready.version] = model, ready
            await actor.wait_version(ready.version)
            await play.wait_sampled(ready.version)

        tasks.start_soon(actor.run)
        for seed in range(PLAYERS):
            tasks.start_soon(play.run, seed)
        await publish(0)
        await publish(1)
        await publish(2, spoil=True)
        await publish(3)
        await run.begin()  # from the checkpoint of step 1
        await publish(1)
        await publish(2)
        tasks.cancel_scope.cancel()
    assert actor.failures == {"broken": 1}
    assert {lineage_of(version) for version in published} == {0, 1}
    sampled = np.unique(np.concatenate([answer.versions for _, answer in play.answers]))
    assert sampled.tolist() == sorted(published)
    assert {v: engine.digests[v] for v in sampled.tolist()} == {v: ready.digest for v, ready in published.items()}
    assert any(len(np.unique(answer.versions)) > 1 for _, answer in play.answers)
    for prompt, answer in play.answers:
        np.testing.assert_allclose(answer.logprobs, recomputed(models, prompt, answer), atol=1e-4, rtol=0)
