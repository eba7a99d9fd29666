"""Resumable checkpoints on disk: where they lie, when one is complete, and which of them stay.

``checkpoints/step_000020/`` holds what the ranks wrote, a folder for each model, and ``controller.json``, which marks
it as complete and has digests of it all. It is written as ``step_000020.incomplete`` and renamed at the end: what a run
leaves behind that ends meanwhile is ignored, and removed by the next save. ``latest`` is a symbolic link to the newest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec
import xxhash

from miles_spmd.config import CheckpointConfig
from miles_spmd.ledger.entries import Saved
from miles_spmd.protocol.last_words import warn
from miles_spmd.types.engine_group import POLICY, in_group
from miles_spmd.types.files import link, write_whole
from miles_spmd.types.rollout_batch import Baselines
from miles_spmd.types.run_files import CHECKPOINT_MARK as STATE_FILE
from miles_spmd.types.run_files import CHECKPOINTS as FOLDER
from miles_spmd.types.run_files import by_step, complete_checkpoints, complete_in

EXPORT = "export"  # in the run folder, where the configuration names no other
RESPONSES_FILE = "responses.msgpack.z"  # of the step's rollout, which the run had to leave
LATEST = "latest"
INCOMPLETE = ".incomplete"
FORMAT = 3


class ResumeError(RuntimeError):
    """A checkpoint that cannot be resumed from: what is wrong with it and what to do."""


class ControllerState(msgspec.Struct, frozen=True):
    """All that the controller has to know to go on, beside the configuration: data order, seeds, the version of the
    weights and the learning rate are functions of the step."""

    step: int  # the optimizer has seen rollouts 0 .. step - 1
    seed: int
    ledger: str = ""  # hash of its last entry; "" without a ledger
    folders: dict[str, list[str]] = {}  # of each model's folder the digest of every rank's index, which has the rest
    saved: Saved | None = None  # digests of weights and optimizers, as in the ledger
    metrics: dict[str, float] = {}  # of the evaluation after ``step`` steps, if there was one
    responses: str = ""  # digest of RESPONSES_FILE, where the step had begun
    baselines: Baselines | msgspec.UnsetType = msgspec.UNSET  # of the advantage estimator, where it has some
    format: int = 1  # what the first version did not write
    digest: str = ""  # of all the above

    def of_policy(self, policy: str) -> dict[str, list[str]]:
        """Return those of ``folders`` that a policy has, by the names of its models."""
        models = {name.rpartition("/")[2] for name in self.folders}
        return {name: self.folders[own] for name in models if (own := in_group(policy, name)) in self.folders}

    def encode(self) -> bytes:
        """Return the content of the file, with the digest."""
        unsealed = msgspec.json.encode(msgspec.structs.replace(self, digest=""))
        return msgspec.json.encode(msgspec.structs.replace(self, digest=xxhash.xxh3_128_hexdigest(unsealed)))


# --- which there are -------------------------------------------------------------------------------------------------


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step_{step:06d}"


def newest(run_dir: Path, up_to: int | None = None) -> Path | None:
    """Return the complete checkpoint of the highest step in a run folder, or of the highest step up to ``up_to``."""
    return _newest_in(run_dir / FOLDER, up_to)


def unfinished(run_dir: Path) -> list[Path]:
    """Return what saves that were interrupted have left in a run folder, in order."""
    left = (path for path in (run_dir / FOLDER).glob("step_*") if not (path / STATE_FILE).exists())
    return sorted(path for path in left if path.name.removeprefix("step_").removesuffix(INCOMPLETE).isdecimal())


def _newest_in(folder: Path, up_to: int | None = None) -> Path | None:
    found = [path for step, path in complete_in(folder).items() if up_to is None or step <= up_to]
    return found[-1] if found else None


# --- writing one -----------------------------------------------------------------------------------------------------


def begin(run_dir: Path, step: int) -> Path:
    """Return an empty folder for the checkpoint of ``step``. Raises OSError."""
    folder = step_folder(run_dir, step)
    for leftover in folder.parent.glob(f"*{INCOMPLETE}"):
        shutil.rmtree(leftover)
    scratch = folder.with_name(folder.name + INCOMPLETE)
    scratch.mkdir(parents=True)
    return scratch


def publish(scratch: Path, state: ControllerState) -> Path:
    """Mark what :func:`begin` returned as complete, after every rank has written its share, and give it its name.
    Returns that folder. Raises OSError.

    Checkpoints of later steps are removed: the run has gone on from an earlier one, and its ledger with it.
    """
    folder = scratch.with_name(scratch.name.removesuffix(INCOMPLETE))
    mark(scratch, state)
    old = folder.with_name(f"{folder.name}.old{INCOMPLETE}")
    if folder.exists():  # incomplete, damaged, or from before the run went on from an earlier checkpoint
        folder.rename(old)
    scratch.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    remove_after(folder.parents[1], state.step)
    _sync(folder.parent)
    link(folder.with_name(LATEST), folder.name)
    return folder


def beside(export: Path, policy: str) -> Path:
    """Return the folder of the export of a policy, where that of the first one is ``export``."""
    return export if policy == POLICY else export.with_name(f"{export.name}_{policy}")


def mark(folder: Path, state: ControllerState) -> None:
    """Mark ``folder`` as complete, atomically. Raises OSError."""
    write_whole(folder / STATE_FILE, state.encode(), sync=True)
    _sync(folder)


def add_responses(folder: Path, responses: bytes) -> None:
    """Put the responses that the step after the complete checkpoint ``folder`` has so far into it. Raises OSError."""
    write_responses(folder, responses)
    mark(folder, msgspec.structs.replace(read(folder), responses=digest_of(responses)))


def write_responses(folder: Path, responses: bytes) -> None:
    """Write what there is of the step's rollout, if there is anything. Raises OSError."""
    if responses:
        write_whole(folder / RESPONSES_FILE, responses, sync=True)


