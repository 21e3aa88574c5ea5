"""`python -m tool_servers.code`: run Python programs for any MCP client, each in a sandbox of its own."""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
from collections.abc import Sequence

from pydantic import JsonValue

from tool_servers.code.sandbox import Allowance, Finished, Pool, SandboxError, Tier, choose_sandbox
from tool_servers.serving import (
    Arguments,
    BadCall,
    Reply,
    ServedTool,
    Service,
    add_transport_options,
    fail,
    serve,
    text_argument,
)

STRENGTH: dict[Tier, str] = {
    "bubblewrap": "private namespaces, no network, read-only files, seccomp",
    "landlock": "no network, read-only files, seccomp; shares the host's process list (no namespaces)",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tool_servers.code", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve", help="serve the tool `run_python`")
    serving.add_argument("--timeout", type=float, default=10.0, metavar="S", help="per program (default %(default)g)")
    serving.add_argument("--max-timeout", type=float, default=60.0, metavar="S", help="the most a caller may ask for")
    serving.add_argument("--memory-mb", type=int, default=512, help="address space (default %(default)s)")
    serving.add_argument("--disk-mb", type=int, default=64, help="scratch files (default %(default)s)")
    serving.add_argument("--output-kb", type=int, default=64, help="stdout and stderr (default %(default)s)")
    serving.add_argument("--packages", action="store_true", help="programs may import this interpreter's packages")
    serving.add_argument("--ahead", type=int, default=2, help="sandboxes started before they are needed")
    serving.add_argument("--at-once", type=int, default=2 * (os.cpu_count() or 1), help="programs run side by side")
    serving.add_argument("--tier", choices=("bubblewrap", "landlock"), help="default: the strongest that works")
    serving.add_argument("--require-strict", action="store_true", help="refuse anything weaker than bubblewrap")
    add_transport_options(serving)
    return parser


def run_python_tool(pool: Pool, tier: Tier, *, timeout_s: float, longest_s: float, output_bytes: int) -> ServedTool:
    """The tool as MCP clients see it."""

    async def run_python(arguments: Arguments) -> Reply:
        program = text_argument(arguments, "code")
        wanted = arguments.get("timeout_s", timeout_s)
        if isinstance(wanted, bool) or not isinstance(wanted, int | float) or not 0 < wanted <= longest_s:
            raise BadCall(f"argument 'timeout_s' must be a number above 0 and at most {longest_s:g}, got {wanted!r}")
        done = await pool.run(program, timeout_s=float(wanted), output_bytes=output_bytes)
        meta: dict[str, JsonValue] = {"sandbox": tier, "reason": done.reason, "seconds": round(done.seconds, 4)}
        return Reply(report(done), meta=meta, is_error=done.reason != "ok")

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
    """What the model reads: output, errors, and how the program ended if not well."""
    parts = [done.stdout.rstrip("\n"), done.stderr.rstrip("\n")]
    if done.reason != "ok":
        parts.append(f"[{done.reason}]")
    return "\n".join(part for part in parts if part) or "(no output)"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args(argv)
    packages = (sysconfig.get_path("purelib"),) if options.packages else ()
    allowance = Allowance(
        memory_bytes=options.memory_mb * 2**20,
        disk_bytes=options.disk_mb * 2**20,
        output_bytes=options.output_kb * 1024,
        longest_s=options.max_timeout,
        packages=packages,
    )
    try:
        sandbox = choose_sandbox(allowance, tier=options.tier, require_strict=options.require_strict)
    except SandboxError as error:
        fail(str(error))
    sys.stderr.write(f"code: sandbox tier {sandbox.tier}: {STRENGTH[sandbox.tier]}\n")
    sys.stderr.flush()
    pool = Pool(sandbox, ahead=options.ahead, at_once=options.at_once)
    tool = run_python_tool(
        pool,
        sandbox.tier,
        timeout_s=min(options.timeout, options.max_timeout),
        longest_s=options.max_timeout,
        output_bytes=allowance.output_bytes,
    )
    instructions = f"Runs Python programs, each in its own sandbox ({sandbox.tier}: {STRENGTH[sandbox.tier]})."
    service = Service("code", instructions, (tool,), running=pool.open)
    return serve(service, http=options.http, host=options.host)


if __name__ == "__main__":
    sys.exit(main())
