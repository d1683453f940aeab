"""The site's tables of contents name every page, since `make docs` is not part of the suite."""

from __future__ import annotations

import re

from tests.helpers.environment import ROOT


def test_every_page_stands_in_the_contents() -> None:
    named = set(re.findall(r"^docs/[\w/]+$", (ROOT / "docs" / "conf.py").read_text(encoding="utf-8"), re.M))
    pages = {f"docs/{page.stem}" for page in (ROOT / "docs").glob("*.md")}
    assert pages - named == set() and len(pages) > 20
