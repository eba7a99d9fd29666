"""Rows of JSONL and parquet files, and one exception that lists all errors of a file."""

from __future__ import annotations

import codecs
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from miles_spmd.config import DataConfig
from miles_spmd.config.table import names_function
from miles_spmd.data.tokenizer import Text, Tokenizer
from miles_spmd.plugins.data import DataSource
from miles_spmd.plugins.plug_point import PlugInError, PlugPoint, PlugPointError

SOURCES: PlugPoint[DataSource] = PlugPoint("data.prompt_data", {}, DataSource)
Row = dict[str, Any]
Item = TypeVar("Item")
Draft = Callable[[str, Row], tuple[list[Text], Callable[..., Item]]]

_log = logging.getLogger(__name__)
_CHUNK = 1024  # rows that are encoded at a time
_SLICE = re.compile(r"^(?P<path>.+)@\[(?P<start>-?\d*):(?P<stop>-?\d*)\]$")
_SHOWN_ERRORS = 20
_END: Any = object()  # behind the last row of a function


class RowError(ValueError):
    """One error of a file: ``row`` counts from 1 (the line number in JSONL); None: the file as a whole."""

    def __init__(self, problem: str, remedy: str, row: int | None = None) -> None:
        problem = " ".join(problem.splitlines())  # what a library or a template says may have several lines
        super().__init__(f"{problem}; {remedy}")
        self.problem, self.remedy, self.row = problem, remedy, row


class TooLongError(RowError):
    """A row that ``data.drop_long_prompts`` leaves out."""


class FileError(RowError):
    """An error that every row of a kind has, such as a missing chat template: reported once, for the first of them."""


class DataError(ValueError):
    """A data file that cannot be used. ``errors`` has all of its errors, the message the first of them."""

    def __init__(self, path: Path | str, errors: list[RowError]) -> None:
        self.path = path
        self.errors = errors
        lines = [f"{path}{'' if e.row is None else f':{e.row}'}: {e}" for e in errors[:_SHOWN_ERRORS]]
        if len(errors) > _SHOWN_ERRORS:
            lines.append(f"... and {len(errors) - _SHOWN_ERRORS} more errors in {path}")
        super().__init__("\n".join(lines))


def parse_slice(prompt_data: str) -> tuple[Path, slice]:
    """Split ``path@[a:b]`` into the path and the slice of its rows, as in Python. Raises DataError if malformed."""
    match = _SLICE.match(prompt_data)
    if match is None:
        if "@[" in prompt_data:
            remedy = "write path@[start:stop] with integers, either of which may be left out"
            raise DataError(prompt_data, [RowError("malformed slice", remedy)])
        return Path(os.path.expanduser(prompt_data)), slice(None)
    bounds = [int(b) if b else None for b in (match["start"], match["stop"])]
    return Path(os.path.expanduser(match["path"])), slice(*bounds)


def load_items(source: str, name: str | None, data: DataConfig, tokenizer: Tokenizer, draft: Draft[Item]) -> list[Item]:
    """Return the items of all rows of ``source``, in order. Their uids are ``name:row`` (default name: the file's).

    ``draft(uid, row)`` returns the texts of an item, and what makes the item of their encodings: the tokenizer encodes
    the texts of many rows at a time, in parallel. Rows that are too long are left out with ``data.drop_long_prompts``.
    Raises DataError with the RowErrors of all rows, and if no item is left.
    """
    errors: list[RowError] = []
    items: list[Item] = []
    rows = read_rows(source, errors)
    name = name or parse_slice(source)[0].name
    dropped = count = 0

    @contextmanager
    def collecting_errors(number: int) -> Iterator[None]:
        nonlocal dropped
        try:
            yield
        except RowError as error:
            error.row = number
            if isinstance(error, TooLongError) and data.drop_long_prompts:
                dropped += 1
            elif not isinstance(error, FileError) or str(error) not in map(str, errors):
                errors.append(error)

    while chunk := list(islice(rows, _CHUNK)):
        count += len(chunk)
        drafts = []
        for number, row in chunk:
            with collecting_errors(number):
                drafts.append((number, *draft(f"{name}:{number}", row)))
        encodings = iter(tokenizer.encode_texts([text for _, texts, _ in drafts for text in texts]))
        for number, texts, finish in drafts:
            own = list(islice(encodings, len(texts)))
            with collecting_errors(number):
                for problem in (tokenizer.unknown_to_model(encoding.ids) for encoding in own):
                    if problem is not None:
                        raise RowError(problem, "take the tokenizer that belongs to the model, or another text")
                items.append(finish(*own))
    if dropped:
        _log.warning("%s: dropped %d of %d prompts as too long", source, dropped, count)
    if not items and not errors:
        errors = [RowError("no rows", "check the file, its slice and data.drop_long_prompts")]
    if errors:
        raise DataError(source, sorted(errors, key=lambda error: error.row or 0))
    return items


