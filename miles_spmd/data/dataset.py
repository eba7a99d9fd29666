"""Rows of JSONL and parquet files, and one error that lists everything wrong with a file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

Row = dict[str, Any]

_SLICE = re.compile(r"^(?P<path>.+)@\[(?P<start>-?\d*):(?P<stop>-?\d*)\]$")
_SHOWN_FAULTS = 20


class Fault(msgspec.Struct, frozen=True):
    """One thing wrong with a file: ``row`` counts from 1 (the line number in JSONL), None: the file as a whole."""

    row: int | None
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}"


class DataError(ValueError):
    """A data file that cannot be used. ``faults`` has all there is to mend, the message the first of them."""

    def __init__(self, path: Path | str, faults: list[Fault]) -> None:
        self.path = path
        self.faults = faults
        lines = [f"{path}{'' if f.row is None else f':{f.row}'}: {f}" for f in faults[:_SHOWN_FAULTS]]
        if len(faults) > _SHOWN_FAULTS:
            lines.append(f"... and {len(faults) - _SHOWN_FAULTS} more faults in {path}")
        super().__init__("\n".join(lines))


def parse_slice(prompt_data: str) -> tuple[Path, slice]:
    """``path@[a:b]`` -> path and the slice of its rows, as Python means it. Raises DataError on a malformed slice."""
    match = _SLICE.match(prompt_data)
    if match is None:
        if "@[" in prompt_data:
            remedy = "write path@[start:stop] with integers, either of which may be left out"
            raise DataError(prompt_data, [Fault(None, "malformed slice", remedy)])
        return Path(prompt_data), slice(None)
    bounds = [int(b) if b else None for b in (match["start"], match["stop"])]
    return Path(match["path"]), slice(*bounds)


def read_rows(prompt_data: str, faults: list[Fault]) -> Iterator[tuple[int, Row]]:
    """The rows of a file's slice with their numbers, which count from 1 in the whole file.

    What is wrong with a single row is appended to ``faults`` and the row left out; a file that cannot be read at all
    raises DataError.
    """
    path, rows = parse_slice(prompt_data)
    if not path.is_file():
        raise DataError(path, [Fault(None, "no such file", "check data.prompt_data or eval.eval_prompt_data")])
    if path.suffix == ".parquet":
        yield from _read_parquet(path, rows)
    elif path.suffix in (".jsonl", ".json", ".ndjson"):
        yield from _read_jsonl(path, rows, faults)
    else:
        raise DataError(path, [Fault(None, f"unknown kind {path.suffix!r}", "use a .jsonl or .parquet file")])


def _read_jsonl(path: Path, rows: slice, faults: list[Fault]) -> Iterator[tuple[int, Row]]:
    lines = [(n, line) for n, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    for number, line in lines[rows]:
        try:
            row = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            faults.append(Fault(number, f"invalid JSON ({error})", "write one JSON object per line, in UTF-8"))
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            faults.append(Fault(number, f"{type(row).__name__} instead of an object", "write one JSON object per line"))


def _read_parquet(path: Path, rows: slice) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(path, [Fault(None, f"unreadable parquet ({error})", "write it again")]) from error
    start, stop, _ = rows.indices(table.num_rows)
    yield from enumerate(table.slice(start, max(0, stop - start)).to_pylist(), start + 1)


def lookup(row: Row, key: str) -> Any:
    """``row[key]``, or with dots the value inside nested objects. Raises KeyError."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, dict):
            raise KeyError(key)
        value = value[part]
    return value
