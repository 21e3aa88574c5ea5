"""Tokens are trained on as what they are: every version, digest and log-probability of a run is recomputed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.audit import KEEP_ALL, audit
from tests.end_to_end.processes import matpo, only_run, short_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_every_token_of_a_run_has_the_log_probability_of_the_weights_it_names(tmp_path: Path) -> None:
    done = matpo(*short_run(tmp_path, *KEEP_ALL))
    assert done.returncode == 0, done.stdout + done.stderr
    found = audit(only_run(tmp_path))
    assert found.tokens > 1_000
    assert len(found.versions) >= 3
    assert found.mixed > 0
    assert found.worst < 1e-4
