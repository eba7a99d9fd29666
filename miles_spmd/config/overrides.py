"""Overrides of the command line: ``key=value`` put into the tables that a file was read into.

A key is a dotted path at any depth, or begins with the name of a setting alone where only one table has a setting of
that name. Entries of lists are numbered from 0, and the number after the last one appends an entry:
``environments.0.name=x``. An override inside a list or mapping that the file does not set starts with an empty one.
"""

import difflib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_origin

from miles_spmd.config.backends import BACKENDS, backend_keys
from miles_spmd.config.other_names import ours
from miles_spmd.config.table import ENTRY, Table, bare, child, is_table, walk


def apply_override(root: type[Table], raw: dict[str, Any], override: str) -> None:
    """Change ``raw``, the contents of a file for the tables of ``root``. Raises ValueError."""
    key, equals, text = override.partition("=")
    if key.startswith("-"):
        found = ours(key.lstrip("-").replace("-", "_"))
        raise ValueError("no such option; settings are KEY=VALUE" + (f", and here it is {found}" if found else ""))
    if not equals:
        raise ValueError("an override is key=value")
    if not override.isascii() and any("\ud800" <= character <= "\udfff" for character in override):
        raise ValueError("is not text in UTF-8")
    path = locate(root, key.strip())
    if not all(path):
        raise ValueError("the key has an empty part: write the names between its dots")
    node: Any = raw
    annotation: Any = root
    for depth, part in enumerate(path):
        step = _step(node, part, ".".join(path[:depth]))
        annotation = child(annotation, part)
        if depth == len(path) - 1:
            new = _value(annotation, text.strip())
        else:
            new = [] if get_origin(bare(annotation)) is list else {}
        if isinstance(node, list) and step == len(node):
            node.append(new)
        elif depth == len(path) - 1:
            node[step] = new
        elif isinstance(node, dict):
            node.setdefault(step, new)
        node = node[step]


def locate(root: type[Table], key: str) -> tuple[str, ...]:
    """The full path of a key. Raises ValueError where there is none, or several."""
    parts = tuple(key.split("."))
    settings = {setting.path: setting for setting in walk(root) if ENTRY not in setting.path}
    named = [path for path in settings if path[-1] == parts[0]]
    found: tuple[str, ...] = parts
    if parts[0] not in root.model_fields:
        if len(named) > 1:
            raise ValueError(f"is ambiguous: write {' or '.join('.'.join((*path, *parts[1:])) for path in named)}")
        if not named and (len(parts) == 1 or not nearest(parts[0], root.model_fields)):
            raise ValueError(_unknown(root, key))
        if named:
            found = (*named[0], *parts[1:])
    if found in settings and is_table(bare(settings[found].field.annotation)):
        raise ValueError(f"this is a table: set one of its keys, {'.'.join(found)}.KEY=value")
    return found


def _unknown(root: type[Table], key: str) -> str:
    name = key.rpartition(".")[2]
    for table in BACKENDS:
        if table in root.model_fields and name in backend_keys(table) and (name == key or ours(key) is None):
            return f"this is a key of [{table}]: write {table}.{name}"
    if other := ours(key):
        return f"unknown setting; here it is {other}"
    return f"unknown setting{hint(nearest(name, [s.path[-1] for s in walk(root) if not s.is_table]))}"


def _step(node: Any, part: str, where: str) -> str | int:
    """The key or index of ``part`` in what is at the path ``where``."""
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise ValueError(f"{where} is neither a table nor a list")
    if not part.isdecimal():
        raise ValueError(f"{where} is a list: {part!r} must be an entry's number, from 0 on")
    if int(part) > len(node):
        raise ValueError(f"{where} has {len(node)} entries: {where}.{len(node)} appends one")
    return int(part)


def _value(annotation: Any, text: str) -> Any:
    """TOML where it parses; the text itself where it does not, or where the setting takes nothing but text."""
    if not text.startswith(('"', "'")) and bare(annotation) in (str, Path):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def nearest(name: str, candidates: Iterable[str]) -> list[str]:
    """At most four of ``candidates`` that ``name`` may stand for: one with a typing error, else those whose words begin
    as its words do (`rollout_temp`, `interval`), else the most similar one."""
    known = sorted(dict.fromkeys(candidates), key=len)
    words = name.split("_")
    begun = [other for other in known if all(any(w.startswith(word) for w in other.split("_")) for word in words)]
    return (
        difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        or (begun[:4] if max(map(len, words)) > 2 and all(words) else [])
        or difflib.get_close_matches(name, known, n=1)
    )


def hint(close: list[str]) -> str:
    return f"; did you mean {' or '.join(close)}?" if close else ""
