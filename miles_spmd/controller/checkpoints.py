"""Resumable checkpoints: where they lie, when one is due, and when one is complete.

``checkpoints/step_000020/`` holds what the ranks wrote, a folder for each model, and ``controller.json``, which marks
it as complete and has digests of it all. It is written as ``step_000020.incomplete`` and renamed at the end: what a run
leaves behind that ends meanwhile is ignored, and removed by the next save. Data order and seeds are functions of the
step, so the step is all the state of the controller, beside its position in the ledger.
"""

from __future__ import annotations

import logging
import shutil
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

_log = logging.getLogger(__name__)
FOLDER = "checkpoints"
EXPORT = "export"  # in the run folder, where the configuration names no other
STATE_FILE = "controller.json"
RESPONSES_FILE = "responses.msgpack.z"  # of the step's rollout, which the run had to leave
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
    digest: str = ""  # of all the others
    responses: str | msgspec.UnsetType = msgspec.UNSET  # digest of RESPONSES_FILE, where the step had begun

    def encode(self) -> bytes:
        """Return the content of the file, with the digest."""
        unsealed = msgspec.json.encode(msgspec.structs.replace(self, digest=""))
        return msgspec.json.encode(msgspec.structs.replace(self, digest=xxhash.xxh3_128_hexdigest(unsealed)))


class Checkpoints:
    """Loads, saves and exports the weights and optimizers of all ranks. Methods raise WorkerError where one fails."""

    def __init__(self, config: Config, cluster: Cluster) -> None:
        self._config, self._cluster = config, cluster
        self._saved: int | None = None  # step before which the run's own newest checkpoint was written
        self.responses = b""  # that came with the checkpoint that was loaded

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
        self.responses = _responses(folder, state)
        if not folder.absolute().is_relative_to(run_dir.absolute()):
            return Start(state.step)  # of another run, whose ledger this one does not continue
        self._saved = state.step
        return Start(state.step, state.ledger, results)

    def save(self, step: int, journal: Journal, *, anyway: bool = False) -> None:
        """Write a checkpoint before ``step`` if one is due, or ``anyway``. Only one that is due has an entry in the
        ledger, which therefore does not depend on when a run was interrupted."""
        interval, last = self._config.checkpoint.save_interval, step == self._config.run.num_rollout
        due = (interval and step and step % interval == 0) or (last and self._config.checkpoint.save_final)
        if not due and not anyway:
            return
        with journal.timed("save"), replaced(self._config.run_dir, step) as folder:
            results = self._cluster.call(SaveCheckpoint(str(folder)), step=step)
            if due:
                journal.publish(events.CheckpointWritten(step, results))
            digests = {name: digest for result in results for name, digest in result.folders.items()}
            # The ledger's entry is on disk before the file that refers to it.
            complete(folder, ControllerState(step, self._config.run.seed, journal.ledger_head, digests, FORMAT))
        self._saved = step

    def save_all(self, step: int, journal: Journal, responses: bytes) -> None:
        """Write a checkpoint before ``step``, unless there is one, and ``responses`` of that step into it."""
        if self._saved != step:
            self.save(step, journal, anyway=True)
        if responses:
            folder = step_folder(self._config.run_dir, step)
            write_whole(folder / RESPONSES_FILE, responses, sync=True)
            complete(folder, msgspec.structs.replace(read(folder), responses=xxhash.xxh3_128_hexdigest(responses)))

    def lost(self, step: int) -> str:
        """Return in words what of a run is in no checkpoint that is in ``step`` and cannot save its weights."""
        checkpoint = newest(self._config.run_dir, up_to=step)
        if checkpoint is None:
            return f"the steps 0 to {step} have to be done again"
        first = read(checkpoint).step
        what = f"step {step} has" if first == step else f"the steps {first} to {step} have"
        return f"{what} to be done again, from {checkpoint.name}"

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


@contextmanager
def replaced(run_dir: Path, step: int) -> Iterator[Path]:
    """Provide an empty folder to write into, which becomes the checkpoint of ``step`` at the end; after an error it is
    removed, so that a full disk has room again.

    At the end checkpoints of later steps are removed: the run has gone on from an earlier one, and its ledger with it.
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
    for path in (old, *(path for later, path in _by_step(folder.parent).items() if later > step)):
        shutil.rmtree(path, ignore_errors=True)


def _responses(folder: Path, state: ControllerState) -> bytes:
    """Return the responses that lie in a checkpoint. Where they are damaged they are generated anew, like those of a
    step that had not begun."""
    if state.responses is msgspec.UNSET:
        return b""
    path = folder / RESPONSES_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        _log.warning("%s cannot be read (%s): step %d generates all its responses anew", path, error, state.step)
        return b""
    if xxhash.xxh3_128_hexdigest(content) != state.responses:
        _log.warning("%s is not what was written: step %d generates all its responses anew", path, state.step)
        return b""
    return content


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
