"""The list of sites and pages that search and scrape leave out."""

from __future__ import annotations

from pathlib import Path

from tool_servers.blocklist import Blocklist, read_blocklist


def test_a_domain_covers_its_subdomains_and_a_page_what_is_below_it(tmp_path: Path) -> None:
    file = tmp_path / "blocked.txt"
    file.write_text("# test answers\nBad.example.\norg # all of it\n\nhttps://site.net/answers\nsite.net/b/c.html\n")
    listed = read_blocklist(file)
    assert listed.covers("http://WWW.bad.example./x") == "bad.example"
    assert listed.covers("https://a.b.org:8080") == "org"
    assert listed.covers("https://notbad.example/") is None
    assert listed.covers("http://site.net/answers") == "site.net/answers"
    assert listed.covers("http://www.site.net/answers/1?x=2") == "site.net/answers"
    assert listed.covers("http://site.net/answersheet") is None
    assert listed.covers("http://site.net/b/c.html") == "site.net/b/c.html"
    assert listed.covers("http://site.net/") is None
    assert listed.covers("doc 7 of bad.example") is None
    assert listed.covers("http://[bad") is None
    assert not Blocklist()
