"""Resumable checkpoints of a run: when one is due, how it is completed while training goes on, and which is loaded.

A save has two parts. The ranks copy their state to host memory, while training waits; then each writes its files, while
training goes on. At every later end of a step the controller asks whether all are done, without waiting, and completes
the checkpoint. The ledger's entry belongs to the first part, so that its place depends on the step alone.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeVar

import msgspec

from miles_spmd.config import Config
from miles_spmd.controller import checkpoint_folders as folders
from miles_spmd.controller.checkpoint_folders import ControllerState, ResumeError
from miles_spmd.controller.cluster.cluster import Cluster
from miles_spmd.controller.cluster.errors import WorkerError
from miles_spmd.controller.journal import events
from miles_spmd.controller.journal.journal import Journal
from miles_spmd.controller.journal.ledger import Start
from miles_spmd.ledger.chain import links
from miles_spmd.ledger.entries import LedgerError
from miles_spmd.planning.memory_estimate import checkpoint_bytes
from miles_spmd.planning.release import sized
from miles_spmd.plugins.plug_point import PlugPoint
from miles_spmd.plugins.run import Exporter
from miles_spmd.protocol.commands import Command, ExportModel, FinishSave, LoadCheckpoint, SaveCheckpoint
from miles_spmd.protocol.last_words import warn
from miles_spmd.protocol.results import Result, SaveProgress
from miles_spmd.telemetry.trackers import read_metrics
from miles_spmd.types.engine_group import in_group
from miles_spmd.types.files import with_remedy
from miles_spmd.types.rollout_batch import Baselines
from miles_spmd.types.run_files import METRICS_FILE, complete_checkpoints

EXPORTERS: PlugPoint[Exporter] = PlugPoint("checkpoint.exporter", {}, Exporter, limited=False)  # uploads take long
R = TypeVar("R", bound=Result)
SAVE_FILE = "save"  # in the run folder: whoever makes it asks for a checkpoint at the end of the step


class SaveError(RuntimeError):
    """A checkpoint could not be written: which, why, and what to do."""


class ExportError(RuntimeError):
    """The model could not be written as a Hugging Face checkpoint."""


@dataclass(frozen=True)
class _Saving:
    """A save that is under way."""

    scratch: Path | None  # None: it failed before it had a folder
    state: ControllerState
    asked: bool  # by the file, which is removed at the end
    cell: int  # that writes it


class Checkpoints:
    """Loads, saves and exports the weights and optimizers of all ranks. Methods raise WorkerError where one fails."""

    def __init__(self, config: Config, cluster: Cluster) -> None:
        self._config, self._cluster = config, cluster
        self._saving: _Saving | None = None
        self._lost: _Saving | None = None  # it was the last one, and its cell is lost
        self._problem, self._failures = "", 0  # why the last save failed, and how many did in a row
        self._evaluated: tuple[int, Mapping[str, float]] = -1, {}
        self._saved: int | None = None  # step before which the run's own newest checkpoint was written
        self.responses = b""  # that came with the checkpoint that was loaded
        self.backlog: Callable[[int], bytes] = lambda step: b""  # what a step has begun before it
        self.baselines: Callable[[int], Baselines] = lambda step: {}  # of the advantage estimator before a step

    def observe(self, event: events.Event) -> None:
        """Remember the newest evaluation, by which ``keep_best`` chooses."""
        if isinstance(event, events.EvaluationFinished):
            step, metrics = self._evaluated
            self._evaluated = event.step, {**(metrics if step == event.step else {}), **event.metrics}

    # --- saving ------------------------------------------------------------------------------------------------------

    def rewind(self, step: int) -> None:
        """Remove the run's checkpoints of later steps than ``step``, where the configuration names the one that it goes
        on from: they belong to steps that it is about to repeat, and a resume after a crash must not take one. Those
        that a resume could not load stay until the next one is complete: they may be readable again."""
        if self._config.checkpoint.load is None or not step:
            return
        removed = folders.remove_after(self._config.run_dir, step)
        if removed:
            names = ", ".join(path.name for path in removed)
            warn(f"the run goes on from step {step}, so its later checkpoints are removed: {names}")

    def save(self, step: int, journal: Journal, *, anyway: bool = False) -> None:
        """Begin a checkpoint before ``step`` if one is due, or ``anyway``; complete the one before if it is written. It
        has what ``backlog`` and ``baselines`` return for the step.

        A save that fails is a warning. Raises SaveError where the next one fails, too.
        """
        self._settle(journal, wait=False)
        interval, last = self._config.checkpoint.save_interval, step == self._config.run.num_rollout
        due = bool((interval and step and step % interval == 0) or (last and self._config.checkpoint.save_final))
        asked = self._is_asked(step)
        begun = self._saving is not None and self._saving.state.step == step  # a step's end may ask twice
        if begun or not (due or asked or anyway):
            return
        with journal.timed("save", step):
            self._settle(journal, wait=True)
            self._begin(step, journal, due, asked)

    def finish(self, step: int, journal: Journal) -> None:
        """Wait for a save that is under way. ``step``: the one before which the weights are; its save is begun again
        where the cell that wrote it is lost. Raises SaveError where the last save failed: the run ends without it."""
        self._settle(journal, wait=True, ends=True)
        while (lost := self._lost) is not None and lost.state.step == step:
            self._begin(step, journal, due=False, asked=lost.asked)
            self._settle(journal, wait=True, ends=True)
        if self._problem:
            raise SaveError(self._problem)

    def save_all(self, step: int, journal: Journal, responses: bytes) -> None:
        """Write a checkpoint before ``step``, unless there is one, and ``responses`` of that step into it; return when
        it is complete. Raises SaveError, and OSError for the responses."""
        with journal.timed("save", step):
            self._settle(journal, wait=True)
        if self._saved != step:
            self.save(step, journal, anyway=True)
        with journal.timed("save", step):
            self.finish(step, journal)
            if responses:
                folders.add_responses(folders.step_folder(self._config.run_dir, step), responses)

    def lost(self, step: int) -> str:
        """Return in words what of a run is in no checkpoint that is in ``step`` and cannot save its weights."""
        checkpoint = folders.newest(self._config.run_dir, up_to=step)
        if checkpoint is None:
            return f"the steps 0 to {step} have to be done again"
        first = folders.read(checkpoint).step
        what = f"step {step} has" if first == step else f"the steps {first} to {step} have"
        return f"{what} to be done again, from {checkpoint.name}"

    @contextlib.contextmanager
    def completed(self, journal: Journal) -> Iterator[None]:
        """After an error of the block that is not one of the ranks', complete the save that is under way."""
        try:
            yield
        except WorkerError:
            raise
        except Exception:
            with contextlib.suppress(WorkerError):
                self._settle(journal, wait=True, ends=True)
            raise

    def _is_asked(self, step: int) -> bool:
        """Return whether somebody asks for a checkpoint that can be written now: where rollouts lag behind, only when
        the engine has the newest weights."""
        if self._saving is not None and self._saving.asked:
            return False
        aligned = step % self._config.refit.update_weights_interval == 0
        return aligned and (self._config.run_dir / SAVE_FILE).is_file()

    def _begin(self, step: int, journal: Journal, due: bool, asked: bool) -> None:
        scratch, problem, self._lost = None, self._lack_of_room(), None
        responses = self.backlog(step)
        if not problem:
            try:
                scratch = folders.begin(self._config.run_dir, step)
                folders.write_responses(scratch, responses)
            except OSError as error:
                problem = str(error)
        # without room for it, too: the ledger's entry depends on the step alone
        results = self._of_each(lambda policy: SaveCheckpoint(_of(policy, scratch)), step)
        saved = journal.checkpoint_entry(step, results)
        if due:
            journal.publish(events.CheckpointTaken(step, saved))
        evaluated, metrics = self._evaluated
        state = ControllerState(
            step,
            self._config.run.seed,
            journal.ledger_head,
            saved=saved,
            metrics={n: value for n, value in metrics.items() if evaluated == step and math.isfinite(value)},
            format=folders.FORMAT,
            responses=folders.digest_of(responses),
            baselines=self.baselines(step) or msgspec.UNSET,
        )
        self._saving = _Saving(scratch, state, asked, self._cluster.first_cell)
        if problem:
            self._fail(problem, journal)

    def _settle(self, journal: Journal, *, wait: bool, ends: bool = False) -> None:
        """Complete the save that is under way, if all ranks are done. ``ends``: the run does not go on afterwards."""
        if self._saving is None:
            return
        scratch, step = self._saving.scratch, self._saving.state.step
        by_policy = self._of_each(lambda policy: FinishSave(wait, _of(policy, scratch)), step, self._saving.cell)
        progress = list(chain.from_iterable(by_policy.values()))
        if not all(one.done for one in progress):
            return
        if any(one.lost for one in progress):
            self._give_up(journal)
            return
        problem = next((one.problem for one in progress if one.problem), "")
        try:
            if not problem and scratch is not None:
                self._complete(self._saving, scratch, by_policy, journal)
        except OSError as error:
            problem = str(error)
        if problem:
            self._fail(problem, journal, ends)

    def _complete(
        self, saving: _Saving, scratch: Path, by_policy: Mapping[str, Sequence[SaveProgress]], journal: Journal
    ) -> None:
        digests = {
            in_group(policy, name): [one.digests[name] for one in ranks]
            for policy, ranks in by_policy.items()
            for name in ranks[0].digests
        }
        progress = list(chain.from_iterable(by_policy.values()))
        journal.sync()  # the ledger's entry is on disk before the file that refers to it
        folders.publish(scratch, msgspec.structs.replace(saving.state, folders=digests))
        folders.prune(self._config.run_dir, self._config.checkpoint)
        seconds, nbytes = max(one.seconds for one in progress), sum(one.nbytes for one in progress)
        journal.publish(events.CheckpointCompleted(saving.state.step, seconds, nbytes))
        self._problem, self._failures, self._saved = "", 0, saving.state.step
        self._end(saving)

    def _fail(self, problem: str, journal: Journal, ends: bool = False) -> None:
        """Remove what the save has written, so that a full disk has room again, and say why. Raises SaveError where it
        is the second one, unless the run ``ends``, which then reports it."""
        assert self._saving is not None
        step, scratch = self._saving.state.step, self._saving.scratch
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        before = folders.newest(self._config.run_dir)
        self._problem = (
            f"the checkpoint of step {step} could not be written: {problem}; "
            f"{'no other one exists' if before is None else f'the newest is {before}'}"
        )
        self._failures += 1
        self._end(self._saving)
        journal.publish(events.CheckpointFailed(step, self._problem))
        if ends:
            return
        if self._failures > 1:
            raise SaveError(self._problem)
        warn(with_remedy(f"{self._problem}; the run goes on, and ends if the next one fails, too"))

    def _give_up(self, journal: Journal) -> None:
        """The cell is lost that wrote the checkpoint: nothing is wrong with the files, and the next save is as good as
        any. One that somebody has asked for is begun again at the end of the step."""
        assert self._saving is not None
        step, cell = self._saving.state.step, self._saving.cell
        problem = f"the checkpoint of step {step} is left unfinished, because cell {cell}, which wrote it, was lost"
        journal.publish(events.CheckpointFailed(step, problem))
        warn(problem)
        self._lost, self._saving = self._saving, None

    def _end(self, saving: _Saving) -> None:
        if saving.asked:
            (self._config.run_dir / SAVE_FILE).unlink(missing_ok=True)
        self._saving = None

    def _lack_of_room(self) -> str:
        """Say that the file system has less room than a checkpoint takes; "" where it has enough."""
        folder = self._config.run_dir / folders.FOLDER  # which may be a link to another file system
        folder = folder if folder.exists() else self._config.run_dir
        needed, free = self._size, shutil.disk_usage(folder).free
        if free > needed:
            return ""
        full = os.strerror(errno.ENOSPC)
        return f"{full}: it takes {sized(needed)}, and the file system of {folder} has {sized(free)}"

    @functools.cached_property
    def _size(self) -> int:
        return checkpoint_bytes(self._config)

    # --- loading -----------------------------------------------------------------------------------------------------

    def load(self) -> Start:
        """Load the checkpoint that ``[checkpoint]`` names, if any.

        With ``resume`` that is the run's newest one that can be loaded; what is wrong with a newer one is a warning.
        Raises ResumeError where there are some and none can be loaded, or the one that is named cannot.
        """
        settings, run_dir = self._config.checkpoint, self._config.run_dir
        candidates = list(reversed(complete_checkpoints(run_dir).values())) if settings.resume else []
        problems = [
            f"{path} was not finished when its run ended"
            for path in folders.unfinished(run_dir)
            if candidates and path.name > candidates[0].name
        ]
        for folder in candidates:
            try:
                start = self._load(folder)
            except ResumeError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                warn(f"{problem}; continuing from {folder}")
            return start
        if candidates:
            raise ResumeError(
                f"no checkpoint of {run_dir} can be loaded: {'; '.join(problems)}; put back what was changed, in the "
                "settings or in the files, or begin another run with another run.name"
            )
        if settings.resume:
            self._warn_of_beginning()
        if settings.load is None:
            return Start()
        try:
            return self._load(settings.load)
        except ResumeError as error:
            raise ResumeError(f"{error}; {folders.remedy(settings.load)}") from error

    def _warn_of_beginning(self) -> None:
        """Say what a run that was to be continued replaces, because it has no checkpoint."""
        run_dir = self._config.run_dir
        steps = max(read_metrics(run_dir / METRICS_FILE), default=0)
        if left := folders.unfinished(run_dir):
            warn(f"{left[-1]} was not finished when its run ended, and no other is there: the run begins anew")
        elif steps:
            warn(f"{run_dir} has no checkpoint: the run begins anew, and the metrics of its {steps} steps are replaced")

    def _load(self, folder: Path) -> Start:
        """Load one checkpoint on all ranks. Raises ResumeError where it cannot be loaded on one of them."""
        state, run_dir = folders.read(folder), self._config.run_dir
        own = folder.absolute().is_relative_to(run_dir.absolute())
        if own and state.ledger and self._config.determinism.ledger:
            self._require_entry(folder, state)
        results = self._of_each(lambda policy: LoadCheckpoint(_of(policy, folder), state.of_policy(policy)), state.step)
        if problem := next((one.problem for one in chain.from_iterable(results.values()) if one.problem), ""):
            raise ResumeError(problem)
        self.responses = folders.responses(folder, state)
        baselines = state.baselines or {}
        if not own:
            return Start(state.step, baselines=baselines)  # of another run, whose ledger this one does not continue
        self._saved = state.step
        size = self._cluster.world_size // self._config.resilience.cells  # cells are replicas
        of_cell = {policy: ranks[:size] for policy, ranks in results.items()}
        return Start(state.step, state.ledger, of_cell, state.saved, baselines)

    def _require_entry(self, folder: Path, state: ControllerState) -> None:
        """Raise ResumeError where the run's ledger, which is whole, does not have the entry after which the checkpoint
        was written."""
        with contextlib.suppress(LedgerError):  # which is raised when the ledger is continued
            if all(link.hash != state.ledger for link in links(self._config.run_dir)):
                raise ResumeError(
                    f"checkpoint {folder} was written after an entry with hash {state.ledger}, which is not in the "
                    f"ledger of {self._config.run_dir}: one of them belongs to another run or was changed"
                )

    def _of_each(self, make: Callable[[str], Command[R]], step: int, cell: int | None = None) -> dict[str, list[R]]:
        """Send each policy's ranks the command for it. Returns their results by policy."""
        policies = self._config.policies
        return {one: self._cluster.call(make(one), step=step, cell=cell, group=one) for one in policies}

    # --- exporting ---------------------------------------------------------------------------------------------------

    def export(self) -> None:
        """Write the trainer's weights as a Hugging Face checkpoint, by default into the run folder; those of a second
        policy beside it. Raises ExportError where the files cannot be written."""
        first = self._config.checkpoint.export_dir or self._config.run_dir / folders.EXPORT
        for policy in self._config.policies:
            folder = folders.beside(first, policy)
            results = self._cluster.call(ExportModel(str(folder)), step=self._config.run.num_rollout, group=policy)
            if problem := results[0].detail.get("problem"):
                raise ExportError(f"{folder}: {problem}")
        if (name := self._config.checkpoint.exporter) is not None:
            EXPORTERS.resolve(name)(first.absolute(), self._config.run.num_rollout)

    def export_at_end(self, journal: Journal) -> None:
        """Export, and leave a checkpoint where that fails. Raises ExportError."""
        last = self._config.run.num_rollout
        self._settle(journal, wait=True, ends=True)
        try:
            self.export()
        except ExportError as error:
            folder = folders.step_folder(self._config.run_dir, last)
            if folders.newest(self._config.run_dir, up_to=last) != folder:
                try:
                    self.save(last, journal, anyway=True)
                    self.finish(last, journal)
                except (WorkerError, SaveError) as second:
                    raise ExportError(f"{error}; no checkpoint could be written either: {second}") from None
            raise ExportError(f"{error}; nothing is lost: `miles-spmd export {folder} OUT` exports the model") from None


def _of(policy: str, folder: Path | None) -> str:
    """Return the folder of a policy in that of a checkpoint; "" where there is none."""
    return "" if folder is None else str(folder / in_group(policy, ""))
