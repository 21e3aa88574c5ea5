"""docs/failures.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
GUIDE = (TESTS.parent / "docs" / "failures.md").read_text(encoding="utf-8")


def test_every_row_of_the_failure_table_names_a_test_that_exists() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", GUIDE)
    assert len(named) > 30
    for file, name in named:
        assert re.search(rf"^(async )?def {name}\(", (TESTS / file).read_text(encoding="utf-8"), re.MULTILINE), name
