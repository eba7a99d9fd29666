"""The controller's view of all ranks: a command to the ranks that it concerns and a typed result from each, or one
error that names rank, host, phase and cause; and the engines while a rollout is open.

The ranks of a run may be divided into cells, each of which is a whole replica. What a rank of a cell could not do then
ends its cell and not the run, as long as another one is left: see :mod:`miles_spmd.controller.cluster.cells`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from miles_spmd.config import DeadlinesConfig
from miles_spmd.controller.cluster.cells import Cells
from miles_spmd.controller.cluster.engines import Engines
from miles_spmd.controller.cluster.errors import EngineFailedError, Unfinished, WorkerError
from miles_spmd.controller.cluster.listener import Listener
from miles_spmd.controller.cluster.pending_call import PendingCall
from miles_spmd.controller.cluster.rank_table import RankTable
from miles_spmd.controller.cluster.rollout_session import RolloutSession
from miles_spmd.protocol.commands import (
    Command,
    RefitEngine,
    Stop,
    TrainStep,
)
from miles_spmd.protocol.last_words import warn
from miles_spmd.protocol.messages import Call, Held, HoldPasses, OwnWork, RankInfo, ReleasePasses, Reply, TrainerRank
from miles_spmd.protocol.results import Abandoned, Result, TrainResult
from miles_spmd.protocol.router import PeerGoneError, Router
from miles_spmd.types.engine_group import JUDGE, POLICY, SECOND_POLICY
from miles_spmd.types.gpu_health import GpuHealth
from miles_spmd.types.phase import Phase

R = TypeVar("R", bound=Result)


class Cluster:
    """All ranks of a run behind ``router``, in ``cells`` cells of equally many.

    Several commands may be under way: :meth:`begin` sends one, and :meth:`wait` waits for its results. A rank executes
    its own one after another. ``seconds`` holds, by rank, the time of each part of the command that was waited for
    last; it is empty for ranks that did not receive it.
    """

    def __init__(
        self,
        router: Router,
        world_size: int,
        deadlines: DeadlinesConfig,
        config_digest: str,
        log_dir: Path,
        cells: int = 1,
    ) -> None:
        self.seconds: list[dict[str, float]] = [{} for _ in range(world_size)]
        self._memory: dict[str, float] = {}
        self._own: dict[tuple[Phase, int], OwnWork] = {}
        self._gpus: list[tuple[str, GpuHealth]] = []
        self._router, self._deadlines = router, deadlines
        self._table = RankTable(world_size, cells)
        self._listener = Listener(router, self._table, deadlines.heartbeat_timeout, config_digest, log_dir)
        self._ids, self._rollouts = itertools.count(), itertools.count()
        self._purpose = ""
        self._ready = False
        self.abandons: Callable[[], bool] = lambda: False  # whether a command that can be left has to be left now
        self.pipelined = False  # ranks that are pipeline stages cannot leave a command that they have begun
        self.show: Callable[[str], None] = warn
        self.cells = Cells(self, router, self._table, self._listener)
        self.engines = {
            name: Engines(self, self._table, self._listener, name) for name in (POLICY, SECOND_POLICY, JUDGE)
        }
        self._listener.contain = self._contain
        self._start = self._expect(None, range(world_size), Phase.START, 0)

    # --- for the loop ------------------------------------------------------------------------------------------------

    def wait_ready(self) -> None:
        """Wait until every rank has built its parts. ``seconds`` then holds the times of the start."""
        if not self._ready:
            self._finish(self._start)
            self._ready = True

    @property
    def is_ready(self) -> bool:
        """Whether the ranks with which the run begins are built."""
        return self._ready

    @property
    def world_size(self) -> int:
        """The number of ranks that the run is planned for."""
        return len(self._table.states)

    @property
    def infos(self) -> list[RankInfo]:
        """All ranks that take part, by rank; waits for them the first time."""
        self.wait_ready()
        return self._table.infos

    @property
    def first_cell(self) -> int:
        """The cell that executes what one cell does for all: the first of those that take part."""
        return self._table.members[0]

    @property
    def address(self) -> str:
        """Where the controller listens for the ranks: this machine's address in the network of the job."""
        return self._router.address

    @property
    def pids(self) -> dict[int, int]:
        """The processes of the ranks that have connected, by rank."""
        return {info.rank: info.pid for info in self._table.infos}

    def trainers(self, group: str = POLICY) -> list[TrainerRank]:
        """Return the ranks that train the policy of ``group``, by rank, as if all cells that the run is planned for
        were one world."""
        own = [info.trainer for info in self.infos if info.trainer is not None and info.group == group]
        own = own[: self.world_size // self._table.cells]
        size = own[0].data_parallel_size
        return [
            msgspec.structs.replace(
                rank,
                data_parallel_rank=cell * size + rank.data_parallel_rank,
                data_parallel_size=self._table.cells * size,
            )
            for cell in range(self._table.cells)
            for rank in own
        ]

    def call(
        self, command: Command[R] | Sequence[Command[R]], *, step: int, cell: int | None = None, group: str = POLICY
    ) -> list[R]:
        """Send ``command`` and wait for its results. Of a command that one cell executes for all they come from
        another, where that cell is lost; of one for a ``cell`` that is lost there are none."""
        call = self.begin(command, step=step, cell=cell, group=group)
        results = self.wait(call)
        while call.lost and not results and (cell is None or (call.kind is not None and call.kind.by_one_cell)):
            call = self.begin(command, step=step)
            results = self.wait(call)
        return results

    def begin(
        self,
        command: Command[R] | Sequence[Command[R]],
        *,
        step: int,
        cell: int | None = None,
        group: str = POLICY,
        endless: bool = False,
    ) -> PendingCall[R]:
        """Send ``command`` (a sequence: one per rank) to its receivers in the engine group ``group`` (of ``cell``,
        where it is given), who execute it after those that they have already. ``endless``: it has no deadline. Raises a
        WorkerError, and Unfinished where it may be left and the run has to stop."""
        first = command[0] if isinstance(command, Sequence) else command
        self.wait_ready()
        if first.abandonable and self.abandons():
            raise Unfinished
        if cell is None and first.by_one_cell:
            cell = self.first_cell
        ranks = self._table.receivers(first.receivers, *([] if cell is None else [cell]), group=group)
        commands = command if isinstance(command, Sequence) else [command] * len(ranks)
        if len(commands) != len(ranks):
            raise ValueError(f"{len(commands)} commands for {len(ranks)} ranks")
        call: PendingCall[R] = self._expect(type(first), ranks, first.phase, step, math.inf if endless else None)
        call.lost = not ranks and cell is not None
        if isinstance(first, RefitEngine):
            self.engines[group].version = first.version
        # Ranks that receive the same object (those of one data-parallel rank) receive the same bytes, encoded once.
        same: dict[int, tuple[Command, list[int]]] = {}
        for rank, own in zip(ranks, commands):
            same.setdefault(id(own), (own, []))[1].append(rank)
        for own, receivers in same.values():
            self.send(own, receivers, call)
        return call

    def wait(self, call: PendingCall[R]) -> list[R]:
        """Return the results of a command by rank, within the deadline of its phase, without those of cells that were
        lost. Raises a WorkerError."""
        return cast(list[R], self._finish(call))

    def share(self, commands: Sequence[Command[R]], *, step: int, group: str = POLICY) -> list[R]:
        """Send ``commands``, one for each of :meth:`trainers`, and return their results. Each cell executes those of a
        part of them, and those of a cell that is lost."""
        if self._table.cells == 1:
            return self.call(commands, step=step, group=group)
        return self.cells.share(commands, step)

    def train(self, commands: Sequence[TrainStep], *, step: int, group: str = POLICY) -> list[TrainResult]:
        """Make one optimizer step, of which ``commands`` give each of :meth:`trainers` its share."""
        if self._table.cells == 1:
            return self.call(commands, step=step, group=group)
        return self.cells.train(commands, step)

    def rollout(
        self, step: int, *, purpose: str = "", group: str = POLICY, endless: bool = False
    ) -> AbstractContextManager[RolloutSession]:
        """Open a rollout on all engines of ``group``; leaving the block aborts what is still running of it. Errors name
        its ``purpose``, where it has one other than training. Several may be open; the last that is left is waited for
        until all engines are idle. ``endless``: those that are opened with it have no deadline.

        After an error in the block the rollout stays open: to close it is a wait of its own, for engines that may be
        the cause of the error, and would delay the message that ends the run.
        """
        return self.engines[group].rollout(step, purpose=purpose, endless=endless)

    def name_rollout(self) -> str:
        """Return a name that no other rollout of the run has."""
        return str(next(self._rollouts))

    @contextmanager
    def doing(self, purpose: str) -> Iterator[None]:
        """Errors of the commands in the block name their ``purpose``."""
        self._purpose = purpose
        try:
            yield
        finally:
            self._purpose = ""

    def take_memory(self) -> dict[str, float]:
        """Return the metrics ``memory/...`` of the commands since the last call, each the maximum over ranks."""
        taken, self._memory = self._memory, {}
        return taken

    def take_own(self) -> dict[tuple[Phase, int], OwnWork]:
        """Return the own work of every rank by phase, summed over the commands since the last call."""
        taken, self._own = self._own, {}
        return taken

    def take_gpus(self) -> list[tuple[str, GpuHealth]]:
        """Return what ranks have read of their GPUs' health since the last call, with the host of each."""
        taken, self._gpus = self._gpus, []
        return taken

    def stop(self, status: int = 0) -> None:
        """Let every rank leave its command loop and exit with ``status``."""
        self.call(Stop(status), step=self._listener.last.step)

    def pass_requests(self, ask: Callable[[str], None], stopping: Callable[[], bool]) -> None:
        """Call ``ask`` with the name of every signal to stop that is for the run, of those that ranks receive.
        ``stopping``: whether it has been asked to stop."""
        self._listener.stop_asked, self._listener.stopping = ask, stopping

    def lose(self, rank: int | None, lost: Callable[[], None] = lambda: None) -> None:
        """Drop the next message to ``rank``, and call ``lost`` then; None: drop no more."""

        def loses(receiver: int) -> bool:
            if receiver != rank:
                return False
            self.lose(None)
            lost()
            return True

        self._router.loses = loses

    # --- for cells ---------------------------------------------------------------------------------------------------

    def _contain(self, error: WorkerError) -> bool:
        if isinstance(error, EngineFailedError) and self.engines[POLICY].may_be_replaced:
            return False  # new engines may be enough
        return self.cells.contain(error)

    def expect_start(self, ranks: Sequence[int], after: float) -> PendingCall[Any]:
        """Return the start of ``ranks``, which begins ``after`` so many seconds."""
        return self._expect(None, ranks, Phase.START, self._listener.last.step, after=after)

    def leave(self, ranks: Collection[int]) -> None:
        """Let other engines generate what those of ``ranks`` had not finished."""
        self.engines[POLICY].leave(ranks)

    # --- for the end of the run --------------------------------------------------------------------------------------

    @property
    def place(self) -> str:
        """Phase and step of the last command, for messages."""
        return self._listener.last.place

    def interrupt(self, error: BaseException) -> None:
        """Raise ``error``, for the handler of a signal, now or as soon as no event from a rank is lost by it."""
        self._listener.interrupt(error)

    def explain(self, reason: str) -> WorkerError:
        """The reason why the run ends after the controller was told to stop for ``reason``: an error of a rank, if
        there is one, explains more."""
        return self._listener.cause() or self._listener.stopped(reason)

    # --- one command -------------------------------------------------------------------------------------------------

    def _expect(
        self,
        kind: type[Command] | None,
        ranks: Sequence[int],
        phase: Phase,
        step: int,
        seconds: float | None = None,
        after: float = 0.0,
    ) -> PendingCall[Any]:
        """``seconds``: in place of the deadline of its phase."""
        seconds = getattr(self._deadlines, phase.deadline) if seconds is None else seconds
        end = time.monotonic() + seconds + after
        call = PendingCall[Any](next(self._ids), kind, [*ranks], phase, step, seconds, end, purpose=self._purpose)
        self._listener.expect(call)
        return call

    def send(self, command: Command, ranks: Sequence[int], call: PendingCall) -> None:
        """Send a command as part of ``call``. Raises a WorkerError when a rank is gone."""
        message = Call(call.id, call.step, max(0.0, call.end - time.monotonic()), command)
        try:
            self._router.send(message, [peer for rank in ranks if (peer := self._table.states[rank].peer)])
        except PeerGoneError as error:
            if self._table.cells == 1:  # else only a cell is lost, which the listener will see
                raise self._listener.cause() or WorkerError(f"{call.place}: {error}") from None

    def _finish(self, call: PendingCall) -> list[Result]:
        """Wait for all replies and return their results by rank."""
        may_leave = call.kind is not None and call.kind.abandonable and not self.pipelined
        self._listener.wait(lambda: call.done or (may_leave and self.abandons()), call)
        if not call.done:
            self._abandon(call)
            self._listener.wait(lambda: call.done, call)
        self._listener.calls.pop(call.id, None)
        self.seconds = [{} for _ in self.seconds]
        for rank, reply in call.replies.items():
            self.seconds[rank] = reply.seconds
            for name, value in reply.memory.items():
                self._memory[name] = max(self._memory.get(name, 0.0), value)
            if isinstance(reply, Reply):
                self._gpus += [(reply.host, gpu) for gpu in reply.gpus]
            if isinstance(reply, Reply) and (own := reply.own) is not None:
                before = self._own.get((call.phase, rank), OwnWork(0.0, 0.0))
                total = OwnWork(before.seconds + own.seconds, before.amount + own.amount)
                self._own[call.phase, rank] = total
        replies = [call.replies[rank] for rank in call.ranks]
        if any(isinstance(reply, Reply) and isinstance(reply.result, Abandoned) for reply in replies):
            raise Unfinished
        return [cast(Result, reply.result) for reply in replies if isinstance(reply, Reply)]

    def _abandon(self, call: PendingCall) -> None:
        """Let the ranks leave the command under way before the same forward pass, unless one of them has begun the last
        one: then it is almost complete. See :mod:`miles_spmd.training.passes`."""
        held: dict[int, Held] = {}
        call.held = held
        sides = [side for rank in call.ranks if (side := self._table.states[rank].side)]
        if len(sides) < len(call.ranks):
            return
        self._router.send(HoldPasses(), sides)
        self._listener.wait(lambda: all(rank in held or rank in call.replies for rank in call.ranks), call)
        limit = max(one.begun for one in held.values()) if len(held) == len(call.ranks) else None
        if limit is not None and any(one.total is not None and limit >= one.total for one in held.values()):
            limit = None
        self._router.send(ReleasePasses(limit), sides)

    def wake(self) -> None:
        """Let the wait under way look at its condition now. Any thread may call this."""
        self._router.wake()
