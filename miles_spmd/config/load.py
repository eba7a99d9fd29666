"""From a TOML file and command-line overrides to a checked :class:`Config`, and back to TOML.

Every fault is collected before anything is raised: unknown keys, wrong types and contradictions come in one message.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import tomli_w
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from miles_spmd.config.backends import BackendMissingError, backend_fields, owned_because
from miles_spmd.config.checks import contradictions, missing_files
from miles_spmd.config.schema import Config, Table
from miles_spmd.models.random import PREFIX, random_checkpoint

TABLES: dict[str, type[Table]] = {
    name: field.annotation  # type: ignore[misc]
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Table)
}
TABLE_OF: dict[str, str] = {leaf: name for name, table in TABLES.items() for leaf in table.model_fields}
BACKENDS = ("megatron", "sglang")
NONE = "none"  # TOML has no null: this string stands for it where a setting may be absent

Location = tuple[str, ...]


class ConfigError(ValueError):
    """All faults of one configuration; each says where it is and what to do."""

    def __init__(self, source: str, faults: Sequence[str]) -> None:
        self.faults = list(faults)
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        super().__init__("\n  ".join([f"{source}: {count}", *faults]))


def load_config(
    path: Path | str, overrides: Iterable[str] = (), *, world_size: int | None = None, check_files: bool = True
) -> Config:
    """Read ``path``, apply ``key=value`` overrides in order, check everything.

    A key is dotted (``rollout.rollout_temperature``) or a leaf of our own tables alone; a value is TOML, or else a
    bare string. ``world_size`` adds the checks that need it; ``check_files=False`` leaves out those that look for
    the checkpoint, the data and Transformer Engine. Raises ConfigError.
    """
    try:
        raw = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"is not valid TOML: {error}"]) from error
    return make_config(raw, overrides, source=str(path), world_size=world_size, check_files=check_files)


def make_config(
    raw: dict[str, Any],
    overrides: Iterable[str] = (),
    *,
    source: str = "settings",
    world_size: int | None = None,
    check_files: bool = True,
) -> Config:
    """As :func:`load_config`, from tables that are in memory; ``raw`` is changed. ``source`` is named in errors."""
    faults: list[str] = []
    for override in overrides:
        try:
            _apply(raw, override)
        except ValueError as error:
            faults.append(f"{override}: {error}")
    unknown = _make_random_models(raw, faults)
    config, wrong = _validate(raw, faults)
    wrong |= unknown
    faults += contradictions(config, world_size=world_size, ignore=wrong)
    if check_files:
        faults += missing_files(config, ignore=wrong)
    if faults:
        raise ConfigError(source, faults)
    return config


def dump_config(config: Config) -> str:
    """The resolved configuration as TOML; loading it gives an equal Config."""
    document: dict[str, Any] = {}
    for name, table in TABLES.items():
        values = getattr(config, name).model_dump()
        document[name] = {
            leaf: _plain(NONE if value is None else value)
            for leaf, value in values.items()
            if value is not None or table.model_fields[leaf].default is not None
        }
    for name in BACKENDS:
        document[name] = getattr(config, name)
    return tomli_w.dumps(document)


def config_digest(config: Config) -> str:
    """16 hex digits that are equal for equal configurations on every machine."""
    return hashlib.sha256(dump_config(config).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


# --- overrides -------------------------------------------------------------------------------------------------------


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError("an override is key=value")
    location = _locate(key.strip())
    table = raw
    for part in location[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ValueError(f"{part} is no table")
    table[location[-1]] = _value(location, text.strip())


def _locate(key: str) -> Location:
    """The full path of a dotted key, or of one that begins with a leaf of our tables."""
    parts = tuple(key.split("."))
    if parts[0] in TABLE_OF:
        return (TABLE_OF[parts[0]], *parts)
    if len(parts) > 1:
        return parts
    for table in BACKENDS:
        if key in _backend_keys(table):
            raise ValueError(f"this is a key of [{table}]: write {table}.{key}")
    raise ValueError(f"unknown setting{_hint(_nearest(key, TABLE_OF))}")


def _value(location: Location, text: str) -> Any:
    """TOML where it parses; the text itself where it does not, or where the setting takes nothing but text."""
    if not text.startswith(('"', "'")) and _takes_text(location):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _takes_text(location: Location) -> bool:
    if len(location) != 2 or location[0] not in TABLES:
        return False
    field = TABLES[location[0]].model_fields.get(location[1])
    return field is not None and field.annotation in (str, str | None, Path, Path | None)


def _make_random_models(raw: dict[str, Any], faults: list[str]) -> set[str]:
    """Put a folder in the place of every ``random:SHAPE``. Returns the leaves for which there is none."""
    unknown = set()
    table = raw.get("model")
    table = table if isinstance(table, dict) else {}
    for leaf, value in table.items():
        if isinstance(value, str) and value.startswith(PREFIX):
            try:
                table[leaf] = str(random_checkpoint(value))
            except (ValueError, OSError) as error:
                faults.append(f"model.{leaf}: {error}")
                unknown.add(leaf)
    return unknown


# --- types -----------------------------------------------------------------------------------------------------------


def _validate(raw: dict[str, Any], faults: list[str]) -> tuple[Config, set[str]]:
    """Add faults of keys and types. Returns a Config in which faulty keys have their defaults, and the names of those
    leaves, so that nothing is concluded from them."""
    wrong = _check_backends(raw, faults)
    raw = {name: _with_none(name, table) for name, table in raw.items()}
    try:
        return _parse(raw), wrong
    except ValidationError as error:
        for fault in error.errors():
            location = tuple(str(part) for part in fault["loc"])
            faults.append(f"{'.'.join(location)}: {_explain(location, fault)}")
            wrong.update(_repair(raw, location, missing=fault["type"] == "missing"))
    return _parse(raw), wrong


def _parse(raw: dict[str, Any]) -> Config:
    # The strict rules of JSON: 8 is a float, "8" is no number, true is no 1, and text is a path.
    return Config.model_validate_json(json.dumps(raw, default=str), strict=True)


def _with_none(name: str, table: Any) -> Any:
    if name not in TABLES or not isinstance(table, dict):
        return table
    optional = {leaf for leaf, f in TABLES[name].model_fields.items() if NoneType in get_args(f.annotation)}
    return {leaf: None if leaf in optional and value == NONE else value for leaf, value in table.items()}


def _explain(location: Location, fault: ErrorDetails) -> str:
    kind, value = fault["type"], fault["input"]
    if kind == "extra_forbidden":
        leaf = location[-1]
        if leaf in TABLE_OF and (len(location) == 1 or TABLE_OF[leaf] != location[0]):
            return f"belongs in [{TABLE_OF[leaf]}]"
        if len(location) == 1:
            return f"unknown table{_hint(_nearest(leaf, [*TABLES, *BACKENDS]))}"
        return f"unknown key{_hint(_meant(location))}"
    if kind == "missing":
        required = [leaf for leaf, field in TABLES[location[0]].model_fields.items() if field.is_required()]
        return "is missing and has no default" if len(location) > 1 else f"this table needs {', '.join(required)}"
    message = fault["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"must be {message}, got {value!r}"


def _meant(location: Location) -> list[str]:
    """The leaf that an unknown one most resembles, its own table's first."""
    return _nearest(location[1], _fields(location[0])) or _nearest(location[1], TABLE_OF)


