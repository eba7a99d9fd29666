"""The table of a rehearsal: a row for each fault, with what it did to the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from miles_spmd.chaos.launches import Launch, Line
from miles_spmd.faults.fault import Fault
from miles_spmd.faults.strikes import Strike
from miles_spmd.types.printable import printable

SAID = 300  # characters of a message in the table


@dataclass(frozen=True)
class Row:
    """What one fault did. Seconds are None where there is nothing to measure."""

    fault: Fault
    strike: Strike
    said: str
    detection: float | None  # from the strike to the first report of the run
    exit: float | None  # to the end of the last process
    restart: float | None  # from the next start until a step was completed
    next_step: float | None  # from the strike until a step was completed, where the run goes on without a cell
    back: float | None  # until that cell took part again
    steps: int  # that had to be repeated
    seconds: float  # of work that had to be repeated


def rows(launches: Sequence[Launch], faults: Sequence[Fault], folder: Path) -> list[Row]:
    """Return what the faults did that have struck, in that order. ``folder`` of the run is left out of messages."""
    return [
        _row(launch, strike, faults[strike.fault], launches[number:], folder)
        for number, launch in enumerate(launches, 1)
        for strike in launch.strikes
    ]


def render(rows: Sequence[Row]) -> str:
    """Return the table: a row for each fault, and for each kind of which several have struck cells two more."""
    of_cells = [row for row in rows if row.fault.of_cell]
    own = ("next step", "back") if of_cells else ()
    table: list[tuple[str, ...]] = [
        ("injected", "struck", "detection", "exit", "restart", *own, "repeated", "the run reported")
    ]
    for row in rows:
        struck = f"{row.strike.process} (pid {', '.join(map(str, row.strike.pids))})"
        steps = f"{row.steps} step{'s' * (row.steps != 1)}"
        repeated = f"{steps}, {row.seconds:.1f} s" if row.exit is not None else "-"
        values = row.detection, row.exit, row.restart, *((row.next_step, row.back) if own else ())
        table.append((str(row.fault), struck, *map(_seconds, values), repeated, printable(row.said, SAID)))
    for kind in dict.fromkeys(row.fault.kind for row in of_cells):
        alike = [row for row in of_cells if row.fault.kind == kind]
        columns = zip(*((row.detection, row.next_step, row.back) for row in alike))
        found = [[value for value in column if value is not None] for column in columns]
        for name, choose in (("median", median), ("longest", max)) if len(alike) > 1 else ():
            detection, *others = (_seconds(choose(column) if column else None) for column in found)
            table.append((f"{name} of {len(alike)} {kind}", "", detection, "-", "-", *others, "-", ""))
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _row(launch: Launch, strike: Strike, fault: Fault, following: Sequence[Launch], folder: Path) -> Row:
    later = [one.time for one in launch.strikes if one.time > strike.time]
    ended = bool(launch.status) and not later
    if not ended:
        following = []
    reports = launch.reports(strike.time, min(later, default=float("inf")))
    if fault.kind == "corrupt" and following:
        reports = [line for one in following for line in one.damage(fault.step)]
    steps, seconds = _loss(launch, strike, following)
    completed = [row["time"] for row in launch.rows if row["time"] > strike.time] if fault.of_cell else []
    said = _said(reports, fault) or _measured(launch, fault)
    return Row(
        fault=fault,
        strike=strike,
        said=said.replace(f"{folder}/", "") or ("nothing" if ended else "nothing; the run went on"),
        detection=reports[0].time - strike.time if reports else launch.ended - strike.time if ended else None,
        exit=launch.ended - strike.time if ended else None,
        restart=_restart(following[0]) if following else None,
        next_step=completed[0] - strike.time if completed else None,
        back=_back(launch, strike) if fault.of_cell and fault.kind != "slow" else None,
        steps=steps,
        seconds=seconds,
    )


def _said(reports: Sequence[Line], fault: Fault) -> str:
    """Return the report that explains most: where the fault ends the run the message of the end, else the first
    warning, else a request to stop."""
    texts = [line.text for line in reports]
    warnings = [text for text in texts if text.startswith("miles-spmd: warning: ")]
    ends = [text for text in texts if text.startswith("miles-spmd: ") and text not in warnings]
    first = ends + warnings if fault.ends else warnings + ends
    return (first or texts or [""])[0].removeprefix("miles-spmd: ")


def _measured(launch: Launch, fault: Fault) -> str:
    """Return how slow the slowest rank was, where that is what the fault did."""
    name = f"perf/{fault.phase}_slowest"
    values = [row[name] for row in launch.rows if row["step"] == fault.step + 1 and name in row]
    return f"{name} {values[-1]:.1f} in the metrics of that step" if fault.kind == "slow" and values else ""


def _restart(launch: Launch) -> float | None:
    """Return the seconds from a start until its first step was completed; None where a fault ended it before."""
    steps = launch.steps()
    return steps[0]["time"] - launch.began if steps else None


def _back(launch: Launch, strike: Strike) -> float | None:
    """Return the seconds until a cell takes part again; None where none does."""
    again = (line.time for line in launch.lines if line.time > strike.time and "takes part again" in line.text)
    return next((time - strike.time for time in again), None)


def _loss(launch: Launch, strike: Strike, following: Sequence[Launch]) -> tuple[int, float]:
    """Return how many steps were completed and had to be repeated, and how many seconds of work before the strike."""
    again = next((one for one in following if one.ready is not None), None)
    if launch.ready is None or again is None:
        return 0, 0.0
    steps = launch.steps()
    last = max((row["step"] for row in steps), default=launch.first_step)
    if launch.stopped and again.first_step >= last:
        return 0, 0.0  # all was saved
    since = next((row["time"] for row in steps if row["step"] == again.first_step), launch.ready)
    return max(0, last - again.first_step), max(0.0, strike.time - since)
