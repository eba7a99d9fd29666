"""What a run's folder says about the run, on any machine that sees the folder, whether the run goes on or not.

A login node asks this question while others work on it: nothing heavy is imported, and of long files only the end is
read.
"""

from __future__ import annotations

import shlex
import time
import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec

from miles_spmd.controller.attempts import ATTEMPTS_FILE, Attempt, Attempts, Sign, silence
from miles_spmd.monitor.queue import Queued, queued
from miles_spmd.telemetry.metrics import is_score
from miles_spmd.telemetry.texts import SHOWN, clock
from miles_spmd.types.printable import printable
from miles_spmd.types.run_files import CHECKPOINT_MARK, METRICS_FILE, complete_checkpoints

RECENT_STEPS = 10  # whose mean time is the time of a step
MAX_REASON = 200  # characters of a reason in the table of attempts
RECENT_BYTES = 2**20  # of metrics.jsonl that are read
ALSO_SHOWN = {"mismatches": "parity/mismatches", "learning rate": "train/lr", "cells": "perf/cells"}

# "unknown": the run is older than the records of attempts, or they were deleted.
State = Literal["running", "finished", "stopped", "failed", "killed", "unknown"]


class StatusError(RuntimeError):
    """A folder without a run: what is missing and what to do."""


class Checkpoint(msgspec.Struct, frozen=True):
    step: int
    path: str
    age: float  # seconds


class Status(msgspec.Struct, frozen=True):
    """Steps are counted as in metrics.jsonl; seconds are of wall time."""

    run: str
    folder: str
    task: str
    state: State
    reason: str  # of the last end; "" while the run goes on
    step: int | None  # done
    steps: int | None  # in total; None for an evaluation
    phase: str
    phase_seconds: float | None
    silent: float | None  # seconds since the last sign of life of an attempt that runs
    seconds_per_step: float | None
    eta: float | None  # seconds
    checkpoint: Checkpoint | None
    metrics: dict[str, float]  # the newest of those that matter most
    cells: int  # that the run is planned for; "perf/cells" of the metrics take part
    attempts: list[Attempt]
    seconds_lost: float
    queue: Queued | None
    resume: str  # the command that continues the run; "" while it goes on, and where it cannot
    problems: list[str]  # of the folder's files


def read_status(folder: Path) -> Status:
    """Read the status of the run in ``folder``. Raises StatusError, and OSError where a file cannot be read."""
    check_folder(folder)
    found = Attempts(folder)
    problems = list(found.problems)
    settings = _settings(folder, problems)
    cells = _cells(settings)
    last, sign = found.records[-1] if found.records else None, found.sign
    state: State = "unknown" if last is None else last.state
    rows = _recent_rows(folder / METRICS_FILE, problems)
    done = [step for row in rows if (step := _step(row)) is not None]
    step = last.last_step if last and last.last_step is not None else max(done, default=None)
    evaluates = last is not None and last.task == "eval"
    serves = last is not None and last.task == "serve"
    steps = None if evaluates or serves else _steps(settings)
    pace = None if evaluates else _seconds_per_step(rows, last)
    saved = complete_checkpoints(folder)
    now = time.time()
    return Status(
        run=folder.absolute().name,
        folder=str(folder),
        task=last.task if last else "",
        state=state,
        reason="" if last is None or state == "running" else last.reason,
        step=None if serves else step,
        steps=steps,
        phase=sign.phase if sign else "",
        phase_seconds=max(0.0, sign.time - sign.since) if sign else None,
        silent=max(0.0, silence(folder, sign)) if sign else None,
        seconds_per_step=pace,
        eta=_eta(pace, step, steps, rows, sign),
        checkpoint=_checkpoint(saved, now),
        metrics=_headlines(rows, cells),
        cells=cells,
        attempts=found.records,
        seconds_lost=sum(one.seconds_lost for one in found.records),
        queue=queued(last.job) if last and last.job else None,
        resume=_resume(folder, last, cells, bool(saved)),
        problems=problems,
    )


