"""The cells that the ranks of a run are divided into, where they are: what is shared between them, what becomes of one
that is lost, and how it comes back.

Every cell is a whole replica: the same weights, an engine or several. A batch is cut into as many parts as cells are
planned, always in the same way; which cell computes a part has no influence on its bits. So whatever a lost cell was
doing is done by the others, and the run is the one in which nothing happened.

A cell that is lost is started again, and takes part from the beginning of a step on, after it has caught up with the
others and its engines have their weights.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from miles_spmd.config.resilience import ResilienceConfig
from miles_spmd.controller.cluster.errors import Unfinished, WorkerError, WorkerLostError
from miles_spmd.controller.cluster.listener import Listener
from miles_spmd.controller.cluster.pending_call import PendingCall
from miles_spmd.controller.cluster.rank_table import RankTable
from miles_spmd.protocol.commands import Command, ComputePart, MakeUpdate, MeetCells, TrainStep
from miles_spmd.protocol.last_words import warn
from miles_spmd.protocol.pipe import CellEnded, PrepareCell, StartCell, ToSupervisor
from miles_spmd.protocol.results import PartResult, Result, TrainResult, UpdateResult
from miles_spmd.protocol.router import Router

if TYPE_CHECKING:
    from miles_spmd.controller.cluster.cluster import Cluster

R = TypeVar("R", bound=Result)
C = TypeVar("C", bound=Command)

LATE_SECONDS = 1.0  # after the replies of the others, in which that of a cell comes which has met them
UPDATE_SECONDS = 5.0  # after the first reply to an update, in which the others come
MEETINGS = 5  # in which a cell that is ready has to be seen
ATTEMPTS = 10  # of one update
IN_VAIN = 3  # of them in a row, by the same cells, after which one of these is lost
# seconds before the start after one by which the cell has not come to take part; each pause is four times the last one
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 300.0
LASTING = 600.0  # seconds after which a cell that has taken part is no longer one that keeps failing


@dataclass
class _History:
    """The starts of a cell; ``in_a_row``: those since it last took part for long, ``in_vain``: since it last took part.
    ``joined``: when it did (monotonic). ``hosts``: those on which it was built last."""

    starts: int = 1
    in_a_row: int = 0
    in_vain: int = 0
    joined: float = 0.0
    hosts: str = ""


class Cells:
    """The cells of ``table``, of which there may be one."""

    def __init__(self, cluster: Cluster, router: Router, table: RankTable, listener: Listener) -> None:
        self._cluster, self._router, self._table, self._listener = cluster, router, table, listener
        self._histories = [_History() for _ in range(table.cells)]
        self._starting: dict[int, PendingCall] = {}
        self._behind: set[int] = set()  # members whose state is not that of the others
        self._holders: dict[int, int] = {}  # by part of the last batch, the cell that has computed it
        self._updates = itertools.count()
        self._limit = 0  # how often in a row a cell is started again
        self._order: Callable[[ToSupervisor], None] = lambda order: None
        self.show: Callable[[str], None] = warn

    def configure(self, settings: ResilienceConfig, order: Callable[[ToSupervisor], None]) -> None:
        """``order`` reaches the supervisor."""
        self._limit, self._order = settings.cell_restarts, order
        if self._table.cells > 1:
            self._listener.cell_timeout = settings.cell_timeout

    def metrics(self) -> dict[str, float]:
        """Return how many cells take part, where there are several."""
        return {"perf/cells": float(len(self._table.members))} if self._table.cells > 1 else {}

    # --- what is shared ----------------------------------------------------------------------------------------------

    def share(self, commands: Sequence[Command[R]], step: int) -> list[R]:
        """Let every part of ``commands`` be executed by a cell; return all results. A part is what as many ranks as a
        cell has execute."""
        done = self._execute(self._divide(commands), step)
        return [result for part in sorted(done) for result in done[part]]

    def train(self, commands: Sequence[TrainStep], step: int) -> list[TrainResult]:
        """Make one update on a batch that ``commands`` divide; return the results of its parts. The digests are those
        of one cell, as the others' are the same."""
        number, same = next(self._updates), dict[tuple[int, int], ComputePart]()
        parts: dict[int, Sequence[ComputePart]] = {}
        for part, of_ranks in self._divide(commands).items():
            for command in of_ranks:  # what several ranks receive stays one object
                own = ComputePart(number, part, command.micro_batches, command.role)
                same.setdefault((part, id(command)), own)
            parts[part] = [same[part, id(command)] for command in of_ranks]
        done, lost, in_vain = self._execute(parts, step), "", 0
        for _ in range(ATTEMPTS):
            members = self._table.members
            found = self._together(MakeUpdate(number, commands[0].role), step)
            made = {cell: of_ranks for cell, of_ranks in found.items() if not any(one.lost for one in of_ranks)}
            if made:
                self._behind |= found.keys() - made.keys()
                if self._behind:
                    self.meet(step)
                return _results(done, next(iter(made.values())))
            replies = [one for of_ranks in found.values() for one in of_ranks]
            lost = next((one.lost for one in replies), lost)
            missing = {part for one in replies for part in one.missing}
            in_vain = in_vain + 1 if members == self._table.members and not missing else 0
            if in_vain == IN_VAIN and len(members) > 1:  # they reach the controller, and not each other
                newest = max(members, key=lambda cell: (self._histories[cell].joined, cell))
                self.lose(newest, f"train, step {step}: cells have failed {in_vain} times to make an update: {lost}")
            missing |= {part for one in replies for part in one.overwritten}
            missing |= {part for part, cell in self._holders.items() if cell not in self._table.members}
            self._execute({part: parts[part] for part in sorted(missing)}, step)
        raise WorkerError(f"train, step {step}: cells have failed {ATTEMPTS} times to make an update together: {lost}")

    def _divide(self, commands: Sequence[C]) -> dict[int, Sequence[C]]:
        size = len(commands) // self._table.cells
        return {part: commands[part * size : (part + 1) * size] for part in range(self._table.cells)}

    def _execute(self, parts: Mapping[int, Sequence[Command[R]]], step: int) -> dict[int, list[R]]:
        """Let each of ``parts`` be executed by a cell, and return its results."""
        left, done = dict(parts), dict[int, list[R]]()
        while left:
            members, calls = self._table.members, dict[int, PendingCall[R]]()
            try:
                for number, part in enumerate(left):
                    cell = part if part in members else members[number % len(members)]
                    calls[part] = self._cluster.begin(left[part], step=step, cell=cell)
                    self._holders[part] = cell
                for part, call in calls.items():
                    results = self._cluster.wait(call)
                    if not call.lost:
                        done[part] = results
                        del left[part]
            except Unfinished:  # the other cells leave what they do, too
                for call in calls.values():
                    with contextlib.suppress(Unfinished):
                        self._cluster.wait(call)
                raise
        return done

    def _on_all(self, command: Command[R], step: int, cells: Collection[int] | None = None) -> dict[int, list[R]]:
        """Let every cell that takes part execute ``command``, or each of ``cells``. Return the results of those that
        are not lost, by cell."""
        of_cells = [*self._table.members] if cells is None else cells
        calls = {cell: self._cluster.begin(command, step=step, cell=cell) for cell in of_cells}
        found = {cell: self._cluster.wait(call) for cell, call in calls.items()}
        return {cell: results for cell, results in found.items() if not calls[cell].lost}

    def _together(self, command: Command[R], step: int) -> dict[int, list[R]]:
        """As :meth:`_on_all`, for a command in which cells meet. A cell that was too late for the others waits for
        them, and they would never come: all of them meet once more then."""
        members = [*self._table.members]
        calls = {cell: self._cluster.begin(command, step=step, cell=cell) for cell in members}
        self._listener.wait(lambda: any(call.done and not call.lost for call in calls.values()))
        if not self._listener.wait(lambda: all(call.done for call in calls.values()), seconds=UPDATE_SECONDS):
            self.meet(step, [cell for cell, call in calls.items() if not call.done])
        found = {cell: self._cluster.wait(call) for cell, call in calls.items()}
        return {cell: results for cell, results in found.items() if not calls[cell].lost}

    # --- who takes part ----------------------------------------------------------------------------------------------

    def found(self, step: int) -> None:
        """Let the cells with which the run begins meet, before ``step``. Raises WorkerError where they cannot."""
        for results in self._together(MeetCells(founds=True), step).values():
            if problem := next((one.problem for one in results if one.problem), ""):
                raise WorkerError(f"start: the cells cannot meet: {problem}")
        for cell in self._table.members:
            self._joined(cell)

    def admit(self, step: int) -> list[int]:
        """Let cells that were started again and are built take part from ``step`` on. Return them; their engines have
        no weights."""
        self._listener.take_arrived()
        ready = [cell for cell, call in self._starting.items() if call.done]
        if not ready and not self._behind:
            return []
        joined = [cell for cell in self.meet(step, ready) if cell in ready]
        for cell in joined:
            self._listener.calls.pop(self._starting.pop(cell).id, None)
            self._joined(cell)
            self.show(f"step {step}: cell {cell} takes part again")
        return joined

    def _joined(self, cell: int) -> None:
        history = self._histories[cell]
        history.joined = time.monotonic()
        self._order(PrepareCell(cell, history.starts))

    def meet(self, step: int, ready: Sequence[int] = ()) -> list[int]:
        """Let cells that are behind, and those that are ``ready``, catch up with the others; return them. One that
        does not in time is lost. Members may be among ``ready``.

        Cells meet that ask at the same time. Those that are behind are asked first, and wait; where the others met
        without them they meet once more.
        """
        late, caught_up = {*ready, *self._behind}, list[int]()
        calls = {cell: self._cluster.begin(MeetCells(), step=step, cell=cell) for cell in late}
        for _ in range(MEETINGS):
            self._on_all(MeetCells(), step, [cell for cell in self._table.members if cell not in late])
            end = time.monotonic() + LATE_SECONDS
            for cell in [*late]:
                call = calls[cell]
                if not self._comes(call, end):
                    continue
                results = self._cluster.wait(call)
                if not call.lost and any(one.problem for one in results):
                    calls[cell] = self._cluster.begin(MeetCells(), step=step, cell=cell)
                    continue
                late.discard(cell)
                self._behind.discard(cell)
                if not call.lost:
                    caught_up.append(cell)
                    if cell not in self._table.members:
                        self._table.members = sorted([*self._table.members, cell])
            if not late:
                break
        for cell in late:
            self.lose(cell, f"cell {cell} could not catch up with the others")
        return caught_up

    def _comes(self, call: PendingCall, end: float) -> bool:
        """Return whether all replies to ``call`` come before the monotonic time ``end``."""
        return self._listener.wait(lambda: call.done, call, max(0.0, end - time.monotonic()))

    def contain(self, error: WorkerError) -> bool:
        """Return whether the run goes on after ``error``, without the cell that it comes from."""
        table = self._table
        if table.cells == 1 or error.rank is None or not self._cluster.is_ready:
            return False
        cell = table.cell_of(error.rank)
        if table.members == [cell]:
            return False
        self.lose(cell, str(error))
        return True

    def lose(self, cell: int, why: str) -> None:
        """Go on without ``cell``, and have it started again."""
        ranks, history, now = self._table.ranks_of(cell), self._histories[cell], time.monotonic()
        history.hosts = ", ".join(sorted({info.host for info in self._table.infos_of(cell)})) or history.hosts
        history.in_vain += 1
        if cell in self._table.members:
            self._table.members = [one for one in self._table.members if one != cell]
            history.in_vain = 0
            if now > history.joined + LASTING:
                history.in_a_row = 0
        self._behind.discard(cell)
        if (start := self._starting.pop(cell, None)) is not None:
            self._listener.calls.pop(start.id, None)
        self._listener.forget(ranks)
        self._router.renew(ranks)
        self._cluster.leave(ranks)
        start_number, pause = history.starts, 0.0
        if history.in_vain:
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 4 ** (history.in_vain - 1))
        history.starts, history.in_a_row = history.starts + 1, history.in_a_row + 1
        if history.in_a_row > self._limit:
            self.show(
                f"{why}; cell {cell} ({history.hosts}) has failed {history.in_a_row} times in a row and stays away"
            )
            self._order(StartCell(cell, start_number, 0.0, []))
            return
        self.show(f"{why}; the run goes on without cell {cell} ({history.hosts}), which is started again")
        self._starting[cell] = self._cluster.expect_start(ranks, pause)
        self._order(StartCell(cell, start_number, pause, [self._router.credentials[rank] for rank in ranks]))

    def ended(self, ended: CellEnded) -> None:
        """The launcher of a cell has ended, of which nothing follows where that start counts as lost already. May be
        called by any thread."""
        if self._histories[ended.cell].starts == ended.start + 1:
            rank = self._table.ranks_of(ended.cell)[0]
            self._listener.add(WorkerLostError(f"cell {ended.cell} has ended: {ended.how}", rank=rank))


def _results(done: Mapping[int, list[PartResult]], of_ranks: Sequence[UpdateResult]) -> list[TrainResult]:
    """Return the results of all parts, with what the ranks of one cell say about the update."""
    return [
        TrainResult(own.sums, one.grad_norm, one.lr, one.skipped, own.log_probs, None if part else one.digests)
        for part, of_part in sorted(done.items())
        for own, one in zip(of_part, of_ranks, strict=True)
    ]