def digest_of(responses: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(responses) if responses else ""


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- which stay ------------------------------------------------------------------------------------------------------


def prune(run_dir: Path, settings: CheckpointConfig) -> None:
    """Remove the complete checkpoints that ``settings`` do not keep."""
    folders = complete_checkpoints(run_dir)
    if not settings.keep_last or len(folders) <= settings.keep_last:
        return
    scores = _scores(folders, settings.keep_best) if settings.keep_best else {}
    stay = kept(list(folders), settings.keep_last, settings.keep_every, scores)
    for step in folders.keys() - stay:
        # without its mark it is not complete any more: a removal that is interrupted leaves nothing that looks whole
        with contextlib.suppress(OSError):
            (folders[step] / STATE_FILE).unlink()
        shutil.rmtree(folders[step], ignore_errors=True)


def remove_after(run_dir: Path, step: int) -> list[Path]:
    """Remove checkpoints of later steps, and return the complete ones. All have lost their marks before the first is
    gone: one that is half removed must not count as complete."""
    later = [path for number, path in by_step(run_dir / FOLDER).items() if number > step]
    marked = [path for path in later if (path / STATE_FILE).exists()]
    for path in marked:
        (path / STATE_FILE).unlink()
    for path in later:
        shutil.rmtree(path, ignore_errors=True)
    return marked


def kept(steps: list[int], last: int, every: int, scores: Mapping[int, float]) -> set[int]:
    """Return which of the checkpoints of ``steps``, in order, stay: the ``last`` ones, multiples of ``every``, and the
    one with the highest of ``scores``, the later one of equals."""
    best = max(scores, key=lambda step: (scores[step], step), default=None)
    return {*steps[-last:], *(step for step in steps if every and step % every == 0), *([] if best is None else [best])}


def _scores(folders: Mapping[int, Path], metric: str) -> dict[int, float]:
    scores = {}
    for step, folder in folders.items():
        with contextlib.suppress(ResumeError):  # a damaged one is not the best
            if metric in (metrics := read(folder).metrics):
                scores[step] = metrics[metric]
    return scores


# --- reading one -----------------------------------------------------------------------------------------------------


def read(folder: Path) -> ControllerState:
    """Return the state in ``folder``. Raises ResumeError where it is not a complete checkpoint of this project."""
    path = folder / STATE_FILE
    among = folder.name == FOLDER
    if (own := newest(folder.parent if among else folder)) is not None:
        what = "has the checkpoints" if among else "is the folder"
        raise ResumeError(f"{folder} {what} of a run; name one of its checkpoints, such as {own}")
    if not path.is_file():
        kind = "is incomplete: it was being written when its run ended" if folder.is_dir() else "does not exist"
        if folder.is_dir() and not folder.name.startswith("step_"):
            kind = "is none"
        raise ResumeError(f"checkpoint {folder} {kind} ({STATE_FILE} is missing)")
    try:
        content = path.read_bytes()
        state = msgspec.json.decode(content, type=ControllerState)
    except OSError as error:
        raise ResumeError(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        old = _old_format(content)
        raise ResumeError((old and f"checkpoint {folder} {old}") or f"{path} is damaged: {error}") from error
    if old := _old_format(content):
        raise ResumeError(f"checkpoint {folder} {old}")
    if state.encode() != content:
        raise ResumeError(f"{path} is damaged: its digest is not that of its content")
    return state


def responses(folder: Path, state: ControllerState) -> bytes:
    """Return the responses that lie in a checkpoint. Where they are damaged they are generated anew, like those of a
    step that had not begun."""
    if not state.responses:
        return b""
    path, anew = folder / RESPONSES_FILE, f"step {state.step} generates all its responses anew"
    try:
        content = path.read_bytes()
    except OSError as error:
        warn(f"{path} cannot be read ({error.strerror}): {anew}")
        return b""
    if xxhash.xxh3_128_hexdigest(content) != state.responses:
        warn(f"{path} is not what was written: {anew}")
        return b""
    return content


class _Format(msgspec.Struct):
    format: int = 1


def _old_format(content: bytes) -> str:
    """Return what there is to say about a state of another format; "" where it has this version's, or none."""
    try:
        number = msgspec.json.decode(content, type=_Format).format
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""
    if number == FORMAT:
        return ""
    return (
        f"has format {number}, and this version reads format {FORMAT}; continue it with the version that wrote it, or "
        "export it with that version and start from there"
    )


def remedy(folder: Path) -> str:
    """Say which checkpoint can be taken instead of ``folder``."""
    number = folder.name.removeprefix("step_")
    before = _newest_in(folder.parent, int(number) - 1) if number.isdecimal() else None
    if before is None:
        return "no complete checkpoint is before it"
    return f"take the one before it: checkpoint.load={before} checkpoint.resume=false"
