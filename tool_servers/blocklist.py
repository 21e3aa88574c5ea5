"""Sites and pages that search never shows and scrape never reads: one list for both."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Blocklist:
    """Domains, each with all its subdomains, and URL prefixes."""

    domains: frozenset[str] = frozenset()
    pages: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Host → the paths below it that are blocked, of that host and its subdomains."""

    def __bool__(self) -> bool:
        return bool(self.domains or self.pages)

    def covers(self, url: str) -> str | None:
        """The entry that blocks a URL, if any; text that is no web address is never blocked."""
        try:
            parts = urlsplit(url)
        except ValueError:
            return None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            return None
        labels = parts.hostname.lower().rstrip(".").split(".")
        for start in range(len(labels)):
            domain = ".".join(labels[start:])
            if domain in self.domains:
                return domain
            for path in self.pages.get(domain, ()):
                if parts.path == path or parts.path.startswith(path.rstrip("/") + "/"):
                    return domain + path
        return None


def read_blocklist(file: Path) -> Blocklist:
    """One entry a line: `bad.example`, or `bad.example/folder` with or without `https://`; # starts a comment.

    Raises `OSError`.
    """
    domains: set[str] = set()
    pages: dict[str, tuple[str, ...]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        entry = line.partition("#")[0].strip()
        host, slash, path = entry.removeprefix("https://").removeprefix("http://").partition("/")
        host = host.lower().strip(".")
        if not host:
            continue
        if path:
            pages[host] = (*pages.get(host, ()), slash + path)
        else:
            domains.add(host)
    return Blocklist(frozenset(domains), pages)
