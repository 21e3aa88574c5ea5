"""`python -m learner.hub --run RUN`: leases, journal and weights of one run; survives the trainer and its own death.

Exit codes: 0 the run is complete (summary.json is written), 2 something to fix, 130 asked to stop before the end.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import anyio
import structlog

from learner.first_error import first_error
from learner.hub.core import Hub, Side
from learner.hub.journal import Journal, JournalUnreadable
from learner.hub.service import Service
from learner.hub.summary import write_summary
from matpo.config import Config
from matpo.datasets.load import load_tasks
from matpo.errors import UserError, run_command
from matpo.folder import HubAddress, RunFolder
from matpo.load import load_config
from matpo.logs import configure_logs
from matpo.metrics import MetricsFile
from matpo.model_files import tokenizer_digest
from protocols.channel import ChannelError, HubSocket
from protocols.keys import BadKeys, HubKeys

log: structlog.stdlib.BoundLogger = structlog.get_logger()

INTERRUPTED = 130
FIXABLE = (ChannelError, BadKeys, JournalUnreadable, UserError)
LONGEST_IPC_BYTES = 90
"""Unix socket paths end at about 107 bytes."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="learner.hub", description="The hub of one run.")
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    folder = RunFolder.existing(parser.parse_args().run.resolve())
    config = load_config(folder.config)
    configure_logs(folder.log("hub"), "hub")
    try:
        return anyio.run(serve, config, folder, backend_options={"use_uvloop": True})
    except FIXABLE as error:
        raise UserError(str(error)) from error
    except BaseExceptionGroup as group:
        found = first_error(group, *FIXABLE)
        if found is None:
            raise
        raise UserError(str(found)) from group


async def serve(config: Config, folder: RunFolder) -> int:
    """Open everything, serve the run, and write its summary when it is complete."""
    keys = None if config.hub.key_dir is None else HubKeys.load(config.hub.key_dir)
    train = load_tasks(config.data.train, seed=config.run.seed)
    evaluation = load_tasks(config.data.evaluation, seed=config.run.seed)
    limit = config.hub.max_message_bytes
    with Journal.open(folder.journal) as journal:
        hub = Hub(
            config,
            journal,
            run=folder.path.name,
            weights=folder.weights,
            tokenizer=tokenizer_digest(config.model),
            train=train,
            evaluation=evaluation,
            now_s=time.monotonic(),
        )
        async with (
            HubSocket.bind(listen_address(config, folder), keys=keys, max_message_bytes=limit) as actors,
            HubSocket.bind(trainer_address(folder), max_message_bytes=limit) as trainer,
        ):
            write_address(folder, actors.endpoint, trainer.endpoint)
            log.info("listening", endpoint=actors.endpoint, trainer=trainer.endpoint, step=hub.batches.step)
            sockets: dict[Side, HubSocket] = {"actors": actors, "trainer": trainer}
            metrics = MetricsFile(folder.metrics)
            service = Service(
                hub, journal, metrics, sockets=sockets, steps=config.run.steps, heartbeat_s=config.hub.heartbeat_s
            )
            complete = await service.run()
            metrics.close()
        if complete:
            write_summary(journal, config, folder, complete=True)
        log.info("ended", complete=complete, step=hub.batches.step)
        return 0 if complete else INTERRUPTED


def listen_address(config: Config, folder: RunFolder) -> str:
    """The configured address; a restarted hub takes the port its predecessor was given, where actors look for it."""
    wanted = config.hub.listen
    if not wanted.endswith(":0") or not folder.hub.is_file():
        return wanted
    former = HubAddress.model_validate_json(folder.hub.read_bytes()).endpoint
    return former if former.rsplit(":", 1)[0] == wanted.rsplit(":", 1)[0] else wanted


def trainer_address(folder: RunFolder) -> str:
    """`hub.ipc` in the run's folder, or a short path elsewhere where that one is too long for a socket."""
    path = folder.path / "hub.ipc"
    if len(os.fsencode(path)) > LONGEST_IPC_BYTES:
        path = Path(tempfile.mkdtemp(prefix="matpo-")) / "hub.ipc"
    return f"ipc://{path}"


def write_address(folder: RunFolder, endpoint: str, trainer_endpoint: str) -> None:
    """Tell actors and trainer where the hub is, in one step."""
    address = HubAddress(endpoint=endpoint, trainer_endpoint=trainer_endpoint, pid=os.getpid(), run=folder.path.name)
    draft = folder.hub.with_suffix(".tmp")
    draft.write_text(address.model_dump_json(), encoding="utf-8")
    draft.replace(folder.hub)


if __name__ == "__main__":
    sys.exit(run_command(main))
