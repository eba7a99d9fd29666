"""The examples of docs/plugins.md, extracted."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

PAGE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()


class Example(NamedTuple):
    module: str
    code: str
    settings: dict[str, dict[str, Any]]

    @property
    def function(self) -> str:
        """``module:function``, as the settings name it."""
        (found,) = set(re.findall(rf"{self.module}:\w+", json.dumps(self.settings)))
        return found


def examples() -> dict[str, Example]:
    found = {}
    for section in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        (code,) = re.findall(r"^```python\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
        (settings,) = re.findall(r"^```toml\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
        name = re.match(r"# (\w+)\.py\n", code)
        assert name, title
        found[title] = Example(name[1], code, tomllib.loads(settings))
    return found


EXAMPLES = examples()


def write_modules(folder: Path) -> None:
    for one in EXAMPLES.values():
        (folder / f"{one.module}.py").write_text(one.code)
