"""Resumable checkpoints: where they lie, when one is due, and when one is complete.

``checkpoints/step_000020/`` holds the ranks' shares in ``trainer/`` and, written last, ``controller.json``: a folder
without it was being written when the run ended, and is ignored. Data order and seeds are functions of the step, so the
step is all the state of the controller, beside its position in the ledger.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from miles_spmd.config import Config
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.journal import events
from miles_spmd.controller.journal.journal import Journal
from miles_spmd.controller.journal.ledger import Start
from miles_spmd.protocol.commands import ExportModel, LoadCheckpoint, SaveCheckpoint

FOLDER = "checkpoints"
STATE_FILE = "controller.json"


class ResumeError(RuntimeError):
    """A checkpoint that cannot be resumed from: what is wrong with it and what to do."""


class ControllerState(msgspec.Struct, frozen=True):
    step: int  # the optimizer has seen rollouts 0 .. step - 1
    seed: int
    ledger: str = ""  # hash of its last entry; "" without a ledger
    format: int = 1


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
        results = self._cluster.call(LoadCheckpoint(str(folder)), step=state.step)
        if not folder.absolute().is_relative_to(run_dir.absolute()):
            return Start(state.step)  # of another run, whose ledger this one does not continue
        return Start(state.step, state.ledger, results)

    def save(self, step: int, journal: Journal) -> None:
        """Write a checkpoint before ``step`` if one is due."""
        interval, last = self._config.checkpoint.save_interval, step == self._config.run.num_rollout
        if not (interval and step % interval == 0) and not (last and self._config.checkpoint.save_final):
            return
        with journal.timed("save"):
            folder = step_folder(self._config.run_dir, step)
            folder.mkdir(parents=True, exist_ok=True)
            results = self._cluster.call(SaveCheckpoint(str(folder)), step=step)
            journal.publish(events.CheckpointWritten(step, results))
            # The ledger's entry is on disk before the file that refers to it.
            complete(folder, ControllerState(step, self._config.run.seed, ledger=journal.ledger_head))

    def export(self) -> None:
        """Write the trainer's weights as a Hugging Face checkpoint, by default into the run folder."""
        folder = self._config.checkpoint.export_dir or self._config.run_dir / "export"
        self._cluster.call(ExportModel(str(folder)), step=self._config.run.num_rollout)


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step_{step:06d}"


def newest(run_dir: Path, up_to: int | None = None) -> Path | None:
    """Return the complete checkpoint of the highest step in a run folder, or of the highest step up to ``up_to``."""
    complete = [p.parent for p in (run_dir / FOLDER).glob(f"step_*/{STATE_FILE}")]
    usable = [folder for folder in complete if up_to is None or folder.name <= step_folder(run_dir, up_to).name]
    return max(usable, key=lambda folder: folder.name, default=None)


def complete(folder: Path, state: ControllerState) -> None:
    """Mark ``folder`` as complete, atomically, after every rank has written its share."""
    scratch = folder / f"{STATE_FILE}.tmp"
    with scratch.open("wb") as file:
        file.write(msgspec.json.encode(state))
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(folder / STATE_FILE)


def read(folder: Path) -> ControllerState:
    """Return the state in ``folder``. Raises ResumeError where it is not a complete checkpoint of this project."""
    path = folder / STATE_FILE
    if not path.is_file():
        kind = "is incomplete: it was being written when its run ended" if folder.is_dir() else "does not exist"
        raise ResumeError(f"checkpoint {folder} {kind} ({STATE_FILE} is missing); choose another step's folder")
    try:
        return msgspec.json.decode(path.read_bytes(), type=ControllerState)
    except msgspec.DecodeError as error:
        raise ResumeError(f"{path} is damaged: {error}; choose another step's folder") from error
