"""Where resumable checkpoints lie, and when one is complete.

``checkpoints/step_000020/`` holds the ranks' share in ``trainer/`` and, written last, ``controller.json``: a folder
without it was being written when the run ended and is passed over. Data order and seeds are functions of the step, so
the step is all the state that the controller has, beside its place in the ledger.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

FOLDER = "checkpoints"
STATE_FILE = "controller.json"


class ResumeError(RuntimeError):
    """A checkpoint that cannot be resumed from, with what is wrong and what to do."""


class ControllerState(msgspec.Struct, frozen=True):
    step: int  # optimizer has seen rollouts 0 .. step - 1
    seed: int
    ledger: str = ""  # hash of its last entry; "": none was kept
    format: int = 1


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step_{step:06d}"


def newest(run_dir: Path, up_to: int | None = None) -> Path | None:
    """The complete checkpoint of the highest step in a run folder, or of the highest that is not above ``up_to``."""
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
    """Raises CheckpointError when ``folder`` is no complete checkpoint of this project."""
    path = folder / STATE_FILE
    if not path.is_file():
        kind = "is incomplete: it was being written when its run ended" if folder.is_dir() else "does not exist"
        raise ResumeError(f"checkpoint {folder} {kind} ({STATE_FILE} is missing); choose another step's folder")
    try:
        return msgspec.json.decode(path.read_bytes(), type=ControllerState)
    except msgspec.DecodeError as error:
        raise ResumeError(f"{path} is damaged: {error}; choose another step's folder") from error
