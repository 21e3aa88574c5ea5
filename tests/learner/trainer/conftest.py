"""Two ranks for all tests of a file: importing torch twice takes longer than what most of them do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.learner.trainer.pair import Pair


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair(rank_timeout_s=60) as made:
        yield made
