"""An actor's tools: what their servers may refer to by `${…}` besides the environment, and the files behind it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import orjson

from actors.tools.expand import configured_entries
from actors.tools.plane import Starts, ToolPlane
from matpo.config import Config, WorldData
from matpo.datasets.world import collection, documents
from matpo.errors import UserError
from matpo.replay_config import stateful


def open_tools(
    config: Config, folder: Path, *, watch: Callable[[Starts], None] = lambda starts: None
) -> AbstractAsyncContextManager[ToolPlane]:
    """The configured servers, for all episodes of an actor; `folder` is for files of theirs, `watch` is given a look at
    their starts. Raises `UserError`."""
    if config.episode.replay is not None and (reason := stateful(configured_entries(config.tools))) is not None:
        raise UserError(reason)
    variables = tool_variables(config, folder=folder)
    return ToolPlane.open(config.tools, variables=variables, episodes=config.actor.concurrency, watch=watch)


def tool_variables(config: Config, *, folder: Path) -> Mapping[str, str]:
    """`PYTHON`, this interpreter; `WORLD_CORPUS`, written to `folder`, where the data is the generated world."""
    variables = {"PYTHON": sys.executable}
    seeds = sorted(
        {
            seed
            for dataset in (config.data.train, config.data.evaluation)
            if isinstance(dataset, WorldData)
            for seed in range(dataset.first_seed, dataset.first_seed + dataset.worlds)
        }
    )
    if seeds:
        folder.mkdir(parents=True, exist_ok=True)
        corpus = folder / "world.jsonl"
        write_corpus(corpus, seeds)
        variables["WORLD_CORPUS"] = str(corpus.resolve())
    return variables


def write_corpus(path: Path, seeds: list[int]) -> None:
    """One line per document of every world: id, text, collection."""
    draft = path.with_suffix(".draft")
    with draft.open("wb") as file:
        for seed in seeds:
            name = collection(seed)
            for identity, text in documents(seed):
                file.write(orjson.dumps({"id": identity, "text": text, "collection": name}) + b"\n")
    draft.replace(path)
