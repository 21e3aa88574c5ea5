"""The official MCP conformance suite against our client and our servers; what fails is listed with its reason."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
INSTALLED = ROOT / ".cache" / "conformance"
NODE = INSTALLED / "node" / "bin" / "node"
SUITE = INSTALLED / "node_modules" / "@modelcontextprotocol" / "conformance" / "dist" / "index.js"

pytestmark = [pytest.mark.thirdparty, pytest.mark.timeout(300)]


def run_suite(*arguments: str) -> str:
    """Run the suite and return what it printed. Exactly the scenarios that are listed must fail."""
    if not SUITE.is_file():
        pytest.fail(f"{SUITE} does not exist; run `make third-party`")
    done = subprocess.run(
        [str(NODE), str(SUITE), *arguments, "--expected-failures", str(HERE / "expected.yml")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@contextmanager
def served() -> Iterator[str]:
    """The URL of our server's stand-in."""
    command = [sys.executable, "-m", "tests.conformance.server"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        announced = re.search(r"http://\S+", process.stderr.readline())
        assert announced is not None
        try:
            yield announced[0]
        finally:
            process.terminate()


def passed(output: str) -> set[str]:
    """The scenarios that passed."""
    return set(re.findall(r"✓ (\S+): [1-9]\d* passed, 0 failed", output))


def test_our_servers_pass_what_they_offer() -> None:
    with served() as url:
        output = run_suite("server", "--url", url)
    assert passed(output) >= {
        "server-initialize",
        "ping",
        "tools-list",
        "tools-call-simple-text",
        "tools-call-error",
        "dns-rebinding-protection",
    }


def test_our_client_passes_what_training_needs() -> None:
    output = run_suite("client", "--suite", "core", "--command", f"{sys.executable} -m tests.conformance.client")
    assert passed(output) >= {"initialize", "tools_call", "sse-retry"}
