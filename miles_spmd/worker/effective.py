"""Every value that Megatron-core and SGLang run with, defaults included, as comments at the end of config.toml.

They are comments because a run that is repeated from config.toml sets only what its user has set: what else there is
follows from it, from the model and from the machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from contextlib import closing
from enum import Enum
from pathlib import Path
from typing import Any

import tomli_w

from miles_spmd.types.files import AppendedFile
from miles_spmd.types.secrets import scrub


def append_values(file: Path, table: str, backend: str, objects: Iterable[Any]) -> None:
    """Append the fields of dataclass instances as ``[table]``, without secrets, where ``file`` exists and does not have
    them yet. Raises OSError."""
    title = f"Every value of {backend} in this run, [{table}], for information:"
    if not file.is_file() or title in file.read_text():
        return
    values: dict[str, Any] = {}
    for one in objects:
        fields = {field.name: getattr(one, field.name, None) for field in dataclasses.fields(one)}
        values |= {name: _plain(value) for name, value in fields.items() if value is not None}
    tables = scrub(dict(sorted(values.items())))
    for name in reversed(table.split(".")):
        tables = {name: tables}
    text = tomli_w.dumps(tables)
    lines = [title, *text.splitlines()]
    with closing(AppendedFile(file)) as out:  # in one write: trainer and engine may be two processes
        out.append(("\n" + "".join(f"# {line}\n" for line in lines)).encode())


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(entry, bool | int | float | str) for entry in value):
        return list(value)
    return getattr(value, "__name__", str(value))
