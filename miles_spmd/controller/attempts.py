"""The attempts of a run: every launch that writes into its folder is one, however it ends.

``attempts.jsonl`` has a line for each, and ``logs/attempt_0001/`` its logs; ``logs/latest`` leads to the newest. While
an attempt runs, ``state.json`` among its logs says where it stands. The file is a sign of life, too: it is replaced at
least every :data:`SIGN_EVERY` seconds, which a login node sees, where a lock or a process of another machine is
invisible. An attempt that could not write how it ended, because it was killed, gets its end from the next one.

Whoever reads these files imports nothing heavy: no settings, no sockets, no arrays.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from miles_spmd.telemetry.json_lines import Lines
from miles_spmd.types.files import AppendedFile, link, write_whole
from miles_spmd.types.printable import printable
from miles_spmd.types.run_files import CHECKPOINT_MARK, METRICS_FILE, complete_checkpoints
from miles_spmd.types.secrets import scrub
from miles_spmd.types.variables import whole

ATTEMPTS_FILE = "attempts.jsonl"
LOGS = "logs"
LATEST = "latest"
STATE_FILE = "state.json"
PROGRESS_FILE = "progress.log"
SIGN_EVERY = 5.0  # seconds between signs of life, at most
SILENT_AFTER = 60.0  # seconds without a sign of life after which an attempt on another machine counts as killed
MAX_REASON = 500  # characters

Seconds = Annotated[float, msgspec.Meta(ge=0, lt=1e11)]
State = Literal["running", "finished", "stopped", "failed", "killed"]


class Attempt(msgspec.Struct, frozen=True):
    """One launch. Steps are counted as in metrics.jsonl: n when n steps are done. Times are Unix seconds of the
    controller's machine."""

    attempt: int
    task: str  # "train", "generate", "serve", "eval", "replay" or "bisect"
    start: Seconds
    end: Seconds | None = None  # None while it runs
    state: State = "running"
    reason: str = ""  # why it ended: "finished", "killed", or the message of the end
    job: str = ""  # Slurm's number of the job, 7 or in an array 7_1
    restart: int = 0  # how often Slurm had requeued the job
    nodes: list[str] = []
    ranks: int = 0
    ready: Seconds | None = None  # when all ranks were built and the checkpoint was loaded
    first_step: int | None = None  # done when it was ready
    last_step: int | None = None  # done at its end
    seconds_lost: Seconds = 0.0  # work that no checkpoint has

    @property
    def name(self) -> str:
        return f"attempt_{self.attempt:04d}"


class Sign(msgspec.Struct, frozen=True):
    """``state.json``: a sign of life, and where the attempt stands."""

    record: Attempt
    pid: int  # of the controller
    host: str
    time: Seconds
    phase: str = "start"  # one of telemetry.metrics.PHASES, "" between them
    since: Seconds = 0.0  # when the phase began


def slurm_job(environment: Mapping[str, str] = os.environ) -> str:
    """Return by what name Slurm knows the job that this process is in, "" outside of one. In an array it is that of the
    task: the number of the last task is also that of the whole array."""
    array, task = (environment.get(f"SLURM_ARRAY_{name}") for name in ("JOB_ID", "TASK_ID"))
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID", "")


# --- reading ----------------------------------------------------------------------------------------------------------


class Attempts:
    """The attempts of the run in ``folder``, oldest first, and what is wrong with the files. Raises OSError where they
    cannot be read.

    One that has no end runs, if it is the last and there are signs of its life; otherwise it was killed at the last
    sign.
    """

    def __init__(self, folder: Path) -> None:
        lines = Lines(folder / ATTEMPTS_FILE, Attempt)
        self.problems = [lines.problem] if lines.problem else []
        self.sign: Sign | None = None  # of the one that runs
        self.records: list[Attempt] = []
        self.unwritten: list[Attempt] = []  # those whose end is not in the file, as they were at the last sign of life
        for number, record in enumerate(lines.values, 1):
            if record.end is None:
                sign = self._read_sign(folder, record)
                record = record if sign is None else sign.record
                self.unwritten.append(record if record.end is not None else killed(folder, record, sign))
                if record.end is None and sign is not None and number == len(lines.values) and _lives(folder, sign):
                    self.sign = sign
                else:
                    record = self.unwritten[-1]
            self.records.append(record)

    def _read_sign(self, folder: Path, record: Attempt) -> Sign | None:
        path = state_file(folder, record)
        try:
            return msgspec.json.decode(path.read_bytes(), type=Sign)
        except FileNotFoundError:
            return None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self.problems.append(f"{path}: cannot be read: {error}")
            return None


