"""Resumable checkpoints: where they lie, when one is due, and when one is complete.

``checkpoints/step_000020/`` holds what the ranks wrote, a folder for each model, and ``controller.json``, which marks
it as complete and has digests of it all. It is written as ``step_000020.incomplete`` and renamed at the end: what a run
leaves behind that ends meanwhile is ignored, and removed by the next save. Data order and seeds are functions of the
step, so the step is all the state of the controller, beside its position in the ledger.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import xxhash

from miles_spmd.config import Config
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.cluster.listener import WorkerError, WorkerFailedError
from miles_spmd.controller.journal import events
from miles_spmd.controller.journal.journal import Journal
from miles_spmd.controller.journal.ledger import Start
from miles_spmd.protocol.commands import ExportModel, LoadCheckpoint, SaveCheckpoint
from miles_spmd.types.files import write_whole

FOLDER = "checkpoints"
EXPORT = "export"  # in the run folder, where the configuration names no other
STATE_FILE = "controller.json"
INCOMPLETE = ".incomplete"
FORMAT = 2


class ResumeError(RuntimeError):
    """A checkpoint that cannot be resumed from: what is wrong with it and what to do."""


class ExportError(RuntimeError):
    """The model could not be written as a Hugging Face checkpoint."""


class ControllerState(msgspec.Struct, frozen=True):
    step: int  # the optimizer has seen rollouts 0 .. step - 1
    seed: int
    ledger: str = ""  # hash of its last entry; "" without a ledger
    folders: dict[str, str] = {}  # digest of the index of each model's folder, which has those of all that is in it
    format: int = 1  # what the first version did not write
    digest: str = ""  # of all the above

    def encode(self) -> bytes:
        """Return the content of the file, with the digest."""
        unsealed = msgspec.json.encode(msgspec.structs.replace(self, digest=""))
        return msgspec.json.encode(msgspec.structs.replace(self, digest=xxhash.xxh3_128_hexdigest(unsealed)))


class Checkpoints:
    """Loads, saves and exports the weights and optimizers of all ranks. Methods raise WorkerError where one fails."""

    def __init__(self, config: Config, cluster: Cluster) -> None:
        self._config, self._cluster = config, cluster

    def load(self) -> Start:
        """Load the checkpoint that ``[checkpoint]`` names, if any. Raises ResumeError."""
        settings, run_dir = self._config.checkpoint, self._config.run_dir
        folder = (newest(run_dir) if settings.resume else None) or settings.load
        if folder is None:
            return Start()
        state = read(folder)
        try:
            results = self._cluster.call(LoadCheckpoint(str(folder), state.folders), step=state.step)
        except WorkerFailedError as error:
            if ": DamagedCheckpointError: " not in str(error):
                raise
            raise WorkerFailedError(f"{error}; {_remedy(folder)}", error.details) from error
        if not folder.absolute().is_relative_to(run_dir.absolute()):
            return Start(state.step)  # of another run, whose ledger this one does not continue
        return Start(state.step, state.ledger, results)

    def rewind(self, step: int) -> None:
        """Remove the run's checkpoints of later steps than ``step``, from where it goes on: they belong to steps that
        it is about to repeat, and a resume after a crash must not take one of them."""
        removed = _remove_after(self._config.run_dir / FOLDER, step)
        if removed:
            print(
                f"miles-spmd: warning: the run goes on from step {step}, so its later checkpoints are removed: "
                f"{', '.join(path.name for path in removed)}",
                file=sys.stderr,
                flush=True,
            )

    def save(self, step: int, journal: Journal, *, anyway: bool = False) -> None:
        """Write a checkpoint before ``step`` if one is due, or ``anyway``."""
        interval, last = self._config.checkpoint.save_interval, step == self._config.run.num_rollout
        due = (interval and step % interval == 0) or (last and self._config.checkpoint.save_final)
        if not due and not anyway:
            return
        with journal.timed("save"), replaced(self._config.run_dir, step) as folder:
            results = self._cluster.call(SaveCheckpoint(str(folder)), step=step)
            journal.publish(events.CheckpointWritten(step, results))
            digests = {name: digest for result in results for name, digest in result.folders.items()}
            # The ledger's entry is on disk before the file that refers to it.
            complete(folder, ControllerState(step, self._config.run.seed, journal.ledger_head, digests, FORMAT))

    def export(self) -> None:
        """Write the trainer's weights as a Hugging Face checkpoint, by default into the run folder. Raises ExportError
        where the files cannot be written."""
        folder = self._config.checkpoint.export_dir or self._config.run_dir / EXPORT
        results = self._cluster.call(ExportModel(str(folder)), step=self._config.run.num_rollout)
        if problem := results[0].detail.get("problem"):
            raise ExportError(f"{folder}: {problem}")

    def export_at_end(self, journal: Journal) -> None:
        """Export, and leave a checkpoint where that fails. Raises ExportError."""
        last = self._config.run.num_rollout
        folder = step_folder(self._config.run_dir, last)
        try:
            self.export()
        except ExportError as error:
            if newest(self._config.run_dir, up_to=last) != folder:
                try:
                    self.save(last, journal, anyway=True)
                except (WorkerError, OSError) as second:
                    raise ExportError(f"{error}; no checkpoint could be written either: {second}") from None
            raise ExportError(f"{error}; nothing is lost: `miles-spmd export {folder} OUT` exports the model") from None


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step_{step:06d}"


def newest(run_dir: Path, up_to: int | None = None) -> Path | None:
    """Return the complete checkpoint of the highest step in a run folder, or of the highest step up to ``up_to``."""
    return _newest_in(run_dir / FOLDER, up_to)


def _newest_in(folder: Path, up_to: int | None = None) -> Path | None:
    complete = {step: path for step, path in _by_step(folder).items() if (path / STATE_FILE).exists()}
    step = max((step for step in complete if up_to is None or step <= up_to), default=None)
    return None if step is None else complete[step]


def _by_step(folder: Path) -> dict[int, Path]:
    numbered = {path.name.removeprefix("step_"): path for path in folder.glob("step_*")}
    return {int(number): path for number, path in numbered.items() if number.isdecimal()}


def _remove_after(folder: Path, step: int) -> list[Path]:
    """Remove checkpoints of later steps, and return the complete ones. All have lost their marks before the first is
    gone: a half removed one must not count as complete."""
    later = [path for number, path in sorted(_by_step(folder).items()) if number > step]
    complete = [path for path in later if (path / STATE_FILE).exists()]
    for path in complete:
        (path / STATE_FILE).unlink()
    for path in later:
        shutil.rmtree(path, ignore_errors=True)
    return complete


@contextmanager
def replaced(run_dir: Path, step: int) -> Iterator[Path]:
    """Provide an empty folder to write into, which becomes the checkpoint of ``step`` at the end; after an error it is
    removed, so that a full disk has room again.
    """
    folder = step_folder(run_dir, step)
    for leftover in folder.parent.glob(f"*{INCOMPLETE}"):
        shutil.rmtree(leftover)
    scratch, old = (folder.with_name(folder.name + suffix) for suffix in (INCOMPLETE, f".old{INCOMPLETE}"))
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if folder.exists():  # incomplete, damaged, or from before the run went on from an earlier checkpoint
            folder.rename(old)
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def complete(folder: Path, state: ControllerState) -> None:
    """Mark ``folder`` as complete, atomically, after every rank has written its share."""
    write_whole(folder / STATE_FILE, state.encode(), sync=True)


def read(folder: Path) -> ControllerState:
    """Return the state in ``folder``. Raises ResumeError where it is not a complete checkpoint of this project."""
    path = folder / STATE_FILE
    if (own := newest(folder)) is not None:
        raise ResumeError(f"{folder} is the folder of a run; name one of its checkpoints, such as {own}")
    if not path.is_file():
        kind = "is incomplete: it was being written when its run ended" if folder.is_dir() else "does not exist"
        raise ResumeError(f"checkpoint {folder} {kind} ({STATE_FILE} is missing); {_remedy(folder)}")
    content = path.read_bytes()
    try:
        state = msgspec.json.decode(content, type=ControllerState)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResumeError(f"{path} is damaged: {error}; {_remedy(folder)}") from error
    if (state.format, state.digest) == (1, ""):
        raise ResumeError(
            f"checkpoint {folder} was written by a version without digests (format 1), and this one reads format "
            f"{FORMAT}; continue it with the version that wrote it, or export it with that version and start from there"
        )
    if state.encode() != content:
        raise ResumeError(f"{path} is damaged: its digest is not that of its content; {_remedy(folder)}")
    if state.format != FORMAT:
        raise ResumeError(f"checkpoint {folder} has format {state.format}, and this version reads {FORMAT}")
    return state


def _remedy(folder: Path) -> str:
    """Say which checkpoint can be taken instead."""
    number = folder.name.removeprefix("step_")
    before = _newest_in(folder.parent, int(number) - 1) if number.isdecimal() else None
    if before is None:
        return "no complete checkpoint is before it"
    return f"take the one before it: checkpoint.load={before} checkpoint.resume=false"
