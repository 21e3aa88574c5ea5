"""One copy of the weights for all actors of a run on a machine, whoever dies, stops or comes late."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from actors.weights.follow import Follower
from actors.weights.shadow import PREFIX, Shadow, TurnLost
from actors.weights.sources import HubSource, Sources
from matpo.errors import UserError
from protocols.weights import read_keyframe, weights_digest
from tests.actors.weights.parts import HoldingEngine, Hub, Shelf

ROOT = Path(__file__).resolve().parents[3]
HOLDER = """
import anyio, sys, os
from pathlib import Path
from actors.weights.shadow import Shadow, TurnLost

async def main():
    with Shadow.open("test", memory=Path(sys.argv[1])) as shadow:
        async with shadow.turn() as turn:
            draft = turn.draft()
            draft.write_bytes(b"half a file")
            print("has the turn", flush=True)
            await anyio.to_thread.run_sync(sys.stdin.readline)
            try:
                turn.finish(draft, 1, "x")
            except TurnLost as lost:
                print("lost:", lost, flush=True)

anyio.run(main)
"""


@contextmanager
def holder(memory: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process of the run, in the middle of its turn."""
    command = [sys.executable, "-c", HOLDER, str(memory)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "has the turn\n"
            yield process
        finally:
            process.kill()


class Actors:
    """Several actors of one run on one machine, each with an engine of its own, and one hub that counts."""

    def __init__(self, folder: Path, count: int, stack: ExitStack, *, stall_s: float = 60.0) -> None:
        self.shelf = Shelf(folder)
        self.engines = [HoldingEngine() for _ in range(count)]
        self.hubs = [Hub(self.shelf) for _ in range(count)]
        self.shadows = [stack.enter_context(Shadow.open("test", memory=folder, stall_s=stall_s)) for _ in range(count)]
        self.followers = []
        for shadow, engine, hub in zip(self.shadows, self.engines, self.hubs, strict=True):
            source = HubSource(hub, patience_s=0.3, chunk_bytes=1024)
            hub.follower = Follower(shadow, engine=engine, sources=Sources(source), reports=hub)
            self.followers.append(hub.follower)

    @property
    def asked(self) -> list[str]:
        return [request.name for hub in self.hubs for request in hub.asked]

    def versions(self) -> list[int]:
        return [copy.version for copy in self.shadows[0].copies()]


async def test_actors_of_one_machine_download_once_and_map_the_same_file(tmp_path: Path) -> None:
    with ExitStack() as stack, anyio.fail_after(20):
        actors = Actors(tmp_path, 3, stack)
        async with anyio.create_task_group() as tasks:
            for follower in actors.followers:
                tasks.start_soon(follower.run)
            for version, delta in ((0, False), (1, True)):
                ready = actors.shelf.publish(version, delta=delta)
                for follower in actors.followers:
                    follower.announce(ready)
                for hub in actors.hubs:
                    await hub.wait_reports(version + 1)
            tasks.cancel_scope.cancel()
        keyframe = (tmp_path / "keyframe-0").stat().st_size
        assert actors.asked.count("keyframe-0") == -(-keyframe // 1024)
        assert actors.asked.count("delta-1") == 1 and actors.asked.count("keyframe-1") == 0
        assert len({engine.file for engine in actors.engines}) == 1
        assert [engine.loaded for engine in actors.engines] == [[0, 1]] * 3
        assert actors.versions() == [1]  # the last to move on removed version 0
        folder = actors.shadows[0].folder
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert not list(folder.glob("draft-*"))
    assert PREFIX not in str(os.listdir(tmp_path))  # the last to leave removed the folder


async def test_an_actor_that_is_slow_to_load_leaves_two_copies_and_waits_for_nobody(tmp_path: Path) -> None:
    with ExitStack() as stack, anyio.fail_after(20):
        actors = Actors(tmp_path, 2, stack)
        fast, slow = actors.followers
        actors.engines[1].gate = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fast.run)
            tasks.start_soon(slow.run)
            slow.announce(actors.shelf.publish(0, delta=False))
            await actors.engines[1].loading.wait()
            for version in range(4):
                fast.announce(actors.shelf.publish(version, delta=version > 0))
                await actors.hubs[0].wait_reports(version + 1)
                assert len(actors.versions()) <= 2
            slow.announce(actors.shelf.publish(3, delta=True))
            actors.engines[1].gate.set()
            await actors.hubs[1].wait_reports(2)
            tasks.cancel_scope.cancel()
        assert actors.engines[1].loaded == [0, 3] and actors.versions() == [3]


async def test_an_actor_whose_news_are_old_does_not_push_out_newer_weights(tmp_path: Path) -> None:
    with ExitStack() as stack, anyio.fail_after(20):
        actors = Actors(tmp_path, 2, stack)
        ahead, behind = actors.followers
        old, new = actors.shelf.publish(0, delta=False), actors.shelf.publish(1, delta=True)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ahead.run)
            tasks.start_soon(behind.run)
            ahead.announce(new)
            await actors.hubs[0].wait_reports(1)
            behind.announce(old)
            await anyio.wait_all_tasks_blocked()
            assert actors.versions() == [1] and actors.engines[1].loaded == []
            behind.announce(new)
            await actors.hubs[1].wait_reports(1)
            tasks.cancel_scope.cancel()
        assert actors.engines[1].loaded == [1] and actors.hubs[1].asked == []