def state_file(folder: Path, record: Attempt) -> Path:
    return folder / LOGS / record.name / STATE_FILE


def killed(folder: Path, record: Attempt, sign: Sign | None) -> Attempt:
    """Return the record of an attempt that ended without a word, at its last sign of life."""
    end = record.start if sign is None else sign.time
    record = msgspec.structs.replace(record, end=end, state="killed", reason="killed")
    return msgspec.structs.replace(record, seconds_lost=seconds_lost(folder, record))


def _lives(folder: Path, sign: Sign) -> bool:
    if sign.host == socket.gethostname():
        try:
            return b"miles_spmd.controller" in Path(f"/proc/{sign.pid}/cmdline").read_bytes()
        except OSError:
            return False
    return silence(folder, sign) < SILENT_AFTER


def silence(folder: Path, sign: Sign) -> float:
    """Return the seconds since an attempt's last sign of life by the clock of the file system: this machine's may
    differ from that of the machine that writes."""
    return now_in(folder) - state_file(folder, sign.record).stat().st_mtime


def now_in(folder: Path) -> float:
    """Return the present time by the clock that dates the files in ``folder``, where one can be written there."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
            file.flush()
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


class _Reported(msgspec.Struct, frozen=True):
    """What matters here of a line of metrics.jsonl."""

    step: int
    time: float


def seconds_lost(folder: Path, record: Attempt) -> float:
    """Return the seconds of an attempt that has ended in which it did what no checkpoint has: since the end of the last
    step that it saved, or since it was ready. A run that finished has lost nothing, and a server has nothing to lose.
    """
    if record.end is None or record.ready is None or record.state == "finished" or record.task == "serve":
        return 0.0
    since, first, last = record.ready, record.first_step or 0, record.last_step or 0
    own = [
        step
        for step, path in complete_checkpoints(folder).items()
        if first < step <= last + 1 and (path / CHECKPOINT_MARK).stat().st_mtime > record.ready - SILENT_AFTER
    ]
    if own:
        rows = Lines(folder / METRICS_FILE, _Reported).values
        times = [row.time for row in rows if row.step == own[-1] and row.time >= record.ready]
        since = times[-1] if times else record.end  # it ended between the checkpoint and the line of its step
    return round(max(0.0, record.end - since), 3)


# --- writing ----------------------------------------------------------------------------------------------------------


def begin(run_dir: Path, task: str, ranks: int) -> AttemptWriter:
    """Begin an attempt: give those before it that were killed their ends, and make its folder. Raises OSError."""
    folder = run_dir / LOGS
    record = Attempt(
        attempt=0,
        task=task,
        start=time.time(),
        job=slurm_job(),
        restart=whole("SLURM_RESTART_COUNT", 0),
        nodes=[socket.gethostname()],
        ranks=ranks,
    )
    earlier = Attempts(run_dir)
    numbers = [one.attempt for one in earlier.records]
    numbers += [int(path.name.removeprefix("attempt_")) for path in _folders(folder)]
    record = msgspec.structs.replace(record, attempt=max(numbers, default=0) + 1)
    writer = AttemptWriter(run_dir, record, folder / record.name)
    _write_lines(run_dir, [*earlier.unwritten, record])
    link(folder / LATEST, record.name)  # which nothing but people follows
    return writer


def leftovers(run_dir: Path) -> list[Path]:
    """Return all that the attempts of a run have left in its folder."""
    return [run_dir / ATTEMPTS_FILE, run_dir / LOGS / LATEST, *_folders(run_dir / LOGS)]


def _folders(logs: Path) -> list[Path]:
    return [path for path in logs.glob("attempt_*") if re.fullmatch(r"attempt_\d+", path.name)]


def _write_lines(run_dir: Path, records: Collection[Attempt]) -> None:
    """Put the lines of ``records`` in the place of those with their numbers, or at the end of the file. A line that
    cannot be read stays as it is. Raises OSError."""
    path = run_dir / ATTEMPTS_FILE
    new = {record.attempt: msgspec.json.encode(scrub(msgspec.to_builtins(record))) for record in records}
    lines = path.read_bytes().splitlines() if path.exists() else []
    for index, line in enumerate(lines):
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            lines[index] = new.pop(msgspec.json.decode(line, type=Attempt).attempt, line)
    write_whole(path, b"".join(line + b"\n" for line in [*lines, *new.values()]))


class AttemptWriter:
    """The attempt that goes on, in the controller. Most methods only note what happens: a side thread writes it, at
    most once a second. A full disk does not end a run here: what it also has to write, such as its metrics, does."""

    def __init__(self, run_dir: Path, record: Attempt, folder: Path) -> None:
        """Raises OSError."""
        self.folder, self._run_dir = folder, run_dir
        self._log = AppendedFile(folder / PROGRESS_FILE)
        self._sign = Sign(record, os.getpid(), socket.gethostname(), record.start, since=record.start)
        self._changed, self._stop = False, threading.Event()
        self._write_sign()
        self._thread = threading.Thread(target=self._give_signs, name="attempt", daemon=True)
        self._thread.start()

    @property
    def record(self) -> Attempt:
        return self._sign.record

    def ready(self, first_step: int, nodes: Sequence[str]) -> None:
        """All ranks are built, and ``first_step`` steps are done."""
        changes = {"ready": time.time(), "first_step": first_step, "last_step": first_step}
        self._note(record=msgspec.structs.replace(self.record, **changes, nodes=sorted(set(nodes))))

    def phase(self, name: str) -> None:
        self._note(phase=name, since=time.time())

    def step(self, done: int) -> None:
        self._note(record=msgspec.structs.replace(self.record, last_step=done))

    def tell(self, text: str) -> None:
        """Add lines to the progress, with the time."""
        line = f"{time.strftime('%F %T')} {printable(scrub(text), 10_000)}\n"
        with contextlib.suppress(OSError):
            self._log.append(line.encode(errors="backslashreplace"))

    def end(self, state: State, reason: str) -> None:
        """Write how the attempt ended, whatever comes after; of ``reason`` the first line. Raises OSError."""
        self._stop.set()
        self._thread.join()
        reason = printable(scrub(reason.partition("\n")[0]), MAX_REASON)
        record = msgspec.structs.replace(self.record, end=time.time(), state=state, reason=reason)
        record = msgspec.structs.replace(record, seconds_lost=seconds_lost(self._run_dir, record))
        self._note(record=record, phase="")
        self._gather_logs()
        self._write_sign()

    def close(self) -> None:
        """Complete the line in ``attempts.jsonl`` after everything else was written. Raises OSError."""
        self._log.close()
        _write_lines(self._run_dir, [self.record])

    def _gather_logs(self) -> None:
        """Move the logs of ranks that ended before they knew the attempt's folder into it. Once all ranks were there,
        such a log is that of another start of one, and keeps its name."""
        for path in (self._run_dir / LOGS).glob("rank-*.st*.*"):  # starting, standby
            name = path.name if self.record.ready else path.name.replace(".starting", "")
            with contextlib.suppress(OSError):  # the rank itself has moved it
                path.rename(self.folder / name)

    def _note(self, **changes: object) -> None:
        self._sign = msgspec.structs.replace(self._sign, **changes)
        self._changed = True

    def _write_sign(self) -> None:
        self._changed = False
        sign = msgspec.structs.replace(self._sign, time=time.time())
        write_whole(self.folder / STATE_FILE, msgspec.json.encode(sign))

    def _give_signs(self) -> None:
        written = time.monotonic()
        while not self._stop.wait(1.0):
            if self._changed or time.monotonic() - written >= SIGN_EVERY:
                with contextlib.suppress(OSError):
                    self._write_sign()
                    written = time.monotonic()
