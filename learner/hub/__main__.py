"""`python -m learner.hub --run RUN`: leases, journal and weights of one run; survives the trainer and its own death.

Exit codes: 0 the run is complete (summary.json is written), 2 something to fix, 130 asked to stop before the end.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import anyio
import structlog

from learner.hub.core import Hub, Side
from learner.hub.journal import Journal, JournalUnreadable
from learner.hub.lock import only_writer
from learner.hub.service import Service
from learner.hub.summary import write_summary
from matpo.config import Config
from matpo.datasets.load import load_tasks
from matpo.errors import UserError, first_error, run_command
from matpo.folder import HubAddress, RunFolder, process_birth
from matpo.load import load_config
from matpo.logs import configure_logs
from matpo.metrics import MetricsFile
from matpo.model_files import tokenizer_digest
from matpo.owner import Owner, add_owned
from matpo.rewards.code import require_tests
from matpo.rooms import held, room
from protocols.channel import CannotListen, ChannelError, HubSocket, Limits
from protocols.keys import BadKeys, HubKeys

log: structlog.stdlib.BoundLogger = structlog.get_logger()

INTERRUPTED = 130
JOURNAL_FAILED = 1
"""The supervisor tries again, in case the disk was only full for a moment."""
GIVE_UP = (ChannelError, BadKeys, JournalUnreadable, UserError, sqlite3.OperationalError)
LONGEST_IPC_BYTES = 90
"""Unix socket paths end at about 107 bytes."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="learner.hub", description="The hub of one run.")
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    add_owned(parser)
    options = parser.parse_args()
    owner = Owner.at_standard_input(owned=options.owned)
    folder = RunFolder.existing(options.run.resolve())
    config = load_config(folder.config)
    configure_logs(folder.log("hub"), "hub")
    try:
        return anyio.run(serve, config, folder, owner, backend_options={"use_uvloop": True})
    except GIVE_UP as error:
        return give_up(folder, error)
    except BaseExceptionGroup as group:
        found = first_error(group, *GIVE_UP)
        if found is None:
            raise
        return give_up(folder, found)


def give_up(folder: RunFolder, error: Exception) -> int:
    """End with a line for people: a `UserError` for what they must fix, else an exit code to be started again with."""
    if not isinstance(error, sqlite3.OperationalError):
        raise UserError(str(error)) from error
    log.error("journal failed", reason=str(error))
    sys.stderr.write(f"error: journal {str(folder.journal)!r}: {error}; free disk space, nothing is lost\n")
    return JOURNAL_FAILED


async def serve(config: Config, folder: RunFolder, owner: Owner) -> int:
    """Open everything, serve the run, and write its summary when it is complete."""
    train = load_tasks(config.data.train, seed=config.run.seed)
    evaluation = load_tasks(config.data.evaluation, seed=config.run.seed)
    require_tests([*train, *evaluation], config.rewards)
    with only_writer(folder.journal), Journal.open(folder.journal) as journal:
        hub = Hub(
            config,
            journal,
            run=folder.path.name,
            weights=folder.weights,
            archive=folder.archive,
            tokenizer=tokenizer_digest(config.model),
            train=train,
            evaluation=evaluation,
            now_s=time.monotonic(),
        )
        async with bind_for_actors(config, folder) as actors, bind_for_trainer(config, folder) as trainer:
            write_address(folder, actors.endpoint, trainer.endpoint)
            log.info("listening", endpoint=actors.endpoint, trainer=trainer.endpoint, step=hub.batches.step)
            sockets: dict[Side, HubSocket] = {"actors": actors, "trainer": trainer}
            metrics = MetricsFile(folder.metrics)
            service = Service(
                hub,
                journal,
                metrics,
                sockets=sockets,
                steps=config.run.steps,
                heartbeat_s=config.hub.heartbeat_s,
                beat=owner.beat,
            )
            complete = await service.run()
            metrics.close()
        if complete:
            write_summary(journal, config, folder, complete=True)
        log.info("ended", complete=complete, step=hub.batches.step)
        return 0 if complete else INTERRUPTED


@asynccontextmanager
async def bind_for_actors(config: Config, folder: RunFolder) -> AsyncIterator[HubSocket]:
    """Listen where the hub of this run listened before, or where the settings say if that place is taken by now."""
    keys = None if config.hub.key_dir is None else HubKeys.load(config.hub.key_dir)
    limits = Limits(config.hub.max_messages_per_s, config.hub.max_bytes_per_s)
    wanted = listen_address(config, folder)

    def listen(endpoint: str) -> AbstractAsyncContextManager[HubSocket]:
        return HubSocket.bind(endpoint, keys=keys, max_message_bytes=config.hub.max_message_bytes, limits=limits)

    async with AsyncExitStack() as stack:
        try:
            socket = await stack.enter_async_context(listen(wanted))
        except CannotListen:
            if wanted == config.hub.listen:
                raise
            log.warning("the former address is taken", endpoint=wanted)
            socket = await stack.enter_async_context(listen(config.hub.listen))
        yield socket


@asynccontextmanager
async def bind_for_trainer(config: Config, folder: RunFolder) -> AsyncIterator[HubSocket]:
    """Listen on a socket file, which goes when the hub goes."""
    with trainer_path(folder) as path:
        try:
            async with HubSocket.bind(f"ipc://{path}", max_message_bytes=config.hub.max_message_bytes) as socket:
                yield socket
        finally:
            path.unlink(missing_ok=True)


def listen_address(config: Config, folder: RunFolder) -> str:
    """The configured address; a restarted hub takes the port its predecessor was given, where actors look for it."""
    wanted = config.hub.listen
    if not wanted.endswith(":0") or not folder.hub.is_file():
        return wanted
    former = HubAddress.model_validate_json(folder.hub.read_bytes()).endpoint
    return former if former.rsplit(":", 1)[0] == wanted.rsplit(":", 1)[0] else wanted


@contextmanager
def trainer_path(folder: RunFolder) -> Iterator[Path]:
    """`hub.ipc` in the run's folder, or a short path of our own elsewhere where that one is too long for a socket.

    The same after every restart, because a running trainer asks there again. Raises `UserError` if the short path is
    somebody else's.
    """
    path = folder.path / "hub.ipc"
    if len(os.fsencode(path)) <= LONGEST_IPC_BYTES:
        yield path
        return
    digest = hashlib.sha256(os.fsencode(folder.path)).hexdigest()[:16]
    with held(room(Path(tempfile.gettempdir()), "matpo", digest), setting="run.dir to a shorter path") as short:
        yield short / "hub.ipc"


def write_address(folder: RunFolder, endpoint: str, trainer_endpoint: str) -> None:
    """Tell actors and trainer where the hub is, in one step."""
    pid, run = os.getpid(), folder.path.name
    address = HubAddress(
        endpoint=endpoint, trainer_endpoint=trainer_endpoint, pid=pid, run=run, born=process_birth(pid) or 0
    )
    draft = folder.hub.with_suffix(".tmp")
    draft.write_text(address.model_dump_json(), encoding="utf-8")
    draft.replace(folder.hub)


if __name__ == "__main__":
    sys.exit(run_command(main))
