"""`matpo-actor`: one engine, the tool servers and up to `actor.concurrency` live episodes, for one hub."""

from __future__ import annotations

import argparse
import re
import signal
import socket
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import anyio
import structlog

from actors.elsewhere import open_elsewhere
from actors.engines.opening import open_engine
from actors.episode import play_episode
from actors.failure import user_error
from actors.greet import SentHome, greet
from actors.heap import keep_small, share_one_heap
from actors.limits import allow_open_files
from actors.outbox import Outbox
from actors.play import Player
from actors.scene import Stage
from actors.session import Session
from actors.setting import open_tools
from actors.starting import Starting
from actors.tools.report import reported
from actors.watch import Watch
from actors.weights.follow import Follower
from actors.weights.shadow import Shadow
from actors.weights.sources import HubSource, Sources, beside_hub
from matpo.config import Config
from matpo.errors import UserError, run_command
from matpo.load import load_config
from matpo.logs import configure_logs
from matpo.model_files import model_folder, tokenizer_digest
from matpo.owner import UNOWNED, Owner, add_owned
from protocols.channel import ChannelError, HubClient
from protocols.keys import ActorKeys, BadKeys
from protocols.messages import PROTOCOL, Hello, Lease
from protocols.records import EpisodeTree

log: structlog.stdlib.BoundLogger = structlog.get_logger()

PATIENCE_S = 20.0


@dataclass(frozen=True, slots=True)
class Place:
    """Who this actor is and where it keeps what must survive it."""

    config: Config
    hub: str
    state: Path
    actor_id: str
    patience_s: float = PATIENCE_S
    """How long the hub may take to let the actor in."""
    owner: Owner = UNOWNED
    """Who keeps it alive."""


async def run_actor(place: Place) -> None:
    """Play for one hub until it, or a signal, sends the actor home. Raises what a user can fix, or `SentHome`."""
    config, folder = place.config, place.state / "outbox" / place.actor_id
    hello = introduction(config, place.actor_id)
    keys = None if config.hub.key_dir is None else ActorKeys.load(config.hub.key_dir)
    seed = config.run.seed + zlib.crc32(place.actor_id.encode())
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        limit_trees, limit_bytes = config.actor.outbox_limit_trees, config.hub.max_message_bytes
        outbox = stack.enter_context(Outbox.open(folder, limit_trees=limit_trees, limit_bytes=limit_bytes))
        client = await enter(HubClient.connect(place.hub, keys=keys, deadline_s=place.patience_s))
        welcome = await greet(client, hello, deadline_s=place.patience_s)
        starting = await enter(Starting.beating(place.actor_id, client, outbox, every_s=welcome.heartbeat_s))
        engine_log = place.state / "logs" / f"{place.actor_id}-engine.log"
        model, lora = model_folder(config.model), config.model.served_adapter
        engine = await enter(open_engine(model, config.actor.engine, lora=lora, seed=seed, log=engine_log))
        tools = await enter(open_tools(config, folder / "world", watch=starting.tools))
        await enter(reported(tools, place.state / "metrics.jsonl", place.actor_id, every_s=welcome.heartbeat_s))
        elsewhere = await enter(open_elsewhere(config))
        stage = Stage.open(config, engine=engine, tools=tools, actor_id=place.actor_id, elsewhere=elsewhere)
        player = Player(
            lambda lease, episode: play_lease(lease, episode, stage),
            version=lambda: engine.version,
            store=outbox,
            concurrency=config.actor.concurrency,
        )
        weights = config.actor.weights
        follower = Follower(
            stack.enter_context(Shadow.open(welcome.run, memory=weights.memory)),
            engine=engine,
            sources=Sources(
                HubSource(client), beside_hub(weights, run=welcome.run, puller_id=place.actor_id, keys=keys)
            ),
            reports=client,
            loaded=(player.notice,),
        )
        watch = Watch(place.actor_id, engine, own=(player, follower), tools=tools)
        session = Session(client, hello, welcome, outbox=outbox, player=player, follower=follower, watch=watch)
        signals = stack.enter_context(anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT))
        starting.over()
        log.info("ready", hub=place.hub, run=welcome.run, outbox_trees=len(outbox))
        tasks = await enter(anyio.create_task_group())
        tasks.start_soon(place.owner.beat_forever, name="beats")
        tasks.start_soon(session.listen, name="listen")
        tasks.start_soon(session.beat, name="heartbeats")
        tasks.start_soon(watch.run, welcome.heartbeat_s, name="watch")
        tasks.start_soon(session.ask, name="ask for work")
        tasks.start_soon(outbox.upload, client, name="upload trees")
        tasks.start_soon(follower.run, name="follow weights")
        tasks.start_soon(player.run, name="play")
        tasks.start_soon(leave_on_signal, session, signals, name="signals")
        tasks.start_soon(keep_small, name="heap")
        await session.ended.wait()
        counts = {"episodes": player.counts, "dropped": outbox.dropped, "weights_repaired": follower.failures}
        log.info("leaving", outbox_trees=len(outbox), **{what: dict(count) for what, count in counts.items()})
        tasks.cancel_scope.cancel()


