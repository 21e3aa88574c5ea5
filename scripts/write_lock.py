"""Write a lock file (name==version a line) from pip's resolution report: `write_lock.py REPORT LOCK`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

OURS = "matpo"


def main() -> None:
    report, lock = Path(sys.argv[1]), Path(sys.argv[2])
    found = (item["metadata"] for item in json.loads(report.read_text())["install"])
    # A local build tag (torch's +cpu) is dropped: the registry that serves the install decides the build.
    rows = sorted(f"{m['name']}=={m['version'].split('+')[0]}" for m in found if m["name"] != OURS)
    head = "# Every package `make` installs, by exact version (Python 3.11, Linux). Remade with `make lock`.\n"
    lock.write_text(head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
