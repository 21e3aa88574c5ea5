"""Adapters: which tensors they hold, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from matpo.adapters import adapter_shapes, merged, peft_config, read_adapter, targeted
from matpo.config import Lora
from matpo.errors import UserError
from protocols.weights import Tensor, weights_digest, write_keyframe

SHAPES = {
    "model.embed_tokens.weight": (64, 8),
    "model.layers.0.self_attn.q_proj.weight": (16, 8),
    "model.layers.0.self_attn.q_proj.bias": (16,),
    "model.layers.0.self_attn.o_proj.weight": (8, 16),
    "model.layers.0.self_attn.q_norm.weight": (4,),
}
LORA = Lora(rank=2, alpha=3.0, target_modules=("q_proj", "o_proj"))
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def tensors() -> dict[str, Tensor]:
    return {name: Tensor("float32", np.ones(s, dtype=np.float32)) for name, s in adapter_shapes(SHAPES, LORA).items()}


def saved(folder: Path, **changes: object) -> Path:
    config = json.loads(peft_config(LORA, base=Path("base"))) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_keyframe(folder / "adapter_model.safetensors", tensors(), version=0)
    return folder


def test_an_adapter_holds_a_and_b_of_every_targeted_projection_under_pefts_names() -> None:
    shapes = adapter_shapes(SHAPES, LORA)
    assert shapes[Q + "A.weight"] == (2, 8) and shapes[Q + "B.weight"] == (16, 2)
    assert len(shapes) == 4


def test_projections_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(UserError, match=r"names \['up_proj'\], which the model does not have"):
        targeted(SHAPES, Lora(target_modules=("q_proj", "up_proj")))


def test_a_saved_adapter_comes_back_as_it_was(tmp_path: Path) -> None:
    assert weights_digest(read_adapter(saved(tmp_path), LORA)) == weights_digest(tensors())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 4}, r"\(4, 3\.0, \['o_proj', 'q_proj'\]\)"),
        ({"use_rslora": True}, "not supported"),
        ({"modules_to_save": ["lm_head"]}, "not supported"),
        ({"target_modules": 3}, "target_modules = 3: must be a list; give a folder that PEFT saved"),
    ],
)
def test_an_adapter_that_is_not_as_the_config_says_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_adapter(saved(tmp_path, **changes), LORA)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no adapter_config\.json"):
        read_adapter(tmp_path, LORA)


def test_merging_adds_the_scaled_product_to_targeted_weights_alone() -> None:
    base = {name: Tensor("float32", np.full(shape, 0.5, dtype=np.float32)) for name, shape in SHAPES.items()}
    rounded = Tensor("bfloat16", np.full((16, 8), 0x3F00, dtype=np.uint16))  # 0.5
    whole = merged({**base, "model.layers.0.self_attn.q_proj.weight": rounded}, tensors(), LORA)
    for projection in ("q_proj", "o_proj"):
        changed = whole[f"model.layers.0.self_attn.{projection}.weight"]
        assert changed.dtype == "float32"
        assert (changed.data == 0.5 + 3.0 / 2 * 2).all()
    unchanged = set(SHAPES) - {f"model.layers.0.self_attn.{p}.weight" for p in ("q_proj", "o_proj")}
    assert all(whole[name] is base[name] for name in unchanged)


def test_an_adapter_of_another_rank_is_not_merged() -> None:
    base = {name: Tensor("float32", np.ones(shape, dtype=np.float32)) for name, shape in SHAPES.items()}
    with pytest.raises(ValueError, match=r"is \(16, 2\), expected \(16, 3\)|is \(2, 8\), expected \(3, 8\)"):
        merged(base, tensors(), LORA.model_copy(update={"rank": 3}))
