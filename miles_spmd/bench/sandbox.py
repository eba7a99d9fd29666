"""How many programs per second the sandbox runs, and how many responses the reward ``code`` scores."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console
from rich.table import Table

from miles_spmd.rewards.code import code
from miles_spmd.sandbox.sandbox import Sandbox

_PROGRAM = "print(int(input()) + 1)"
_FUNCTION = "def f(x): return x + 1"
Row = dict[str, str | int | float]


def bench_sandbox(jobs: int, tests: int, seconds: float) -> list[Row]:
    """Measure ``jobs`` at a time, for about ``seconds`` per row; labels have ``tests`` tests. Raises SandboxError."""
    sandbox = Sandbox()
    numbers = range(tests)
    programs = {"inputs": [f"{n}\n" for n in numbers], "outputs": [f"{n + 1}\n" for n in numbers]}
    calls = {"fn_name": "f", "inputs": [[n] for n in numbers], "outputs": [n + 1 for n in numbers]}
    assertions = [f"assert f({n}) == {n + 1}" for n in numbers]
    work: dict[str, Callable[[], object]] = {
        "an empty program": lambda: sandbox.run("pass"),
        f"code, {tests} programs": lambda: code(_PROGRAM, programs),
        f"code, {tests} calls": lambda: code(_FUNCTION, calls),
        f"code, {tests} assertions": lambda: code(_FUNCTION, assertions),
    }
    return [{"what": name, "jobs": jobs, "per s": _rate(one, jobs, seconds)} for name, one in work.items()]


def show(rows: list[Row], console: Console) -> None:
    """Print a table for people, then one JSON object per row."""
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    for row in rows:
        console.print_json(json.dumps(row), indent=None)


def _rate(work: Callable[[], object], jobs: int, seconds: float) -> float:
    """Return how often per second ``work`` is done by ``jobs`` threads, which only wait for the sandbox."""
    start = time.monotonic()

    def repeat() -> int:
        done = 0
        while time.monotonic() < start + seconds:
            work()
            done += 1
        return done

    work()  # the first one also reads files and starts slowly
    start = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        counts = [one.result() for one in [pool.submit(repeat) for _ in range(jobs)]]
    return sum(counts) / (time.monotonic() - start)
