"""Remakes the quick start's warm-start checkpoint from nothing: ``python -m learner.warmstart --out DIR``.

Reading curriculum, then scripted dialogues with the reading kept up beside them, then the figures on held-out worlds.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from learner.warmstart import figures, vocabulary
from learner.warmstart.demos import Demonstrator, Habits, SearchNoise
from learner.warmstart.fit import Example, Fitter, cosine, make_model
from learner.warmstart.play import Player
from learner.warmstart.recall import LEVELS, recall_example
from matpo.datasets.world import questions

RECALL_BATCH = 128
DEMO_BATCH = 96
REPLAY_BATCH = 24
PEAK_RATE = 1e-3
DEMO_WORLDS = 2_000
"""Demonstrations use worlds 0..1999."""
MAX_RECALL_STEPS = 2_000
ROUNDS = ((0, Habits(), 450, 1e-3), (1, Habits(stop_after_two_of_three=0.55, break_off=True), 150, 7e-4))
"""Rounds of dialogue, each with its own cosine decay: number, habits, steps, peak learning rate."""


def reader(tokenizer: PreTrainedTokenizerFast, seed: int, kept: Path | None) -> Qwen3ForCausalLM:
    """A model that can read: from the folder ``kept`` where that exists, else taught, and kept there."""
    if kept is not None and kept.exists():
        return Qwen3ForCausalLM.from_pretrained(str(kept))
    model = make_model(tokenizer, seed=seed)
    teach_reading(model, tokenizer, random.Random(seed))
    if kept is not None:
        model.save_pretrained(str(kept))
    return model


def teach_reading(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> None:
    """Climbs the curriculum; raises RuntimeError when it is not through after `MAX_RECALL_STEPS`."""
    fitter = Fitter(model, int(tokenizer.pad_token_id), rate=PEAK_RATE)
    began, level, accuracy = time.monotonic(), 0, 0.0
    while fitter.steps < MAX_RECALL_STEPS:
        report = fitter.step([recall_example(tokenizer, LEVELS[level], rng) for _ in range(RECALL_BATCH)])
        accuracy = 0.9 * accuracy + 0.1 * report.accuracy
        if fitter.steps % 20 == 0:
            seconds = time.monotonic() - began
            print(
                f"reading  step {fitter.steps:4d}  level {level}  accuracy {accuracy:.3f}  {seconds:.0f} s", flush=True
            )
        if accuracy > LEVELS[level].bar:
            level, accuracy = level + 1, 0.0
            if level == len(LEVELS):
                return
    raise RuntimeError(f"reading stayed at level {level} after {MAX_RECALL_STEPS} steps; try another --seed")


def teach_dialogue(model: Qwen3ForCausalLM, demonstrator: Demonstrator, *, steps: int, rate: float, seed: int) -> None:
    """Imitation of the demonstrations, with recall beside it so that reading stays."""
    rng = random.Random(f"matpo-dialogue-{seed}")
    tokenizer = demonstrator.tokenizer
    fitter = Fitter(model, int(tokenizer.pad_token_id), rate=rate)
    began = time.monotonic()
    for step in range(1, steps + 1):
        fitter.rate = rate * cosine(step / steps)
        batch: list[Example] = []
        while len(batch) < DEMO_BATCH:
            asked = rng.choice(questions(rng.randrange(DEMO_WORLDS), figures.QUESTIONS_PER_WORLD))
            batch += demonstrator.show(asked, rng)
        batch += [recall_example(tokenizer, LEVELS[-1], rng) for _ in range(REPLAY_BATCH)]
        report = fitter.step(batch, parts=4)
        if step % 20 == 0:
            seconds = time.monotonic() - began
            print(f"dialogue step {step:4d}/{steps}  loss {report.loss:.3f}  {seconds:.0f} s", flush=True)


def main() -> None:
    """Trains, saves, measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m learner.warmstart", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reading", type=Path, help="folder that keeps the model between the two stages")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = vocabulary.save_tokenizer(arguments.out)
    noise = SearchNoise()
    model = reader(tokenizer, arguments.seed, arguments.reading)
    for number, habits, steps, rate in ROUNDS:
        demonstrator = Demonstrator(tokenizer, habits, noise)
        teach_dialogue(model, demonstrator, steps=steps, rate=rate, seed=arguments.seed + number)
    model.save_pretrained(str(arguments.out))
    report = figures.measure(Player(tokenizer, noise), model)
    text = json.dumps(report, indent=2)
    (arguments.out / "figures.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
