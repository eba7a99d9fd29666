"""The progress of a run as its terminal shows it, read from its folder, also across attempts.

Every attempt writes its lines into ``progress.log`` among its logs. Rank 0 writes its warnings into its own log.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from miles_spmd.controller.attempts import LOGS, PROGRESS_FILE, Attempt, Attempts
from miles_spmd.monitor.queue import queued
from miles_spmd.monitor.status import StatusError, check_folder

LOOK_EVERY = 0.5  # seconds
WARNING = "warning: "


class _Lines:
    """The complete lines that were added to a file since the last look; of those, the ones that begin with
    ``prefix``."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        self._path, self._prefix, self._read = path, prefix, 0

    def new(self) -> list[str]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        return [line for line in whole.decode(errors="replace").splitlines() if line.startswith(self._prefix)]


class _Shown:
    """One attempt's lines, as far as they were not shown yet."""

    def __init__(self, folder: Path, record: Attempt) -> None:
        self.number = record.attempt
        logs = folder / LOGS / record.name
        self._files = [_Lines(logs / "rank-0.log", WARNING), _Lines(logs / PROGRESS_FILE)]
        job = f", job {record.job}" if record.job else ""
        start = time.strftime("%F %T", time.localtime(record.start))
        self._head = [f"==> attempt {record.attempt}: {record.task}, {record.ranks} ranks, {start}{job}"]

    def new(self) -> list[str]:
        """Return new lines; the first ones have a headline."""
        lines = [line for file in self._files for line in file.new()]
        head, self._head = self._head, []
        return [*head, *lines]


def follow(folder: Path, count: int, *, follows: bool, keeps: bool, warn: Callable[[str], None]) -> Iterator[list[str]]:
    """Yield the last ``count`` lines and then, if it ``follows``, what comes, until the run has ended; with ``keeps``
    until somebody interrupts it. A job that Slurm has requeued goes on after an end. What is wrong with the files is
    passed to ``warn``. Raises StatusError, and OSError where a file cannot be read."""
    check_folder(folder)
    attempts = Attempts(folder)
    for problem in attempts.problems:
        warn(problem)
    if not attempts.records:
        raise StatusError(f"{folder} has no record of an attempt, hence no progress to show; see {folder / LOGS}")
    shown = [_Shown(folder, record) for record in attempts.records]
    past = [line for one in shown for line in one.new()]
    yield past[max(0, len(past) - count) :]
    while follows:
        attempts = Attempts(folder)  # before the lines: a run that has ended writes no more
        if shown:
            yield shown[-1].new()
        known = {one.number for one in shown}
        begun = [_Shown(folder, record) for record in attempts.records if record.attempt not in known]
        yield [line for one in begun for line in one.new()]
        shown += begun
        if attempts.sign is None and not begun and not keeps and not _comes_back(attempts):
            return
        time.sleep(LOOK_EVERY)


def _comes_back(attempts: Attempts) -> bool:
    """Return whether the job of the last attempt is in Slurm's queue: it was requeued, or is not quite over."""
    last = attempts.records[-1] if attempts.records else None
    return last is not None and bool(last.job) and last.state != "finished" and queued(last.job) is not None
