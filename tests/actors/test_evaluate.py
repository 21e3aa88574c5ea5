"""The figures of `matpo eval`: means over questions of means over episodes, infrastructure left out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from actors.evaluate import Line, chosen_weights, line_of, lines_by
from matpo.adapters import CONFIG_FILE, TENSOR_FILE, merged, peft_config
from matpo.config import Lora, Model
from protocols.records import EpisodeTree, Task
from protocols.weights import weights_digest, write_keyframe
from tests.actors.engines.models import adapt, adapter_of, make_model, weights_of
from tests.actors.trees import small_tree


def played(question: str, *, hops: int, answer: float | None, form: float | None = 1.0) -> EpisodeTree:
    rewards = {"answer": answer, "format": form, "reading": None, "total": answer}
    task = Task.make(question, ("me",), {"hops": hops})
    return dataclasses.replace(small_tree("t"), task=task, rewards=rewards)


def test_a_question_counts_once_however_many_of_its_episodes_were_scored() -> None:
    trees = [
        played("a", hops=1, answer=1.0, form=0.5),
        played("a", hops=1, answer=0.0, form=0.5),
        played("b", hops=1, answer=0.0),
        played("b", hops=1, answer=None, form=None),
    ]
    # a: 1/2, b: 0 of the one that was scored
    assert line_of(trees) == Line(questions=2, answer=0.25, format=0.75, reading=None, unscored=1)


def test_lines_are_split_by_what_the_tasks_say_of_themselves() -> None:
    trees = [played("a", hops=1, answer=1.0), played("b", hops=2, answer=0.0), played("c", hops=2, answer=1.0)]
    assert {hops: line.answer for hops, line in lines_by(trees, "hops").items()} == {"1": 1.0, "2": 0.5}
    assert lines_by(trees, "template") == {}


def test_an_adapter_is_handed_over_as_it_is_or_merged_as_the_run_publishes(tmp_path: Path) -> None:
    lora = Lora(rank=4, alpha=6.0)
    base = make_model("qwen3", tmp_path / "model")
    adapter = adapter_of(adapt(base, lora, seed=1))
    write_keyframe(tmp_path / TENSOR_FILE, adapter, version=0)
    (tmp_path / CONFIG_FILE).write_bytes(peft_config(lora, base=tmp_path / "model"))
    alone = chosen_weights(Model(path=tmp_path / "model", lora=lora), tmp_path)
    assert weights_digest(alone) == weights_digest(adapter)
    model = Model(path=tmp_path / "model", lora=lora.model_copy(update={"publish": "merged"}))
    assert weights_digest(chosen_weights(model, tmp_path)) == weights_digest(merged(weights_of(base), adapter, lora))
