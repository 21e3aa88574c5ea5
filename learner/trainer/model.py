"""The policy being trained: a Hugging Face causal model with plain attention, float32 master weights, run on tries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from learner.trainer.attention.choice import choose_attention
from learner.trainer.attention.interface import implementation, register
from learner.trainer.attention.packed import hidden_of_paths
from learner.trainer.attention.plan import AttentionPlan, plan_attention
from learner.trainer.costs import ModelShape, Work
from learner.trainer.head import Head, output_projection
from learner.trainer.lora import Adapter
from learner.trainer.pack import MicroBatch
from learner.trainer.ranks import ALONE, Ranks
from learner.trainer.recompute import Recompute, saved_bytes
from learner.trainer.sharding import shard
from learner.trainer.trie import build_trie
from matpo.attention_config import Attention
from matpo.config import Learner, Lora
from matpo.errors import UserError

PROBE_TOLERANCE = 1e-3
"""Largest difference from the model's own forward pass, relative to the largest entry."""
PACKED_REMEDY = 'learner.attention = "packed" trains it, every sequence by itself'

MEASURED_TOKENS = (32, 64)
"""Lengths of the two sequences whose forward passes tell how much memory a token takes."""


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """A causal model split into its body and its output projection."""

    model: PreTrainedModel
    body: torch.nn.Module
    head: Head
    parameters: dict[str, torch.nn.Parameter]
    """Those that are trained, by the name they travel under: Hugging Face's, where tied ones appear once, under the
    input embedding's; of an adapter PEFT's."""
    adapter: Adapter | None
    attention: Attention
    logit_scale: float
    """Some models multiply their logits by a constant; here their last hidden states are."""
    dtype: torch.dtype
    device: torch.device
    shape: ModelShape
    recompute: Recompute

    @property
    def vocabulary(self) -> int:
        """Token ids the model knows."""
        return self.head.weight.shape[0]

    @property
    def published(self) -> Mapping[str, Tensor]:
        """What travels to the engines, by name."""
        return self.parameters if self.adapter is None else self.adapter.published

    @classmethod
    def load(
        cls,
        folder: Path,
        learner: Learner,
        lora: Lora | None = None,
        *,
        seed: int = 0,
        frozen: bool = False,
        ranks: Ranks = ALONE,
    ) -> Policy:
        """Read a Hugging Face folder, on the first rank; the others get their part of the weights from it.

        Raises `UserError` for one that cannot be read or cannot run over a trie.
        """
        register()
        disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it bare
        try:
            if ranks.first:
                # Files are data: neither pickled weights nor the folder's own code is run.
                model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
                )
            else:
                model = without_weights(folder)
        except RuntimeError as error:
            raise UserError(
                f"model {str(folder)!r}: its weights do not fit its config.json; give a folder where they do"
            ) from error
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"model {str(folder)!r} cannot be loaded: {str(error).splitlines()[0]};"
                " give the folder of a Hugging Face causal model"
            ) from error
        return cls.of(model, learner, lora, seed=seed, frozen=frozen, ranks=ranks)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        learner: Learner,
        lora: Lora | None = None,
        *,
        seed: int = 0,
        frozen: bool = False,
        ranks: Ranks = ALONE,
    ) -> Policy:
        """Prepare a model already in memory; its weights become the float32 master weights.

        With `lora` they are frozen, and the adapter, drawn from `seed`, is trained instead; `frozen` trains nothing.
        The first of several ranks looks at the model in host memory; then each takes its part of it to its device.
        """
        register()
        device = usable(learner.device) if ranks.count == 1 else model.device
        # Dropout would make π depend on the draw; evaluation mode switches it off and keeps gradients.
        torch.nn.Module.to(model, device=device, dtype=torch.float32)
        torch.nn.Module.train(model, False)
        projection = output_projection(model)
        adapter = None if lora is None else Adapter.attach(model, lora, seed=seed)
        dtype = torch.bfloat16 if learner.dtype == "bfloat16" else torch.float32
        if frozen:
            model.requires_grad_(False)
        policy = cls(
            model=model,
            body=model.base_model,
            head=Head.of(projection, dtype),
            parameters=dict(model.named_parameters()) if adapter is None else adapter.parameters,
            adapter=adapter,
            attention=choose_attention(learner),
            logit_scale=logit_scale_of(model),
            dtype=dtype,
            device=device,
            shape=shape_of(model, projection, silent=0 if adapter is None else adapter.silent),
            recompute=Recompute.of(model.base_model, learner.gradient_checkpointing, device),
        )
        if ranks.first:
            policy._probe()
        if adapter is not None or frozen:
            narrow_frozen(model, dtype)
        if learner.gradient_checkpointing == "auto" and ranks.first:
            policy._measure()
        return policy if ranks.count == 1 else policy._spread(projection, ranks)

    def _spread(self, projection: torch.nn.Linear, ranks: Ranks) -> Policy:
        """This policy with a part of every parameter on each rank's device."""
        if self.attention == "packed":
            # Ranks gather parameters together, so each must run the model as often as the others.
            raise UserError('learner.attention = "packed" trains on one rank only; set learner.ranks = 1')
        self.model.set_attn_implementation(implementation(self.attention))
        shard(self.model, ranks=ranks, dtype=self.dtype)
        self.recompute.device = ranks.device
        self.recompute.bytes_per_token = int(ranks.most([self.recompute.bytes_per_token])[0])
        adapter = None if self.adapter is None else Adapter.of(self.model, self.adapter.lora)
        parameters = dict(self.model.named_parameters()) if adapter is None else adapter.parameters
        head = Head.of(projection, self.dtype)
        return replace(self, head=head, parameters=parameters, adapter=adapter, device=ranks.device)

    def hidden(self, tokens_N: Tensor, positions_N: Tensor, plan: AttentionPlan, *, recompute: bool = False) -> Tensor:
        """Last hidden states [N, E] of a trie's tokens, of which the logits are a linear map.

        With `recompute` the backward pass computes layers again.
        """
        self.recompute.on = recompute
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden = self._hidden(tokens_N, positions_N, plan)
        return hidden if self.logit_scale == 1.0 else hidden * self.logit_scale

    def play(self, adapter: str) -> None:
        """Which of several adapters `hidden` computes with from now on, backward too."""
        if self.adapter is not None:
            self.adapter.play(adapter)

    def work(self, batch: MicroBatch) -> Work:
        """What a micro-batch takes: that of its distinct tokens, or, where prefixes are not shared, of all paths with
        their padding."""
        if self.attention != "packed":
            return batch.computed
        paths = batch.plan.paths
        return Work(paths.rows, paths.pairs, batch.computed.scored)

    def _hidden(self, tokens_N: Tensor, positions_N: Tensor, plan: AttentionPlan) -> Tensor:
        if self.attention == "packed":
            return hidden_of_paths(self._own_hidden, tokens_N, plan.paths)
        output = self.body(input_ids=tokens_N[None], position_ids=positions_N[None], use_cache=False, trie_plan=plan)
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def _measure(self) -> None:
        """Find how many bytes a further token makes a forward pass keep."""

        def saved(count: int) -> int:
            trie = build_trie([np.zeros(count, np.int32)])
            tokens, positions = (torch.from_numpy(array).to(self.device) for array in (trie.tokens, trie.positions))
            return saved_bytes(lambda: self.hidden(tokens, positions, plan_attention(trie, self.device)), self.model)

        few, many = MEASURED_TOKENS
        self.recompute.bytes_per_token = (saved(many) - saved(few)) // (many - few)

    def _own_hidden(self, tokens_PL: Tensor) -> Tensor:
        hidden: Tensor = self.body(input_ids=tokens_PL, use_cache=False).last_hidden_state
        return hidden

    def _probe(self) -> None:
        """Compare hidden states over a trie with the model's own on two short sequences, and the head with the model's.

        Catches every architecture that cannot be served (linear attention, soft-capped logits, …) before a
        step is taken on it. Ends with the chosen attention switched on.
        """
        short = np.random.default_rng(0).integers(0, self.vocabulary, (2, 9), dtype=np.int32)
        short[1, :4] = short[0, :4]
        trie = build_trie(list(short))
        rows, tokens, positions = (
            torch.from_numpy(array).long().to(self.device) for array in (short, trie.tokens, trie.positions)
        )
        name = type(self.model).__name__
        with torch.no_grad():
            logits = torch.cat([self.model(row[None], use_cache=False).logits[0] for row in rows])
            own = torch.cat([self._own_hidden(row[None])[0] for row in rows])
            ours = torch.nn.functional.linear(own * self.logit_scale, self.head.weight, self.head.bias)
            difference = _relative(ours, logits)
            if not difference <= PROBE_TOLERANCE:
                raise UserError(
                    f"model {name} cannot be trained: its logits differ by {difference:.2g} (relative) from a linear"
                    " map of its last hidden states; models that cap them are not served"
                )
            if self.attention == "packed":
                return
            self.model.set_attn_implementation(implementation(self.attention))
            try:
                hidden = self._hidden(tokens, positions, plan_attention(trie, self.device))
            except (ValueError, TypeError) as error:
                raise UserError(f"model {name} cannot share prefixes: {error}; {PACKED_REMEDY}") from error
        difference = _relative(hidden[torch.from_numpy(np.concatenate(trie.paths)).to(self.device)], own)
        if not difference <= PROBE_TOLERANCE:
            raise UserError(
                f"model {name} cannot share prefixes: its hidden states then differ by {difference:.2g} (relative), as"
                f" those of anything but causal softmax attention do; {PACKED_REMEDY}"
            )


