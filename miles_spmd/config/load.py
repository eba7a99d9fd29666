"""From a TOML file and command-line overrides to a checked :class:`Config`, and back to TOML.

All errors are collected before anything is raised: unknown keys, wrong types and conflicts come in one message. Nothing
is written to disk.
"""

import copy
import functools
import hashlib
import json
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import ValidationError, create_model
from pydantic_core import ErrorDetails

from miles_spmd.config import Config
from miles_spmd.config.backends import BACKENDS, BackendMissingError, backend_fields, backend_keys, refusal, value_error
from miles_spmd.config.checks import errors as conflicts
from miles_spmd.config.other_names import ours, ours_within
from miles_spmd.config.overrides import apply_override, hint, nearest
from miles_spmd.config.table import ENTRY, MAX_NAME, NONE, Table, bare, child, header, is_table, walk
from miles_spmd.types.printable import printable

T = TypeVar("T", bound=Table)
Location = tuple[str, ...]
Inputs = Callable[[Config, Collection[str]], list[str]]
# pydantic's words for JSON -> TOML's
TOML_WORDS = {"an object": "a table", "a valid dictionary": "a table", "a valid array": "a list"}


# keys of `[megatron]` that decide every update, also where nobody sets them
OPTIMIZER = ("optimizer", "lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad")
DECAY = "Of the optimizer, not set here (weights of norms and biases do not decay):"


class ConfigError(ValueError):
    """All errors of one configuration; each names the setting, what is wrong and what to do."""

    def __init__(self, source: str, errors: Sequence[str]) -> None:
        self.errors = list(errors)
        count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
        super().__init__("\n  ".join([f"{source}: {count}", *errors]))


def load_config(
    path: Path | str,
    overrides: Iterable[str] = (),
    *,
    world_size: int | None = None,
    check_files: bool = True,
    elsewhere: bool = False,
    trains: bool = True,
    inputs: Inputs | None = None,
) -> Config:
    """Read ``path``, apply ``key=value`` overrides in order, check everything.

    A value is TOML, or else a bare string; :mod:`miles_spmd.config.overrides` describes the keys. ``world_size`` adds
    the checks that need it; ``check_files=False`` leaves out those that look for the checkpoint, the data and
    Transformer Engine, and ``elsewhere=True`` the last of these; ``trains=False`` those that only a run has which
    trains. ``inputs`` finds errors of what the settings name, and is given the paths of settings that have errors of
    their own. Raises ConfigError.
    """
    try:
        raw = tomllib.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(str(path), [_unreadable(error)]) from error
    return make_tables(
        Config,
        raw,
        overrides,
        source=str(path),
        world_size=world_size,
        check_files=check_files,
        elsewhere=elsewhere,
        trains=trains,
        inputs=inputs,
    )


def make_tables(
    root: type[T],
    raw: dict[str, Any],
    overrides: Iterable[str] = (),
    *,
    source: str = "settings",
    world_size: int | None = None,
    check_files: bool = False,
    elsewhere: bool = False,
    trains: bool = True,
    inputs: Callable[[T, Collection[str]], list[str]] | None = None,
) -> T:
    """As :func:`load_config`, from tables in memory that ``root`` describes, nested tables and lists too; ``raw`` is
    changed. ``source`` is named in errors."""
    errors: list[str] = []
    for override in overrides:
        try:
            apply_override(root, raw, override)
        except ValueError as error:
            errors.append(f"{override}: {error}")
    tables, wrong = _validate(root, raw, errors, check_files)
    here = check_files and not elsewhere
    errors += conflicts(
        tables, world_size=world_size, without=wrong, check_files=check_files, check_machine=here, trains=trains
    )
    if inputs is not None:
        errors += inputs(tables, wrong)
    if errors:
        raise ConfigError(source, errors)
    return tables


def _unreadable(error: OSError | ValueError) -> str:
    match error:
        case OSError():
            return f"cannot be read: {error.strerror}"
        case UnicodeDecodeError():
            line = error.object[: error.start].count(b"\n") + 1
            return f"is not text in UTF-8: byte 0x{error.object[error.start]:02x} in line {line}; save it as UTF-8"
    return f"is not valid TOML: {error}"


def dump_config(config: Table) -> str:
    """The resolved configuration as TOML; loading it gives an equal Config. Comments say what the optimizer does where
    nobody has set it."""
    settings = tomli_w.dumps(_document(config))
    if not isinstance(config, Config):
        return settings
    unset = {key: field for key, field in backend_fields("megatron").items() if key not in config.megatron}
    defaults = [f"# megatron.{key} = {unset[key].default!r}\n" for key in OPTIMIZER if key in unset]
    return "".join([settings, *([f"\n# {DECAY}\n", *defaults] if defaults else ())])


def config_digest(config: Config) -> str:
    """16 hex digits that are equal for equal configurations on every machine."""
    return hashlib.sha256(tomli_w.dumps(_document(config)).encode()).hexdigest()[:16]


