"""The worker inside the sandbox: gives up its powers, says it is ready, runs one program, reports, ends.

Standard library only. What it reports is the program's own word: the program runs in this very process.
"""

from __future__ import annotations

import ast
import importlib
import json
import linecache
import os
import resource
import sys
import traceback
import types
from typing import Literal, TypedDict

from tool_servers.code.inside.confine import Limits, confine

FILE_NAME = "<code>"
READY = b"ready\n"

Ending = Literal["ok", "exception", "memory", "exit"]


class Job(TypedDict):
    """What the worker reads from stdin, in JSON."""

    code: str
    cpu_s: int
    """At most that of the limits."""
    value_characters: int
    """A longer value is cut."""


class Outcome(TypedDict):
    """What the worker reports at the end, in JSON."""

    ending: Ending
    exit_code: int
    value: str
    """`repr` of the last expression; empty for None or when the last statement is no expression."""
    value_cut: bool


def run(job: Job) -> Outcome:
    """Run a program as `__main__`; an error's traceback goes to stderr."""
    source = job["code"]
    linecache.cache[FILE_NAME] = (len(source), None, source.splitlines(keepends=True), FILE_NAME)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    ending: Ending = "ok"
    value, code = "", 0
    try:
        tree = ast.parse(source, FILE_NAME)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, FILE_NAME, "exec"), module.__dict__)
        if isinstance(last, ast.Expr):
            result = eval(compile(ast.Expression(last.value), FILE_NAME, "eval"), module.__dict__)
            value = "" if result is None else repr(result).encode("utf-8", "replace").decode()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            sys.stderr.write(f"{stop.code}\n")
        ending = "exit" if code else "ok"
    except BaseException as error:  # noqa: BLE001 - whatever the program raises is its result
        ending, code = "memory" if isinstance(error, MemoryError) else "exception", 1
        error.__traceback__ = _own_frames(error.__traceback__)
        traceback.print_exception(error)
    most = job["value_characters"]
    return {"ending": ending, "exit_code": code, "value": value[:most], "value_cut": len(value) > most}


def _own_frames(frames: types.TracebackType | None) -> types.TracebackType | None:
    """Without the frames of this file."""
    while frames is not None and frames.tb_frame.f_code.co_filename != FILE_NAME:
        frames = frames.tb_next
    return frames


def main(limits_json: str, report_to: int, our_path: str) -> None:
    """Confine, write `READY` to the descriptor `report_to`, wait for the job, run it, write the outcome there."""
    limits: Limits = json.loads(limits_json)
    sys.path.remove(our_path)
    sys.path[:0] = limits["packages"]
    for name in limits["preload"]:
        importlib.import_module(name)
    confine(limits)
    os.write(report_to, READY)
    job: Job = json.loads(sys.stdin.buffer.read())
    sys.argv = [FILE_NAME]
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    resource.setrlimit(resource.RLIMIT_CPU, (job["cpu_s"], job["cpu_s"]))
    # Bound before the program can put something else in their place.
    write, end, dump = os.write, os._exit, json.dumps
    outcome = run(job)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        # On a line of its own, whatever the program may have written there.
        report = b"\n" + dump(outcome).encode()
        while report:
            report = report[write(report_to, report) :]
        end(outcome["exit_code"])