def usable(device: str) -> torch.device:
    """The device. Raises `UserError` where torch does not have it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # what torch raises depends on how it was built
        reason = str(error).splitlines()[0]
        raise UserError(f"learner.device = {device!r}: {reason}; set it to cpu, or install torch for it") from error


def without_weights(folder: Path) -> PreTrainedModel:
    """The model of a Hugging Face folder on the `meta` device."""
    shape = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)  # type: ignore[no-untyped-call]  # left bare
    return model


def narrow_frozen(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Keep frozen matrices in the compute type: a forward pass would round them to it anyway."""
    embedding: torch.nn.Module = model.get_input_embeddings()
    for module in model.modules():
        frozen = isinstance(module, torch.nn.Linear) and not module.weight.requires_grad
        if frozen and module.weight is not embedding.weight:  # a lookup is not rounded
            torch.nn.Module.to(module, dtype=dtype)


def _relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def logit_scale_of(model: PreTrainedModel) -> float:
    """What a model's configuration says its logits are multiplied (Cohere) or divided by (Granite)."""
    config = model.config.to_dict()
    return float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0)


def shape_of(model: PreTrainedModel, projection: torch.nn.Linear, *, silent: int) -> ModelShape:
    """The shape of a causal model; of a mixture of experts all of them count, not only those a token chooses.

    `silent`: trained parameters that a token is not multiplied with, of adapters other than its own.
    """
    embedding: torch.nn.Module = model.get_input_embeddings()
    outside = {id(p) for module in (embedding, projection) for p in module.parameters()}
    config = model.config.to_dict()
    heads = config["num_attention_heads"]
    matrices = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in outside]
    return ModelShape(
        body_parameters=sum(p.numel() for p in matrices) - silent,
        trained_parameters=sum(p.numel() for p in matrices if p.requires_grad) - silent,
        layers=config["num_hidden_layers"],
        attention_width=heads * (config.get("head_dim") or config["hidden_size"] // heads),
        hidden=projection.in_features,
        vocabulary=projection.out_features,
        head_trained=projection.weight.requires_grad,
    )