def check_folder(folder: Path) -> None:
    """Raise StatusError where ``folder`` is not that of a run."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise StatusError(f"{folder} {what}; name the folder of a run, such as runs/NAME")
    if not any((folder / name).exists() for name in (ATTEMPTS_FILE, "environment.json", METRICS_FILE)):
        runs = sorted(path.name for path in folder.iterdir() if (path / ATTEMPTS_FILE).exists())
        remedy = f"name one of the runs in it: {', '.join(runs[:8])}" if runs else "name the folder of a run"
        raise StatusError(f"{folder} is not the folder of a run (it has no {ATTEMPTS_FILE}); {remedy}")


# --- parts ------------------------------------------------------------------------------------------------------------


def _settings(folder: Path, problems: list[str]) -> dict[str, Any]:
    path = folder / "config.toml"
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(f"{path}: cannot be read: {error}")
        return {}


def _steps(settings: dict[str, Any]) -> int | None:
    """Return the number of steps that the resolved configuration asks for."""
    table = settings.get("run")
    steps = table.get("num_rollout") if isinstance(table, dict) else None
    return steps if isinstance(steps, int) else None


def _cells(settings: dict[str, Any]) -> int:
    table = settings.get("resilience")
    cells = table.get("cells") if isinstance(table, dict) else None
    return cells if isinstance(cells, int) and cells > 0 else 1


def _recent_rows(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Return the last rows of the metrics."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - RECENT_BYTES))
        lines = file.read().split(b"\n")
    rows, damaged = [], 0
    for line in filter(None, lines[1:] if size > RECENT_BYTES else lines):
        try:
            rows.append(msgspec.json.decode(line, type=dict[str, Any]))
        except (msgspec.DecodeError, UnicodeDecodeError):
            damaged += 1
    if damaged:
        problems.append(f"{path}: {damaged} lines cannot be read; `miles-spmd report {path.parent}` names them")
    return rows


def _number(row: dict[str, Any], name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else None


def _step(row: dict[str, Any]) -> int | None:
    value = _number(row, "step")
    return int(value) if value is not None and 0 <= value < 2**53 else None


def _seconds_per_step(rows: list[dict[str, Any]], last: Attempt | None) -> float | None:
    """Return the mean time of the newest steps. The first report of an attempt has the time of its start."""
    if last is not None and last.ready is not None:
        rows = [row for row in rows if (_number(row, "time") or 0.0) >= last.ready]
        rows = [row for row in rows if (_step(row) or 0) > (last.first_step or 0)] or rows[1:]
    times = [seconds for row in rows if (_step(row) or 0) > 0 and (seconds := _number(row, "perf/step_time"))]
    return sum(times[-RECENT_STEPS:]) / len(times[-RECENT_STEPS:]) if times else None


def _eta(
    pace: float | None, step: int | None, steps: int | None, rows: list[dict[str, Any]], sign: Sign | None
) -> float | None:
    if pace is None or step is None or steps is None or sign is None:
        return None
    under_way = sign.time - (_number(rows[-1], "time") or sign.time)  # both by the clock of the controller
    return max(0.0, pace * (steps - step) - max(0.0, min(under_way, pace)))


def _headlines(rows: list[dict[str, Any]], cells: int) -> dict[str, float]:
    """Return the newest values: rows have them at different intervals. A run that now has one of ``cells`` may have had
    several before."""
    newest: dict[str, float] = {}
    for row in rows:
        newest |= {name: value for name in row if (value := _number(row, name)) is not None}
    names = [*SHOWN.values(), *ALSO_SHOWN.values(), *filter(is_score, newest)]
    return {name: newest[name] for name in names if name in newest and (cells > 1 or name != "perf/cells")}


def _checkpoint(saved: dict[int, Path], now: float) -> Checkpoint | None:
    if not saved:
        return None
    step, path = list(saved.items())[-1]
    return Checkpoint(step, str(path), max(0.0, now - (path / CHECKPOINT_MARK).stat().st_mtime))


def _resume(folder: Path, last: Attempt | None, cells: int, saved: bool) -> str:
    if last is None or last.task != "train" or last.state in ("running", "finished") or not saved:
        return ""
    ranks = f" --nproc-per-node {last.ranks // cells}" if last.ranks > 1 and len(last.nodes) == 1 else ""
    return f"miles-spmd train {shlex.quote(str(folder / 'config.toml'))} checkpoint.resume=true{ranks}"


# --- as text ----------------------------------------------------------------------------------------------------------


def _with_reason(state: str, reason: str) -> str:
    """Return a state and why, which may say the state itself: ``stopped by SIGTERM``."""
    if reason.startswith(state):
        return reason
    return f"{state}: {reason}" if reason else state


def render(status: Status) -> str:
    """Return the status for a terminal."""
    state: str = status.state
    if state != "running":
        state = _with_reason(state, status.reason)
    lines = [("run", f"{status.run} ({status.task or 'unknown task'}), {state}")]
    if status.step is not None:
        of = f" of {status.steps}" if status.steps is not None else ""
        lines.append(("step", f"{status.step}{of}"))
    if status.state == "running":
        since = f" for {clock(status.phase_seconds)}" if status.phase and status.phase_seconds is not None else ""
        heard = f"; last sign of life {status.silent:.0f} s ago" if (status.silent or 0) > 15 else ""
        lines.append(("phase", f"{status.phase or 'between phases'}{since}{heard}"))
    if status.seconds_per_step is not None:
        eta = f", eta {clock(status.eta)}" if status.eta is not None else ""
        lines.append(("pace", f"{status.seconds_per_step:.2f} s per step{eta}"))
    if status.checkpoint:
        lines.append(("checkpoint", f"step {status.checkpoint.step}, {clock(status.checkpoint.age)} old"))
    elif status.task == "train":
        lines.append(("checkpoint", "none"))
    words = {name: word for word, name in (SHOWN | ALSO_SHOWN).items()}
    totals = {"perf/cells": f" of {status.cells}"}
    numbers = [f"{words.get(name, name)} {value:.3g}{totals.get(name, '')}" for name, value in status.metrics.items()]
    if numbers:
        lines.append(("metrics", "  ".join(numbers)))
    if status.queue:
        lines.append(("queue", f"{status.queue.state} ({status.queue.reason}), start {status.queue.start}"))
    if status.resume:
        lines.append(("continue", status.resume))
    lines.append(("lost", f"{clock(status.seconds_lost)} of work that no checkpoint has"))
    text = "\n".join(f"{name + ':':<12}{value}" for name, value in lines)
    return printable(f"{text}\n\n{_table(status.attempts)}" if status.attempts else text, 100_000)


def _table(attempts: list[Attempt]) -> str:
    rows = [("attempt", "start", "duration", "job", "ranks", "steps", "lost", "end")]
    for one in attempts:
        job = (one.job or "-") + (f".{one.restart}" if one.restart else "")
        steps = f"{one.first_step} to {one.last_step}" if one.first_step is not None else "-"
        start = time.strftime("%F %T", time.localtime(one.start))
        end = _with_reason("running" if one.end is None else one.state, one.reason[:MAX_REASON])
        duration = clock((one.end or time.time()) - one.start)
        row = str(one.attempt), start, duration, job, str(one.ranks), steps, clock(one.seconds_lost), end
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