def introduction(config: Config, actor_id: str) -> Hello:
    """Who the actor is, and what must agree with the hub."""
    return Hello(
        protocol=PROTOCOL,
        actor_id=actor_id,
        tokenizer_digest=tokenizer_digest(config.model),
        config_digest=config.shared_digest,
        capacity=config.actor.concurrency,
    )


async def play_lease(lease: Lease, episode: int, stage: Stage) -> EpisodeTree:
    """Play one episode of a lease."""
    return await play_episode(
        lease.task,
        lease_id=lease.lease_id,
        group_id=lease.group_id,
        episode=episode,
        purpose=lease.purpose,
        stage=stage,
    )


async def leave_on_signal(session: Session, signals: AsyncIterator[signal.Signals]) -> None:
    """The first SIGTERM or SIGINT finishes what is under way and says goodbye; a second leaves at once."""
    async with anyio.create_task_group() as leaving:
        async for number in signals:
            if session.leaving:
                session.ended.set()
            else:
                leaving.start_soon(session.leave, number.name)


def parse(arguments: Sequence[str] | None = None) -> tuple[Place, Path | None]:
    """The command line: the actor's place, and its log file (None: the terminal)."""
    parser = argparse.ArgumentParser(prog="matpo-actor", description=__doc__)
    parser.add_argument("config", type=Path, help="a config file, or RUN/config.json")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as actor.concurrency=32")
    parser.add_argument("--hub", required=True, help="tcp://HOST:PORT, as matpo-learner prints it")
    parser.add_argument("--state", type=Path, help="folder for outbox and log (default: run.dir/actors, log on stderr)")
    parser.add_argument("--actor-id", default=socket.gethostname(), help="unique among the run's actors")
    parser.add_argument("--patience-s", type=float, default=PATIENCE_S, help="how long the hub may take to let us in")
    add_owned(parser)
    given = parser.parse_intermixed_args(arguments)
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given.actor_id):
        raise UserError(
            f"--actor-id {given.actor_id!r} may hold letters, digits, dots, dashes and underscores, up to 64"
        )
    config = load_config(given.config, given.overrides)
    log_file = given.state / "logs" / f"{given.actor_id}.jsonl" if given.state else None
    place = Place(
        config,
        given.hub,
        given.state or config.run.dir / "actors",
        given.actor_id,
        patience_s=given.patience_s,
        owner=Owner.at_standard_input(owned=given.owned),
    )
    return place, log_file


def run(arguments: Sequence[str] | None = None) -> int:
    """Parse, play, and turn what a user can fix into one line."""
    share_one_heap()
    place, log_file = parse(arguments)
    allow_open_files(place.config.actor.concurrency)
    configure_logs(log_file, component=place.actor_id)
    try:
        anyio.run(run_actor, place, backend_options={"use_uvloop": True})
    except (ChannelError, BadKeys, BaseExceptionGroup) as error:
        known = user_error(error)
        if known is None:
            raise
        raise known from error
    except SentHome as reason:
        log.info("sent home", reason=str(reason))
    return 0


def main() -> None:
    """Console script `matpo-actor`."""
    raise SystemExit(run_command(run))


if __name__ == "__main__":
    main()
