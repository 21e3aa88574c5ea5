"""docs/failures.md and docs/security.md name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"


@pytest.mark.parametrize(("page", "claims"), [("failures.md", 30), ("security.md", 15)])
def test_every_test_that_a_page_names_exists(page: str, claims: int) -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (DOCS / page).read_text(encoding="utf-8"))
    assert len(named) > claims
    for file, name in named:
        assert re.search(rf"^(async )?def {name}\(", (TESTS / file).read_text(encoding="utf-8"), re.MULTILINE), name
