"""What stands still (SIGSTOP) is named by a log and by the doctor within a minute, and overcome."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import psutil
import pytest

from learner.doctor import examine
from matpo.folder import RunFolder
from matpo.waits import WaitName
from tests.chaos.processes import with_role
from tests.end_to_end.processes import QUICKSTART, QUICKSTART_SGLANG, Command, matpo, only_run, short_run, started
from tests.end_to_end.test_kill import nothing_is_lost_or_doubled, query, reached, wait_until
from tests.end_to_end.test_supervision import under_way

NAMED_WITHIN_S = 60
pytestmark = [pytest.mark.timeout(900)]
SLOW = pytest.mark.slow


def stall_is_logged(log: Path, *words: str) -> bool:
    """Whether a stall in the log of one component names all these words."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return any('"event": "stall"' in line and all(word in line for word in words) for line in lines)


def doctor_names(run: Path, *names: WaitName) -> bool:
    """Whether `matpo doctor` shows a stall of this name now."""
    found = examine(RunFolder(run), now=time.time()).waits
    return any(wait.name in names and wait.since_s > wait.limit_s for wait in found)


def freeze_and_see(
    parent: Path,
    frozen: Sequence[psutil.Process],
    command: Command,
    run: Path,
    *,
    log: str,
    words: Sequence[str],
    names: Sequence[WaitName],
    steps: int = 2,
    limit_s: float = 240,
) -> None:
    """Stop the processes for good: log and doctor name them in time, and steps are taken again without them."""
    assert frozen
    for process in frozen:
        process.suspend()
    wait_until(
        partial(stall_is_logged, run / "logs" / log, *words), command, limit_s=NAMED_WITHIN_S, what=f"stall in {log}"
    )
    wait_until(partial(doctor_names, run, *names), command, limit_s=NAMED_WITHIN_S, what="stall that the doctor names")
    now = query(run, "SELECT MAX(step) FROM steps")
    wait_until(partial(reached, run, now + steps), command, limit_s=limit_s, what="more steps")
    assert not [process for process in frozen if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    command.process.send_signal(signal.SIGINT)
    output, _ = command.process.communicate(timeout=180)
    assert command.process.returncode == 130, output
    assert matpo("doctor", str(run)).returncode == 0
    nothing_is_lost_or_doubled(run)


def endless(parent: Path, config: Path = QUICKSTART) -> Sequence[str]:
    return short_run(parent, "run.steps=1000000", "actor.count=1", config=config)


@SLOW
def test_a_frozen_hub(tmp_path: Path) -> None:
    with started(*endless(tmp_path)) as command:
        run = under_way(command, tmp_path, step=1)
        hub = with_role(tmp_path, "hub")
        freeze_and_see(tmp_path, hub, command, run, log="actor-0.jsonl", words=['"name": "hub"'], names=["hub_status"])
    assert stall_is_logged(run / "logs" / "learner.jsonl", '"who": "hub"')


@SLOW
def test_a_frozen_actor_and_the_engine_in_it(tmp_path: Path) -> None:
    with started(*endless(tmp_path)) as command:
        run = under_way(command, tmp_path, step=1)
        actor = with_role(tmp_path, "actor")
        freeze_and_see(
            tmp_path, actor, command, run, log="hub.jsonl", words=["a heartbeat of actor-0"], names=["actor"]
        )
    assert stall_is_logged(run / "logs" / "run.jsonl", '"who": "actor-0"')


@SLOW
def test_a_frozen_tool_server(tmp_path: Path) -> None:
    with started(*endless(tmp_path)) as command:
        run = under_way(command, tmp_path, step=1)
        server = command.descendants("tool_servers.search")
        freeze_and_see(
            tmp_path, server, command, run, log="actor-0.jsonl", words=["tool server search"], names=["tool_server"]
        )


@SLOW
def test_a_tool_server_frozen_at_its_first_start(tmp_path: Path) -> None:
    once = f"test -e {tmp_path}.frozen || {{ touch {tmp_path}.frozen; kill -STOP $$; }}"
    command = f"{once}; exec ${{PYTHON}} -m tool_servers.search serve --corpus ${{WORLD_CORPUS}}"
    entry = ("tools.mcpServers.search.command=sh", f'tools.mcpServers.search.args=["-c",{json.dumps(command)}]')
    with started(*endless(tmp_path), *entry) as running:
        wait_until(lambda: any(tmp_path.iterdir()), running, limit_s=60, what="run folder")
        run = only_run(tmp_path)
        wait_until(Path(f"{tmp_path}.frozen").exists, running, limit_s=120, what="the server's first start")
        named = partial(stall_is_logged, run / "logs" / "actor-0.jsonl", "tool server search")
        wait_until(named, running, limit_s=NAMED_WITHIN_S, what="stall in actor-0.jsonl")
        wait_until(partial(doctor_names, run, "tool_server_start"), running, limit_s=NAMED_WITHIN_S, what="doctor")
        wait_until(partial(reached, run, 2), running, limit_s=240, what="steps")
        running.process.send_signal(signal.SIGINT)
        output, _ = running.process.communicate(timeout=180)
        assert running.process.returncode == 130, output


@pytest.mark.sglang
def test_a_frozen_engine_server(tmp_path: Path) -> None:
    with started(*endless(tmp_path, QUICKSTART_SGLANG)) as command:
        wait_until(lambda: any(tmp_path.iterdir()), command, limit_s=60, what="run folder")
        run = next(path for path in tmp_path.iterdir() if path.is_dir())
        wait_until(partial(reached, run, 1), command, limit_s=400, what="step 1")
        server = command.descendants("sglang.launch_server")
        freeze_and_see(
            tmp_path, server, command, run,
            log="actor-0.jsonl", words=["engine"], names=["engine_server", "engine"], steps=1, limit_s=500,
        )  # fmt: skip