def read_rows(prompt_data: str, errors: list[RowError]) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a file's or a function's slice with their numbers, which count from 1 in the whole of it.

    An error of a single row is appended to ``errors`` and the row left out. Raises DataError if the file cannot be
    read, or the function be called.
    """
    path, rows = parse_slice(prompt_data)
    if names_function(str(path)):
        yield from _call_source(str(path), rows, errors)
        return
    if not path.is_file():
        raise DataError(path, [RowError("no such file", "check data.prompt_data or eval.eval_prompt_data")])
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            yield from _read_parquet(path, rows)
        elif kind in (".jsonl", ".json", ".ndjson"):
            yield from _read_json(path, rows, errors)
        else:
            raise DataError(path, [RowError(f"unknown kind {path.suffix!r}", "use a .jsonl or .parquet file")])
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
        raise DataError(path, [RowError(problem, "check the file and its permissions")]) from error


def _call_source(name: str, rows: slice, errors: list[RowError]) -> Iterator[tuple[int, Row]]:
    """Read the rows that a user's function returns: not more of them than a slice without negative bounds has."""
    try:
        function = SOURCES.resolve(name)
        returned: Iterator[Any] = SOURCES.guarded(name, lambda: iter(function()))()
        take = SOURCES.guarded(name, lambda: next(returned, _END))  # what a generator raises is its error, too
        numbered = enumerate(iter(take, _END), 1)
        simple = all(bound is None or bound >= 0 for bound in (rows.start, rows.stop))
        for number, row in islice(numbered, rows.start, rows.stop) if simple else list(numbered)[rows]:
            if isinstance(row, Mapping) and all(isinstance(key, str) for key in row):
                yield number, dict(row)
            else:
                problem = f"{type(row).__name__} instead of a mapping of columns"
                errors.append(RowError(problem, "return rows as an object of JSON has them", number))
    except (PlugPointError, PlugInError) as error:
        raise DataError(name, [RowError(str(error), "fix the function, or name another one or a file")]) from error


def decode_json(text: bytes) -> Any:
    """Return the value of a JSON text in UTF-8. Raises ValueError, which says what is wrong with it."""
    try:
        return msgspec.json.decode(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except msgspec.DecodeError as error:
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(str(error)) from error
        # Python's own reader is more tolerant: of NaN, and of an escape such as \\ud83d without its other half.
        raise ValueError(f"{error}; a lone surrogate such as \\ud83d, or NaN, is not JSON") from error


def _read_json(path: Path, rows: slice, errors: list[RowError]) -> Iterator[tuple[int, Row]]:
    """Read one object per line, or one list of objects."""
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(path, [RowError("the file is UTF-16", "write it again in UTF-8")])
    if path.suffix.lower() == ".json" and content.lstrip().startswith(b"["):
        try:
            numbered = list(enumerate(decode_json(content), 1))
        except ValueError as error:
            problem, remedy = f"invalid JSON ({error})", "write a list of objects, in UTF-8"
            raise DataError(path, [RowError(problem, remedy)]) from error
    else:
        numbered = [(n, line) for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    for number, row in numbered[rows]:
        try:
            row = decode_json(row) if isinstance(row, bytes) else row
        except ValueError as error:
            errors.append(RowError(f"invalid JSON ({error})", "write one JSON object per line, in UTF-8", number))
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            problem = f"{type(row).__name__} instead of an object"
            errors.append(RowError(problem, "write one JSON object per line", number))


def _read_parquet(path: Path, rows: slice) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(path, [RowError(f"unreadable parquet ({error})", "write it again")]) from error
    start, stop, _ = rows.indices(table.num_rows)
    table = table.slice(start, max(0, stop - start))
    columns = {name: _column(path, name, table[name], start + 1) for name in table.column_names}
    for number, values in enumerate(zip(*columns.values()), start + 1):
        row = dict(zip(columns, values))
        yield number, {key: _without_absent(value) if isinstance(value, list) else value for key, value in row.items()}


def _column(path: Path, name: str, column: Any, first: int) -> list[Any]:
    """Return a column's values, which begin with row ``first``. Raises DataError, naming the row, if one of them has no
    counterpart in Python."""
    import pyarrow

    if pyarrow.types.is_timestamp(column.type) and column.type.unit == "ns":  # what pandas writes, and Python lacks
        column = column.cast(pyarrow.timestamp("us", column.type.tz), safe=False)
    unreadable = pyarrow.ArrowException, ValueError, KeyError
    try:
        return column.to_pylist(maps_as_pydicts="strict")
    except unreadable as error:
        readable = 0
        with suppress(*unreadable):
            for value in column:
                value.as_py(maps_as_pydicts="strict")
                readable += 1
        problem = f"column {name!r} of type {column.type} cannot be read ({error})"
        remedy = "correct the value, or write the column as another type"
        raise DataError(path, [RowError(problem, remedy, first + readable)]) from error


def _without_absent(value: Any) -> Any:
    """Return a column's value without the fields that are null only because parquet gives every object of a column
    the fields of all. A content that is null is one: an assistant's message beside its tool calls."""
    if isinstance(value, dict):
        return {k: _without_absent(v) for k, v in value.items() if v is not None or k == "content"}
    return [_without_absent(entry) for entry in value] if isinstance(value, list) else value


def lookup(row: Row, key: str) -> Any:
    """Return ``row[key]``, where dots in ``key`` descend into nested objects. Raises KeyError."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, dict):
            raise KeyError(key)
        value = value[part]
    return value
