"""Teaches a warm-start checkpoint a third role, beside its own two: `python -m learner.warmstart.alone --out DIR`.

The agent of this role plans and searches by itself, with the same bad habits, so that planner and worker can be
compared with a single agent from the same start.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from learner.warmstart.demos import Demonstrator, Habits, SearchNoise
from learner.warmstart.figures import QUESTIONS_PER_WORLD
from learner.warmstart.fit import Example, Fitter, cosine
from learner.warmstart.recall import LEVELS, recall_example
from matpo.datasets.world import Question, questions

WORLDS = 2_000
"""Demonstrations use worlds 0..1999, as those of the other roles."""
ALONE, TEAM, RECALL = 48, 48, 16
"""Sequences of a batch: the new role's, the old roles' (so that they stay), and reading."""


def teach(model: Qwen3ForCausalLM, demonstrator: Demonstrator, *, steps: int, rate: float, seed: int) -> None:
    """Imitation, with a cosine decay."""
    rng, tokenizer = random.Random(f"matpo-alone-{seed}"), demonstrator.tokenizer
    fitter = Fitter(model, int(tokenizer.pad_token_id), rate=rate)
    for step in range(1, steps + 1):
        fitter.rate = rate * cosine(step / steps)
        batch = [demonstrator.show_alone(ask(rng), rng) for _ in range(ALONE)]
        team: list[Example] = []
        while len(team) < TEAM:
            team += demonstrator.show(ask(rng), rng)
        batch += team
        batch += [recall_example(tokenizer, LEVELS[-1], rng) for _ in range(RECALL)]
        report = fitter.step(batch, parts=4)
        if step % 20 == 0:
            print(f"step {step:4d}/{steps}  loss {report.loss:.3f}  accuracy {report.accuracy:.3f}", flush=True)


def ask(rng: random.Random) -> Question:
    """Any question about any world of the demonstrations."""
    return rng.choice(questions(rng.randrange(WORLDS), QUESTIONS_PER_WORLD))


def main() -> None:
    """Load, teach, save."""
    parser = argparse.ArgumentParser(prog="python -m learner.warmstart.alone", description=__doc__)
    parser.add_argument("--base", type=Path, default=Path("models/quickstart"), help="what it starts from")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.base)
    model = Qwen3ForCausalLM.from_pretrained(options.base)
    demonstrator = Demonstrator(tokenizer, Habits(stop_after_two_of_three=0.55, break_off=True), SearchNoise())
    teach(model, demonstrator, steps=options.steps, rate=7e-4, seed=options.seed)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