def _repair(raw: dict[str, Any], location: Location, *, missing: bool) -> list[str]:
    """Make ``raw`` valid at ``location`` and return the leaves whose values are now not the user's."""
    name = location[0]
    required = {leaf: "" for leaf, field in _fields(name).items() if field.is_required()}  # each of them is a path
    if len(location) == 1:
        raw.pop(name, None)
        if required:
            raw[name] = required
        return [name, *_fields(name)]
    if missing or location[1] in required:
        raw[name][location[1]] = ""
    else:
        raw[name].pop(location[1], None)
    return [location[1], *_meant(location)]


def _fields(table: str) -> Mapping[str, FieldInfo]:
    return TABLES[table].model_fields if table in TABLES else {}


# --- the backends' tables --------------------------------------------------------------------------------------------


def _check_backends(raw: dict[str, Any], faults: list[str]) -> set[str]:
    wrong: set[str] = set()
    for table in BACKENDS:
        values = raw.get(table)
        if not isinstance(values, dict):
            continue
        try:
            fields = backend_fields(table)
        except BackendMissingError as error:
            faults.append(str(error))
            continue
        for key, value in values.items():
            reason = owned_because(table, key)
            if reason is not None:
                problem: str | None = f"cannot be set here: {reason}"
            elif key not in fields:
                problem = f"unknown key{_hint(_nearest(key, fields))}"
                wrong.update(_nearest(key, fields))
            else:
                problem = fields[key].fault(value)
            if problem is not None:
                faults.append(f"{table}.{key}: {problem}")
                wrong.add(key)
    return wrong


def _backend_keys(table: str) -> Iterable[str]:
    try:
        return backend_fields(table)
    except BackendMissingError:
        return ()


def _nearest(name: str, candidates: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(candidates), n=1)


def _hint(close: list[str]) -> str:
    return f"; did you mean {close[0]}?" if close else ""
