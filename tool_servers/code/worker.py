"""One confined interpreter from the server's side: started ahead, given one program, watched, killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple

import anyio
from pydantic import BaseModel, ConfigDict, ValidationError

from tool_servers.code.inside.worker import READY, Ending, Job
from tool_servers.code.sandbox import PROBE_S, Sandbox, SandboxError, cpu_seconds

Reason = Literal["ok", "exception", "exit", "timeout", "memory", "output", "killed"]
REAP_S = 10.0
"""For the kernel to end a killed sandbox."""
CHUNK_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class Finished:
    """How a program ended and what it said."""

    reason: Reason
    detail: str
    """The reason in words; empty when it is `ok`."""
    stdout: str
    stderr: str
    value: str
    """`repr` of the last expression; empty when there is none."""
    truncated: bool
    """Whether output or the value was cut."""
    seconds: float


class Outcome(BaseModel):
    """A worker's report, checked: it comes from the same process as the program."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    ending: Ending
    exit_code: int
    value: str
    value_cut: bool


class Worker:
    """A confined interpreter that has not been given its program yet. It runs one, and is gone."""

    def __init__(self, process: asyncio.subprocess.Process, report: asyncio.StreamReader, output_bytes: int) -> None:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None, "pipes"
        self._process = process
        self._stdin, self._stdout, self._stderr = process.stdin, process.stdout, process.stderr
        self._report = report
        self._output_bytes = output_bytes

    @classmethod
    async def start(cls, sandbox: Sandbox) -> Worker:
        """Start an interpreter and wait until it has confined itself. Raises `SandboxError`, `OSError`."""
        # To its end even when cancelled: half a start would leave a process that nobody knows of.
        with anyio.CancelScope(shield=True):
            worker = await cls._launch(sandbox)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(worker.close)
            await worker._ready()
            undo.pop_all()
        return worker

    @classmethod
    async def _launch(cls, sandbox: Sandbox) -> Worker:
        read, write = os.pipe()
        report = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(report), os.fdopen(read, "rb", buffering=0)
        )
        try:
            process = await asyncio.create_subprocess_exec(
                *sandbox.command(write),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=sandbox.environment(),
                cwd="/",
                pass_fds=(write,),
                start_new_session=True,
            )
        except OSError:
            transport.close()
            raise
        finally:
            os.close(write)
        return cls(process, report, sandbox.allowance.output_bytes)

    @property
    def alive(self) -> bool:
        """Whether it can still take a program."""
        return self._process.returncode is None and not self._report.at_eof()

    async def run(self, code: str, *, timeout_s: float) -> Finished:
        """Run the program; it is killed when it takes too long or prints too much, and in any case when this ends."""
        began = time.monotonic()
        stopped: list[Reason] = []

        def stop(reason: Reason) -> None:
            stopped.append(reason)
            self._kill()

        output = _Budget(self._output_bytes, lambda: stop("output"))
        # JSON may take six bytes to say one; a program that writes more than that to the report is flooding it.
        report = _Budget(6 * self._output_bytes + 1_024, lambda: stop("output"))
        said = _Said([], [], [])
        try:
            with anyio.move_on_after(timeout_s) as limit:
                async with anyio.create_task_group() as readers:
                    readers.start_soon(output.read, self._stdout, said.stdout)
                    readers.start_soon(output.read, self._stderr, said.stderr)
                    readers.start_soon(report.read, self._report, said.report)
                    readers.start_soon(self._give, code, timeout_s)
                    await self._process.wait()
        finally:
            await self.close()
        if limit.cancelled_caught:
            stopped.insert(0, "timeout")
        outcome = _parse(b"".join(said.report))
        reason, detail = self._ending(stopped, outcome, timeout_s)
        value = b"" if outcome is None else outcome.value.encode()
        room = max(0, output.left)
        cut = output.left < 0 or len(value) > room or (outcome is not None and outcome.value_cut)
        return Finished(
            reason=reason,
            detail=detail,
            stdout=b"".join(said.stdout).decode("utf-8", "replace"),
            stderr=b"".join(said.stderr).decode("utf-8", "replace"),
            value=value[:room].decode("utf-8", "ignore"),
            truncated=cut,
            seconds=time.monotonic() - began,
        )

    async def close(self) -> None:
        """Kill the interpreter and all that is left of it. Raises `SandboxError` if it does not end in time."""
        self._kill()
        self._stdin.close()
        with anyio.CancelScope(shield=True), anyio.move_on_after(REAP_S, shield=True) as limit:
            # Read to the end, so that the event loop lets go of the pipes as well as of the process.
            for stream in (self._stdout, self._stderr, self._report):
                while await stream.read(CHUNK_BYTES):
                    pass
            await self._process.wait()
        if limit.cancelled_caught:
            raise SandboxError(f"a killed sandbox (process {self._process.pid}) does not end within {REAP_S:g} s")

    async def _ready(self) -> None:
        with anyio.move_on_after(PROBE_S) as limit:
            if await self._report.readline() == READY:
                return
        if limit.cancelled_caught:
            raise SandboxError(f"a sandbox did not start within {PROBE_S:g} s")
        said = (await self._stderr.read(2_000)).decode("utf-8", "replace").strip().splitlines()
        raise SandboxError(f"a sandbox did not start: {said[-1] if said else 'it ended without a word'}")

    async def _give(self, code: str, timeout_s: float) -> None:
        job: Job = {"code": code, "cpu_s": cpu_seconds(timeout_s), "value_characters": self._output_bytes}
        # A worker that dies before it has read everything ends the pipe; how it died is told by its exit.
        with suppress(BrokenPipeError, ConnectionResetError):
            self._stdin.write(json.dumps(job).encode())
            await self._stdin.drain()
            self._stdin.close()

    def _ending(self, stopped: list[Reason], outcome: Outcome | None, timeout_s: float) -> tuple[Reason, str]:
        code = self._process.returncode or 0
        # bubblewrap reports a signal the way shells do.
        number = -code if code < 0 else code - 128
        if stopped and stopped[0] == "timeout":
            return "timeout", f"it ran longer than {timeout_s:g} s and was killed"
        if stopped:
            return "output", f"it wrote more than {self._output_bytes:,} bytes; the rest is cut and it was killed"
        if outcome is not None:
            words = {"ok": "", "exception": "", "exit": f"exit code {outcome.exit_code}",
                     "memory": "it needed more memory than it may use"}  # fmt: skip
            return outcome.ending, words[outcome.ending]
        if number == signal.SIGXCPU:
            return "timeout", f"it used more than {cpu_seconds(timeout_s)} s of CPU time and was killed"
        if number in signal.valid_signals():
            return "killed", f"it was killed by {signal.Signals(number).name}"
        return "exit", f"exit code {code}, without an end of its own"

    def _kill(self) -> None:
        # The group: bubblewrap is its leader, and with it every process of the private namespace goes.
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


class _Said(NamedTuple):
    stdout: list[bytes]
    stderr: list[bytes]
    report: list[bytes]


class _Budget:
    """A cap over what some streams may say."""

    def __init__(self, most: int, overflow: Callable[[], None]) -> None:
        self.left = most
        """Bytes; negative once there were too many."""
        self._overflow = overflow

    async def read(self, stream: asyncio.StreamReader, into: list[bytes]) -> None:
        """Read to the end; calls `overflow` at the cap and keeps nothing beyond it."""
        while chunk := await stream.read(CHUNK_BYTES):
            if self.left >= 0:
                into.append(chunk[: self.left])
                self.left -= len(chunk)
                if self.left < 0:
                    self._overflow()


def _parse(report: bytes) -> Outcome | None:
    """The last line of the report, if it is an outcome."""
    try:
        return Outcome.model_validate_json(report.rpartition(b"\n")[2])
    except ValidationError:
        return None