def _document(value: Any) -> Any:
    """``value`` in TOML's types. A setting that is absent is left out where that is its default, else "none"."""
    if isinstance(value, Table):
        fields = {name: (getattr(value, name), field.default) for name, field in type(value).model_fields.items()}
        return {
            name: NONE if own is None else _document(own)
            for name, (own, default) in fields.items()
            if own is not None or default is not None
        }
    if isinstance(value, list):
        return [_document(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _document(entry) for key, entry in value.items()}
    return str(value) if isinstance(value, Path) else value


# --- types -----------------------------------------------------------------------------------------------------------


def parse(root: type[T], raw: Mapping[str, Any], *, download: bool = False) -> T:
    """Check keys and types alone. Raises pydantic's ValidationError. ``download``: models of the Hub, where needed."""
    # The strict rules of JSON: 8 is a float, "8" is not a number, true is not 1, and text is a path.
    return root.model_validate_json(json.dumps(raw, default=str), strict=True, context={"download": download})


def _validate(root: type[T], raw: dict[str, Any], errors: list[str], download: bool) -> tuple[T, set[str]]:
    """Add errors of keys and types. Returns tables in which settings with errors have their defaults, and the dotted
    paths of those settings, so that nothing is concluded from them."""
    wrong = _check_backends(root, raw, errors)
    try:
        return parse(root, raw, download=download), wrong
    except ValidationError as error:
        details = error.errors()
    for detail in details:
        location = tuple(str(part) for part in detail["loc"])
        errors.append(f"{printable('.'.join(location), MAX_NAME)}: {_explain(root, location, detail)}")
        wrong |= {".".join(_remove(root, raw, location)), *_meant(root, location)}
    return parse(_without_required(root), raw), wrong


def _explain(root: type[Table], location: Location, detail: ErrorDetails) -> str:
    kind, message = detail["type"], detail["msg"]
    if kind == "extra_forbidden":
        *tables, name = location
        elsewhere = [s.path[:-1] for s in walk(root) if s.path[-1] == name and s.path[1:] and not s.is_table]
        if len(elsewhere) > 1:  # entries of a list may have the names of settings for all
            elsewhere = [path for path in elsewhere if ENTRY not in path]
        if len(elsewhere) == 1:
            return f"belongs in {header(elsewhere[0])}"
        what = "key" if tables or not isinstance(detail["input"], dict) else "table"
        if other := ours_within(".".join(location), detail["input"]):
            return f"unknown {what}; here {', '.join(other)}"
        backends = [table for table in BACKENDS if table in root.model_fields and name in backend_keys(table)]
        if homes := [f"[{table}]" for table in backends if refusal(table, name) is None]:
            return f"belongs in {' or '.join(homes)}"
        return f"unknown {what}{hint([path.split('.')[-1] for path in _meant(root, location)])}"
    if kind == "missing":
        inner = next((bare(s.field.annotation) for s in walk(root) if s.path == location), None)
        if is_table(inner):
            return f"this table needs {', '.join(name for name, f in inner.model_fields.items() if f.is_required())}"
        return "is missing and has no default"
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    expected = message.removeprefix("Input should be ")
    return f"must be {TOML_WORDS.get(expected, expected)}, got {detail['input']!r:.200}"


def _meant(root: type[Table], location: Location) -> list[str]:
    """The dotted path of the setting that an unknown one resembles most, its own table's first."""
    known = {s.path: s.dotted for s in walk(root)}
    path = tuple(ENTRY if part.isdecimal() else part for part in location)
    beside = {other[-1]: dotted for other, dotted in known.items() if other[:-1] == path[:-1]}
    if path in known or not beside:
        return []
    anywhere = {other[-1]: dotted for other, dotted in known.items() if len(path) > 1 and len(other) > 1}
    for candidates in (beside, anywhere):
        if close := nearest(path[-1], candidates):
            return [candidates[name] for name in close]
    return []


def _remove(root: type[Table], raw: Any, location: Location) -> Location:
    """Remove the setting that has an error at ``location``: a table's key, the whole of a list or mapping. Return its
    path."""
    table: Any = root
    for depth, name in enumerate(location):
        table, inside = child(table, name), raw if isinstance(raw, dict) else {}
        if not is_table(bare(table)) or depth == len(location) - 1:
            inside.pop(name, None)
            return location[: depth + 1]
        raw = inside.get(name)
    return location


@functools.cache
def _without_required(table: type[T]) -> type[T]:
    """``table`` with None as the default of what has none, to read the rest of a configuration with errors."""
    fields: dict[str, Any] = {}
    for name, field in table.model_fields.items():
        inner = bare(field.annotation)
        if is_table(inner) or field.is_required():
            optional = copy.copy(field)
            optional.default = None if field.is_required() else field.default
            fields[name] = (_without_required(inner) | None if is_table(inner) else field.annotation, optional)
    return create_model(table.__name__, __base__=table, **fields)


# --- the backends' tables --------------------------------------------------------------------------------------------


def _check_backends(root: type[Table], raw: dict[str, Any], errors: list[str]) -> set[str]:
    wrong: set[str] = set()
    for table in BACKENDS:
        values = raw.get(table)
        if table not in root.model_fields or not isinstance(values, dict):
            continue
        try:
            fields = backend_fields(table)
        except BackendMissingError as error:
            errors.append(str(error))
            continue
        for key, value in values.items():
            problem = refusal(table, key)
            if problem is None and key not in fields:
                close = [] if (other := ours(key)) else nearest(key, fields)
                problem = f"unknown key; here it is {other}" if other else f"unknown key{hint(close)}"
                wrong |= {f"{table}.{name}" for name in close}
            elif problem is None:
                problem = value_error(table, key, value)
            if problem is not None:
                errors.append(f"{table}.{key}: {problem}")
                wrong.add(f"{table}.{key}")
    return wrong
