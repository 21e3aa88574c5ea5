"""`matpo run`: the learner and the actors of one run as child processes, watched until they are done."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio
from rich.console import Console

from matpo.cli.children import Children, shown_path
from matpo.cli.display import Display
from matpo.cli.report import print_report
from matpo.config import Config
from matpo.datasets.load import load_tasks
from matpo.errors import UserError, first_error
from matpo.folder import RunFolder
from matpo.load import load_config
from matpo.logs import configure_logs
from matpo.model_files import require_model_files
from matpo.rewards.code import require_tests
from matpo.rewards.measure import Measure
from matpo.rewards.score import Scorer
from protocols.keys import BadKeys, HubKeys
from protocols.refusals import ChannelError, check_listen

INTERRUPTED = 130


def run(config_path: Path, overrides: Sequence[str], *, resume: Path | None, dry_run: bool) -> int:
    """Train as `config_path` says and print the outcome; returns the exit code."""
    if resume is not None and overrides:
        raise UserError("--resume takes no overrides: a run keeps the settings it started with")
    old = None if resume is None else RunFolder.existing(resume)
    if old is not None:
        old.require_free()
    config = load_config(config_path, overrides) if old is None else load_config(old.config)
    check(config)
    console = Console()
    if dry_run:
        code = check_tools(config_path, overrides)
        if code == 0:
            console.print(f"{config_path}: everything that can be checked without training is in order")
        return code
    folder = old if old is not None else RunFolder.create(config)
    configure_logs(folder.log("run"), "run")
    console.print(f"run folder [bold]{shown_path(folder.path)}[/bold]  (Ctrl-C stops and saves)")
    began = time.monotonic()
    interrupted = _unwrap(lambda: anyio.run(_supervise, config, folder, console, backend_options={"use_uvloop": True}))
    if folder.summary.is_file():
        print_report(console, folder, seconds=time.monotonic() - began)
    if interrupted:
        console.print(f"stopped; go on with: matpo run {config_path} --resume {shown_path(folder.path)}")
        return INTERRUPTED
    return 0


def check(config: Config) -> None:
    """Find what is wrong before any process starts: model files, datasets, the address to listen on and its keys."""
    require_model_files(config.model)
    if config.tools.file is not None and not config.tools.file.is_file():
        raise UserError(f"tools.file {str(config.tools.file)!r} is no file; give the path of an mcpServers JSON file")
    check_rewards(config)
    for dataset in (config.data.train, config.data.evaluation):
        require_tests(load_tasks(dataset, seed=config.run.seed), config.rewards)
    try:
        check_listen(config.hub.listen, None if config.hub.key_dir is None else HubKeys.load(config.hub.key_dir))
    except (ChannelError, BadKeys) as error:
        raise UserError(str(error)) from error


def check_rewards(config: Config) -> None:
    """Find the functions and keys that rewards and roles elsewhere need. Raises `UserError`."""
    Measure(config.rewards)
    Scorer(config.rewards)
    for endpoint in (config.rewards.judge, *(role.endpoint for role in config.episode.roles.values())):
        if endpoint is not None:
            endpoint.api_key()


def check_tools(config_path: Path, overrides: Sequence[str]) -> int:
    """Start the tool servers once, in a process of their own, and look up every role's tools; returns its exit code."""
    command = [sys.executable, "-m", "actors.tools", "check", str(config_path), *overrides]
    return subprocess.run(command, check=False).returncode


async def _supervise(config: Config, folder: RunFolder, console: Console) -> bool:
    """Run the children to the end of the run; True if a signal ended it."""
    with Children(config, folder) as children:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_heed_signals, children, console, name="signals")
            tasks.start_soon(Display(config, folder, console).follow, name="display")
            await children.keep()
            tasks.cancel_scope.cancel()
    return children.interrupted and not folder.summary.is_file()


async def _heed_signals(children: Children, console: Console) -> None:
    """The first Ctrl-C drains, the second ends everything at once."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            if children.interrupted:
                await children.end_at_once()
            else:
                console.print("stopping: the learner saves, the actors return their work (Ctrl-C again ends at once)")
                children.drain()


def _unwrap(work: Callable[[], bool]) -> bool:
    """Call `work`; the first `UserError` inside an exception group is raised by itself."""
    try:
        return work()
    except BaseExceptionGroup as group:
        found = first_error(group, UserError)
        if found is None:
            raise
        raise found from group