async def test_every_actor_checks_the_copy_and_a_damaged_one_is_made_anew(tmp_path: Path) -> None:
    with ExitStack() as stack, anyio.fail_after(20):
        actors = Actors(tmp_path, 2, stack)
        first, second = actors.followers
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(first.run)
            tasks.start_soon(second.run)
            ready = actors.shelf.publish(0, delta=False)
            first.announce(ready)
            await actors.hubs[0].wait_reports(1)
            path = actors.shadows[0].copies()[0].path
            with path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\xff")
            second.announce(ready)
            second.announce(ready)
            await anyio.wait_all_tasks_blocked()
            second.announce(ready)  # as every heartbeat's answer does
            await actors.hubs[1].wait_reports(1)
            tasks.cancel_scope.cancel()
        assert second.failures == {"broken": 1}
        assert weights_digest(read_keyframe(path)) == ready.digest == actors.engines[1].digests[0]


async def test_an_actor_whose_line_is_cut_is_overtaken_and_takes_what_the_other_brought(tmp_path: Path) -> None:
    with ExitStack() as stack, anyio.fail_after(20):
        actors = Actors(tmp_path, 2, stack, stall_s=0.1)
        cut, other = actors.followers
        cut_hub, other_hub = actors.hubs
        cut_hub.silent_about = set(range(1000))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cut.run)
            ready = actors.shelf.publish(0, delta=False)
            cut.announce(ready)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(other.run)
            other.announce(ready)
            await other_hub.wait_reports(1)
            cut_hub.silent_about = set()
            await cut_hub.wait_failure("turn_lost")
            cut.announce(ready)
            await cut_hub.wait_reports(1)
            tasks.cancel_scope.cancel()
        assert cut.failures == {"turn_lost": 1} and not other.failures
        assert len({engine.file for engine in actors.engines}) == 1


async def test_a_folder_removed_by_hand_ends_the_actor_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup) as caught, ExitStack() as stack, anyio.fail_after(20):
        actors = Actors(tmp_path, 1, stack)
        shutil.rmtree(actors.shadows[0].folder)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(actors.followers[0].run)
            actors.followers[0].announce(actors.shelf.publish(0, delta=False))
    assert caught.group_contains(UserError, match="start this one again")


async def test_a_killed_actor_lets_go_of_its_turn_and_the_next_removes_what_it_left(tmp_path: Path) -> None:
    with holder(tmp_path) as process, Shadow.open("test", memory=tmp_path) as shadow, anyio.fail_after(20):
        assert len(list(shadow.folder.glob("draft-*"))) == 1
        process.kill()
        async with shadow.turn():
            assert list(shadow.folder.glob("draft-*")) == []


async def test_a_stopped_actor_loses_its_turn_and_notices_when_it_goes_on(tmp_path: Path) -> None:
    with holder(tmp_path) as process, Shadow.open("test", memory=tmp_path, stall_s=0.2) as shadow, anyio.fail_after(20):
        process.send_signal(signal.SIGSTOP)
        async with shadow.turn() as turn:
            assert list(shadow.folder.glob("draft-*")) == []
            process.send_signal(signal.SIGCONT)
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            answer = await anyio.to_thread.run_sync(process.stdout.readline)
            assert answer == "lost: another actor took over before version 1 was complete\n"
            turn.progress()
        assert shadow.copies() == []


async def test_whoever_lost_the_turn_can_show_no_progress(tmp_path: Path) -> None:
    with Shadow.open("test", memory=tmp_path, stall_s=0.05) as shadow, anyio.fail_after(20):
        async with shadow.turn() as first, shadow.turn() as second:
            with pytest.raises(TurnLost, match="another actor took over"):
                first.progress()
            second.progress()


def test_what_a_killed_run_left_is_swept_by_the_next_actor_of_any_run(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.kill()
        process.wait()
    assert len(list(tmp_path.glob(f"{PREFIX}-*/draft-*"))) == 1
    with Shadow.open("other run", memory=tmp_path) as shadow:
        assert list(tmp_path.iterdir()) == [shadow.folder]


def test_a_folder_that_others_may_enter_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with Shadow.open("test", memory=tmp_path) as shadow:
        folder = shadow.folder
        folder.chmod(0o755)
        with (
            pytest.raises(UserError, match=r"not ours alone; remove it, or set actor\.weights\.memory"),
            Shadow.open("test", memory=tmp_path),
        ):
            pass
    with pytest.raises(UserError, match=r"does not exist; correct actor\.weights\.memory"):
        Shadow.open("test", memory=tmp_path / "nowhere").__enter__()


def test_actors_that_come_and_go_at_once_never_lose_the_folder_under_them(tmp_path: Path) -> None:
    missing: list[int] = []

    def come_and_go() -> None:
        for visit in range(100):
            with Shadow.open("test", memory=tmp_path) as shadow:
                (shadow.folder / f"seen-{threading.get_ident()}").touch()
                if not shadow.folder.is_dir():
                    missing.append(visit)

    threads = [threading.Thread(target=come_and_go) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert missing == [] and list(tmp_path.iterdir()) == []


async def test_an_actor_that_waits_for_another_says_for_what(tmp_path: Path) -> None:
    with ExitStack() as stack, anyio.fail_after(20):
        actors = Actors(tmp_path, 1, stack)
        (follower,) = actors.followers
        other = stack.enter_context(Shadow.open("test", memory=tmp_path))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follower.run)
            async with other.turn():
                follower.announce(actors.shelf.publish(0, delta=False))
                while follower.waiting_for is None:
                    await anyio.lowlevel.checkpoint()
                assert follower.waiting_for.what == "another actor of this machine that brings weights 0"
            await actors.hubs[0].wait_reports(1)
            while follower.waiting_for is not None:
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
