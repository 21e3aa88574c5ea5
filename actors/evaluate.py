"""`matpo eval`: plays the evaluation questions with one model, without hub or training, and prints what came of it."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from actors.elsewhere import open_elsewhere
from actors.engines.folder import read_model_weights
from actors.engines.opening import open_engine
from actors.episode import play_episode
from actors.failure import user_error
from actors.scene import Stage
from actors.setting import open_tools
from matpo.adapters import merged, read_adapter
from matpo.config import Config, Model
from matpo.datasets.load import load_tasks
from matpo.errors import UserError, run_command
from matpo.load import load_config
from matpo.logs import configure_logs
from matpo.model_files import model_folder, require_model_files
from matpo.rewards.code import require_tests
from protocols.records import EpisodeTree, Task
from protocols.weights import Weights


@dataclass(frozen=True, slots=True)
class Line:
    """What a set of questions came to; every mean is over questions of the mean over their scored episodes."""

    questions: int
    answer: float | None
    """mean@k; None when nothing could be scored."""
    format: float | None
    reading: float | None
    """Of searches whose right document was not the first hit: how often the worker reported it."""
    unscored: int
    """Episodes that infrastructure broke."""


def line_of(trees: Iterable[EpisodeTree]) -> Line:
    """Summarise episodes, grouped by question."""
    by_question: dict[str, list[EpisodeTree]] = {}
    for tree in trees:
        by_question.setdefault(tree.task.task_id, []).append(tree)
    groups = list(by_question.values())
    return Line(
        questions=len(groups),
        answer=_mean_of_means(groups, "answer"),
        format=_mean_of_means(groups, "format"),
        reading=_mean_of_means(groups, "reading"),
        unscored=sum(tree.reward is None for group in groups for tree in group),
    )


def _mean_of_means(groups: Sequence[Sequence[EpisodeTree]], part: str) -> float | None:
    scored = [[v for tree in group if (v := tree.rewards.get(part)) is not None] for group in groups]
    means = [sum(values) / len(values) for values in scored if values]
    return sum(means) / len(means) if means else None


def lines_by(trees: Sequence[EpisodeTree], key: str) -> dict[str, Line]:
    """A line per value of the metadata field `key`; empty when no task has it."""
    values = sorted({str(tree.task.metadata[key]) for tree in trees if key in tree.task.metadata})
    return {v: line_of(tree for tree in trees if str(tree.task.metadata.get(key)) == v) for v in values}


async def play_all(
    config: Config, tasks: Sequence[Task], *, weights: Weights, repeats: int, played: Callable[[], object]
) -> list[EpisodeTree]:
    """Play every task `repeats` times with these weights; `played` is called after every episode."""
    model, lora = model_folder(config.model), config.model.served_adapter
    trees: list[EpisodeTree] = []
    limiter = anyio.CapacityLimiter(config.actor.concurrency)

    async def play(task: Task, episode: int) -> None:
        async with limiter:
            tree = await play_episode(
                task, lease_id="eval", group_id=task.task_id, episode=episode, purpose="eval", stage=stage
            )
        trees.append(tree)
        played()

    with tempfile.TemporaryDirectory(prefix="matpo-eval-") as folder:
        async with (
            open_engine(model, config.actor.engine, lora=lora, seed=config.run.seed) as engine,
            open_tools(config, Path(folder)) as tools,
            open_elsewhere(config) as elsewhere,
        ):
            stage = Stage.open(config, engine=engine, tools=tools, actor_id="eval", elsewhere=elsewhere)
            try:
                await engine.load(weights, version=0)
            except ValueError as error:
                raise UserError(f"model {str(model)!r}: {error}") from error
            async with anyio.create_task_group() as episodes:
                for episode in range(repeats):
                    for task in tasks:
                        episodes.start_soon(play, task, episode)
    return trees


def chosen_weights(model: Model, adapter: Path | None) -> Weights:
    """What the engine of this config loads: the model's weights, the adapter's, or with `model.lora.publish = "merged"`
    both in one. Raises `UserError`.
    """
    if model.lora is None:
        if adapter is not None:
            raise UserError(f"--adapter {str(adapter)!r} needs model.lora in the config: rank, alpha, target_modules")
        return read_model_weights(model_folder(model))
    if adapter is None:
        raise UserError("the config has model.lora: give the adapter with --adapter FOLDER, or remove model.lora")
    weights = read_adapter(adapter, model.lora)
    if model.served_adapter is not None:
        return weights
    try:
        return merged(read_model_weights(model_folder(model)), weights, model.lora)
    except ValueError as error:
        raise UserError(f"adapter in {str(adapter)!r} and model {str(model.path)!r}: {error}") from error


def print_lines(trees: Sequence[EpisodeTree], *, repeats: int, console: Console) -> None:
    """The table, then the same figures as one JSON object."""
    sections = {"all": {"all": line_of(trees)}} | {key: lines_by(trees, key) for key in ("hops", "template")}
    table = Table("questions", "played", f"answer (mean@{repeats})", "format", "reading", "unscored")
    table.columns[0].no_wrap = True
    for name, lines in sections.items():
        for value, line in lines.items():
            shares = [_share(line.answer), _share(line.format), _share(line.reading)]
            label = f"{value} {name}" if name == "hops" else value
            table.add_row(label, str(line.questions), *shares, str(line.unscored), end_section=value == list(lines)[-1])
    console.print(table)
    print(json.dumps({name: {v: _figures(line) for v, line in lines.items()} for name, lines in sections.items()}))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _figures(line: Line) -> dict[str, float | int | None]:
    return {
        "questions": line.questions,
        "answer": line.answer,
        "format": line.format,
        "reading": line.reading,
        "unscored": line.unscored,
    }


def run(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, play, print."""
    parser = argparse.ArgumentParser(prog="matpo eval", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as evaluation.questions=9")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder instead of model.path")
    parser.add_argument("--adapter", type=Path, help="a PEFT folder, for a config with model.lora")
    parser.add_argument("--repeats", type=int, default=1, metavar="K", help="episodes per question (mean@K)")
    given = parser.parse_intermixed_args(arguments)
    chosen = [] if given.model is None else [f"model.path={given.model}"]
    config = load_config(given.config, [*given.overrides, *chosen])
    if given.repeats < 1:
        raise UserError(f"--repeats {given.repeats} must be at least 1")
    require_model_files(config.model)
    tasks = load_tasks(config.data.evaluation, seed=config.run.seed)[: config.evaluation.questions]
    require_tests(tasks, config.rewards)
    if not tasks:
        raise UserError(f"there is nothing to play: evaluation.questions = {config.evaluation.questions}")
    weights = chosen_weights(config.model, given.adapter)
    configure_logs(None, component="eval")
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("episodes", total=given.repeats * len(tasks))

        async def play() -> list[EpisodeTree]:
            return await play_all(
                config, tasks, weights=weights, repeats=given.repeats, played=lambda: progress.advance(bar)
            )

        try:
            trees = anyio.run(play, backend_options={"use_uvloop": True})
        except BaseExceptionGroup as group:
            known = user_error(group)
            if known is None:
                raise
            raise known from group
    print_lines(trees, repeats=given.repeats, console=Console())
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(run))
