"""The result of a measurement with its machine and commit: a table for people, and JSON."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from miles_spmd.telemetry.environment import Environment, environment

Row = dict[str, Any]


class Result(msgspec.Struct, frozen=True):
    """All ``rows`` have the same keys, whose last word is their unit."""

    bench: str
    model: str
    ranks: int
    settings: dict[str, Any]
    rows: list[Row]
    time: str
    commit: str
    environment: Environment


def make_result(bench: str, model: str, ranks: int, settings: dict[str, Any], rows: list[Row]) -> Result:
    return Result(bench, model, ranks, settings, rows, time.strftime("%F %T"), commit(), environment())


def commit() -> str:
    """Return the commit of this source tree, with "+" where files have changed since; "unknown" without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def show(result: Result, console: Console) -> None:
    devices = Counter(gpu.name for gpu in result.environment.gpus)
    machine = ", ".join(f"{count} x {name}" for name, count in devices.items()) or f"{result.environment.cores} cores"
    title = f"{result.bench}: {result.model} on {result.ranks} rank(s), {machine}, commit {result.commit}"
    table = Table(*result.rows[0], title=title, title_justify="left")
    for row in result.rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table)
    console.print_json(msgspec.json.encode(result).decode(), indent=None)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
