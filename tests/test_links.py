"""Every link from one page of the documentation to a file or a heading leads somewhere."""

import re
from urllib.parse import unquote, urlsplit

import pytest

from support import ROOT

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks" / "README.md"]
LINK = re.compile(r"\]\(([^()\s]+)\)")
ELSEWHERE = re.compile(r"\]\((\w+://[^)]*)\)|<(\w+://[^>]*)>")


def without_code(text):
    return re.sub(r"```.*?```", "", text, flags=re.S)


def anchors(path):
    """The anchors of the headings of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.+?)\s*$", without_code(path.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for link in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_other_sites_are_written_correctly(page):
    """Without a network only their syntax can be checked."""
    for found in ELSEWHERE.findall(without_code(page.read_text(encoding="utf-8"))):
        url = "".join(found)
        parts = urlsplit(url)
        assert parts.scheme == "https", url
        assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), url
        assert not re.search(r"\s", url), url
