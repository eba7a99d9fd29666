"""The map of the code, held against the code: files that documents name exist, and the README's loop is the loop."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "miles_spmd"
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((REPOSITORY / "docs").glob("*.md"))))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    file = REPOSITORY / page
    links = re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text())
    missing = [link for link in links if not (file.parent / link).exists()]
    assert not missing


def test_files_on_the_map_exist() -> None:
    names = set(re.findall(r"`([a-z_]+(?:/[a-z_0-9]+)*\.py)", (REPOSITORY / "docs" / "architecture.md").read_text()))
    assert len(names) > 50
    missing = [
        n for n in names if not any((root / n).exists() for root in (PACKAGE, REPOSITORY, PACKAGE / "controller"))
    ]
    assert not [name for name in missing if not list(PACKAGE.rglob(name))]


def test_the_readme_shows_the_loop() -> None:
    (shown,) = re.findall(r"^```python\n(groups = .*?)^```$", (REPOSITORY / "README.md").read_text(), re.M | re.S)
    source = (PACKAGE / "controller" / "loops" / "sync.py").read_text()
    assert textwrap.indent(shown, "    ") in source
