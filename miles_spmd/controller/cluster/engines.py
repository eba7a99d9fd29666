"""The engines of one group while rollouts are open on them, and what becomes of these when an engine fails."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from miles_spmd.controller.cluster.errors import EngineFailedError
from miles_spmd.controller.cluster.listener import Listener
from miles_spmd.controller.cluster.pending_call import PendingCall
from miles_spmd.controller.cluster.rank_table import RankTable
from miles_spmd.controller.cluster.rollout_session import RolloutSession
from miles_spmd.protocol.commands import Command, EndGenerate, Generate, Receivers, RefitEngine, ReplaceEngines
from miles_spmd.protocol.results import Ok
from miles_spmd.types.request import Output

if TYPE_CHECKING:
    from miles_spmd.controller.cluster.cluster import Cluster

ALIKE_SECONDS = 10.0  # in which the ranks of an engine fail if they fail alike


class Engines:
    """The engines of the group ``name``, which serve the same model."""

    def __init__(self, cluster: Cluster, table: RankTable, listener: Listener, name: str) -> None:
        self.name = name
        self.replacements = 0  # how often in a rollout they may be replaced after one has failed
        self.version = 0  # of the weights that trainers gave them last
        self._cluster, self._table, self._listener = cluster, table, listener
        self._generating: PendingCall[Ok] | None = None  # while they serve at least one rollout
        self._sessions: dict[str, RolloutSession] = {}  # the open rollouts, by name
        self._replaced = 0  # times that they were replaced since a rollout began with none open

    @property
    def may_be_replaced(self) -> bool:
        return self._replaced < self.replacements

    @property
    def leaders(self) -> list[int]:
        """The first rank of each."""
        return self._table.receivers(Receivers.LEADERS, group=self.name)

    @property
    def cache_tokens(self) -> dict[int, int | None]:
        """By leader, how many tokens' keys and values its engine holds; None: not known, or nothing stays between
        requests."""
        engines = {info.rank: info.engine for info in self._table.infos if info.engine is not None}
        return {leader: engines[leader].cache_tokens for leader in self.leaders}

    # --- rollouts ----------------------------------------------------------------------------------------------------

    @contextmanager
    def rollout(self, step: int, *, purpose: str = "", endless: bool = False) -> Iterator[RolloutSession]:
        """Open a rollout on all engines of the group: see :meth:`Cluster.rollout`."""
        if self._generating is None:
            self._replaced = 0
            self._open(step, purpose, endless)
        name = self._cluster.name_rollout()
        self._listener.outputs[name] = deque()
        session = self._sessions[name] = RolloutSession(self, name, self.leaders)
        yield session
        session.abort()
        del self._listener.outputs[name], self._sessions[name]
        if not self._sessions:
            self._close()

    def leave(self, ranks: Collection[int]) -> None:
        """Let other engines generate what those of ``ranks`` had not finished."""
        for session in self._sessions.values():
            session.leave(ranks)

    def _open(self, step: int, purpose: str, endless: bool) -> None:
        with self._cluster.doing(purpose):
            self._generating = self._cluster.begin(Generate(), step=step, group=self.name, endless=endless)

    def _close(self) -> None:
        """Wait until all engines are idle."""
        assert self._generating is not None
        try:
            self.feed(EndGenerate(), self.leaders)
            self._cluster.wait(self._generating)
        except EngineFailedError as error:
            self._replace(error)
        self._generating = None

    def feed(self, command: Command, ranks: Sequence[int]) -> None:
        """Send a command to engines that generate."""
        assert self._generating is not None
        self._cluster.send(command, ranks, self._generating)

    def next_output(self, rollout: str, interrupt: Callable[[], bool] = lambda: False) -> Output | None:
        """Return the next finished request of an open rollout; None once ``interrupt`` returns True, which is called
        several times a second."""
        outputs = self._listener.outputs[rollout]
        while not outputs:
            try:
                self._listener.wait(lambda: bool(outputs) or interrupt(), self._generating)
                break
            except EngineFailedError as error:
                self._replace(error)
        return outputs.popleft() if outputs else None

    def finished(self, rollout: str) -> set[str]:
        """The requests of an open rollout that have finished and were not taken yet."""
        return {output.rid for output in self._listener.outputs[rollout]}

    # --- after a failure ---------------------------------------------------------------------------------------------

    @property
    def failed(self) -> bool:
        """Whether an engine has failed, which the next call of :meth:`repair` handles."""
        return self._generating is not None and bool(self._generating.failures)

    def repair(self) -> None:
        """Replace the engines, where one has failed while others were waited for. Raises a WorkerError where that is
        not possible."""
        try:
            self._listener.wait(lambda: not self.failed, self._generating)
        except EngineFailedError as error:
            self._replace(error)

    def _replace(self, error: EngineFailedError) -> None:
        """Build all engines anew after one has failed, and submit again what was running. Raises ``error`` where that
        is not possible. A response is a function of its request and the weights, so none becomes another one."""
        call = self._generating
        assert call is not None
        if not self.may_be_replaced:
            if self._cluster.cells.contain(error):
                return
            raise error
        for failure in call.failures.values():
            if not isinstance(failure, EngineFailedError):
                raise failure
        self._replaced += 1
        failed = {self._table.engine_of(rank) for rank in call.failures}
        alike = [rank for rank in call.ranks if self._table.engine_of(rank) in failed]
        # where one rank of an engine has failed alone, the others wait for it in a collective, and cannot be replaced
        if not self._listener.wait(lambda: all(rank in call.failures for rank in alike), seconds=ALIKE_SECONDS):
            raise error
        self.feed(EndGenerate(), [rank for rank in self.leaders if rank not in call.failures])
        self._listener.wait(lambda: call.over)  # the other engines finish what they have
        del self._listener.calls[call.id]
        again = sum(map(len, (session.unfinished for session in self._sessions.values())))
        self._cluster.show(f"{error}; the engines are replaced, and {again} requests generated again")
        with self._cluster.doing("new engines after one has failed"):
            self._cluster.call(ReplaceEngines(), step=call.step, group=self.name)
            if self._table.receivers(Receivers.TRAINERS, group=self.name):  # else they have loaded their checkpoint
                self._cluster.call(RefitEngine(self.version), step=call.step, group=self.name)
        if self._sessions:
            self._open(call.step, call.purpose, math.isinf(call.seconds))
            for session in self._sessions.values():
                session.submit_again()
