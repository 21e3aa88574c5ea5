"""`python -m tool_servers.code`: run Python programs for any MCP client, each in a sandbox of its own."""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
from collections.abc import Sequence

from pydantic import JsonValue

from tool_servers.code.pool import Busy, Pool
from tool_servers.code.sandbox import STRENGTH, TIERS, Allowance, Sandbox, SandboxError, choose_sandbox
from tool_servers.code.worker import Finished
from tool_servers.serving import (
    Arguments,
    BadCall,
    Reply,
    ServedTool,
    Service,
    Unavailable,
    add_transport_options,
    fail,
    serve,
    text_argument,
)

LONGEST_PROGRAM = 1_000_000
"""Characters."""


def _parser() -> argparse.ArgumentParser:
    tiers = "; ".join(f"{tier}: {STRENGTH[tier]}" for tier in TIERS)
    parser = argparse.ArgumentParser(prog="python -m tool_servers.code", description=__doc__, epilog=f"tiers: {tiers}")
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve", help="serve the tool `run_python`", epilog=f"tiers: {tiers}")
    serving.add_argument("--timeout", type=float, default=10.0, metavar="S", help="per program (default %(default)g)")
    serving.add_argument("--max-timeout", type=float, default=60.0, metavar="S", help="the most a caller may ask for")
    serving.add_argument("--memory-mb", type=int, default=512, help="address space (default %(default)s)")
    serving.add_argument("--disk-mb", type=int, default=64, help="scratch files, in memory (default %(default)s)")
    serving.add_argument("--output-kb", type=int, default=64, help="stdout, stderr and value (default %(default)s)")
    serving.add_argument("--packages", action="store_true", help="programs may import this interpreter's packages")
    serving.add_argument("--preload", default="math,json,re", metavar="MODULES",
                         help="imported ahead of every program (default %(default)s)")  # fmt: skip
    serving.add_argument("--ahead", type=int, default=2, help="sandboxes started before they are needed")
    serving.add_argument("--at-once", type=int, default=2 * (os.cpu_count() or 1), help="programs run side by side")
    serving.add_argument("--wait", type=float, default=10.0, metavar="S",
                         help='for one of those to end; then a call fails as busy (default %(default)g)')  # fmt: skip
    serving.add_argument("--tier", choices=TIERS, help="default: the strongest that works")
    serving.add_argument("--require-strict", action="store_true", help="refuse anything weaker than bubblewrap")
    add_transport_options(serving)
    commands.add_parser("check", help="say which tier works here, and why a stronger one does not")
    return parser


def run_python_tool(pool: Pool, sandbox: Sandbox, *, timeout_s: float) -> ServedTool:
    """The tool as MCP clients see it; `timeout_s` is for callers who ask for none."""
    longest_s = sandbox.allowance.longest_s

    async def run_python(arguments: Arguments) -> Reply:
        code = text_argument(arguments, "code")
        if len(code) > LONGEST_PROGRAM:
            raise BadCall(f"argument 'code' has {len(code):,} characters; at most {LONGEST_PROGRAM:,} are run")
        wanted = arguments.get("timeout_s", timeout_s)
        if isinstance(wanted, bool) or not isinstance(wanted, int | float) or not 0 < wanted <= longest_s:
            raise BadCall(f"argument 'timeout_s' must be a number above 0 and at most {longest_s:g}, got {wanted!r}")
        try:
            done = await pool.run(code, timeout_s=float(wanted))
        except (Busy, SandboxError, OSError) as error:
            raise Unavailable(str(error)) from error
        meta: dict[str, JsonValue] = {"sandbox": sandbox.tier, "seconds": round(done.seconds, 4)}
        return Reply(report(done), meta=meta, is_error=done.reason != "ok", structured=_parts(done))

    return ServedTool(
        name="run_python",
        description=(
            "Run a Python program and return what it prints and the value of its last expression."
            " Every call starts afresh: no files, variables or network."
        ),
        parameters={
            "type": "object",
            "properties": {
                "code": {"type": "string", "description": "The program."},
                "timeout_s": {"type": "number", "exclusiveMinimum": 0, "maximum": longest_s},
            },
            "required": ["code"],
        },
        call=run_python,
    )


def report(done: Finished) -> str:
    """What the model reads: output, value, errors, and how the program ended if not well."""
    parts = [done.stdout.rstrip("\n"), done.value, done.stderr.rstrip("\n")]
    if done.truncated and done.reason != "output":
        parts.append("[the output was too long and is cut]")
    if done.reason != "ok":
        parts.append(f"[{done.reason}: {done.detail}]" if done.detail else f"[{done.reason}]")
    return "\n".join(part for part in parts if part) or "(no output)"


def _parts(done: Finished) -> dict[str, JsonValue]:
    return {
        "reason": done.reason,
        "detail": done.detail,
        "stdout": done.stdout,
        "stderr": done.stderr,
        "value": done.value,
        "truncated": done.truncated,
    }


def _allowance(options: argparse.Namespace) -> Allowance:
    for name in ("timeout", "max_timeout", "memory_mb", "disk_mb", "output_kb", "at_once", "wait"):
        if vars(options)[name] <= 0:
            fail(f"--{name.replace('_', '-')} {vars(options)[name]}: must be above 0")
    if options.ahead < 0:
        fail(f"--ahead {options.ahead}: must not be negative")
    if options.timeout > options.max_timeout:
        fail(f"--timeout {options.timeout:g} is above --max-timeout {options.max_timeout:g}")
    return Allowance(
        memory_bytes=options.memory_mb * 2**20,
        disk_bytes=options.disk_mb * 2**20,
        output_bytes=options.output_kb * 1024,
        longest_s=options.max_timeout,
        packages=tuple({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}) if options.packages else (),
        preload=tuple(name for name in options.preload.split(",") if name),
    )


def _check() -> int:
    works = False
    for tier in TIERS:
        try:
            choose_sandbox(Allowance(), tier=tier)
            said, works = f"works ({STRENGTH[tier]})", True
        except SandboxError as error:
            said = str(error)
        sys.stdout.write(f"{tier}: {said}\n")
    return 0 if works else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args(argv)
    if options.command == "check":
        return _check()
    try:
        sandbox = choose_sandbox(_allowance(options), tier=options.tier, require_strict=options.require_strict)
    except SandboxError as error:
        fail(str(error))
    strength = f"{sandbox.tier}: {STRENGTH[sandbox.tier]}"
    instead = f" (not stronger, for {sandbox.instead_of})" if sandbox.instead_of else ""
    sys.stderr.write(f"code: sandbox tier {strength}{instead}\n")
    sys.stderr.flush()
    pool = Pool(sandbox, ahead=options.ahead, at_once=options.at_once, wait_s=options.wait)
    tool = run_python_tool(pool, sandbox, timeout_s=options.timeout)
    instructions = f"Runs Python programs, each in its own sandbox ({strength})."
    service = Service("code", instructions, (tool,), running=pool.open)
    return serve(service, http=options.http, host=options.host)


if __name__ == "__main__":
    sys.exit(main())
