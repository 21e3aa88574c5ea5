"""The fuzzing of `benchmarks/fuzz.py`, short: every target, and what happens when it finds something."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.fuzz import TARGETS, Attack, Found, fuzz
from benchmarks.fuzz_targets import StateChanged

ROOT = Path(__file__).resolve().parents[2]
CARELESS = """
from functools import partial
import anyio
from benchmarks import fuzz

def careless(folder, attack):
    return anyio.run(partial(fuzz.fuzz_keys, careless=True), folder, attack)

fuzz.TARGETS["hub with keys"] = fuzz.Target(careless)
fuzz.main()
"""
SEED = 7
FRAMES = {
    "hub": 6_000,
    "actor": 20_000,
    "hub from within": 20_000,
    "weight files": 10_000,
    "hub over sockets": 20_000,
    "hub with keys": 40_000,
}


@pytest.mark.parametrize("target", TARGETS)
def test_hostile_messages_crash_nothing_and_change_nothing(target: str) -> None:
    outcome = fuzz(target, frames=FRAMES[target], seed=SEED)
    assert outcome.messages == FRAMES[target] // TARGETS[target].share
    assert sum(outcome.outcomes.values()) >= outcome.messages // 2


def test_a_message_that_does_harm_is_named_with_its_seed_and_its_number() -> None:
    found = r"hub: seed 3, message 12: StateChanged\('it did'\) after \[b'\{\}'\]"
    with pytest.raises(Found, match=found), Attack("hub", messages=20, seed=3) as attack:
        attack.send(12, [b"{}"])
        raise StateChanged("it did")


def test_a_message_that_never_ends_is_named_too() -> None:
    before = signal.getsignal(signal.SIGALRM)
    found = "hub: seed 3, message 5: TimeoutError"
    with pytest.raises(Found, match=found), Attack("hub", messages=20, seed=3) as attack:
        attack.send(5, [b"{}"])
        signal.raise_signal(signal.SIGALRM)
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_hub_that_lets_a_stranger_in_is_found_and_is_the_commands_exit_code() -> None:
    arguments = ["--only", "hub with keys", "--frames", "200", "--seed", "5"]
    done = subprocess.run(
        [sys.executable, "-c", CARELESS, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "Found: hub with keys: seed 5, message " in last and "passed with the key" in done.stderr
    assert '"crashes"' not in done.stdout  # no report of what failed
