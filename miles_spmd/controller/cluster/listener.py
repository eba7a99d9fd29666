"""Waiting for ranks: every wait sleeps in poll, has a deadline, and ends early when a rank fails, dies or goes silent.

The router's events update the calls under way and the table of ranks, or become errors. Of several errors the one that
explains the others is raised.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import msgspec

from miles_spmd.controller.cluster import hang
from miles_spmd.controller.cluster.errors import (
    DeadlineError,
    EngineFailedError,
    ProtocolError,
    WorkerError,
    WorkerFailedError,
    WorkerLostError,
    WorkerSilentError,
    WorkerStoppedError,
)
from miles_spmd.controller.cluster.pending_call import PendingCall
from miles_spmd.controller.cluster.rank_table import RankState, RankTable
from miles_spmd.protocol.messages import (
    Completions,
    Failure,
    Heartbeat,
    Held,
    Hello,
    Message,
    Overdue,
    Reply,
    StopNotice,
    WireError,
)
from miles_spmd.protocol.router import Peer, Router
from miles_spmd.types.phase import Phase
from miles_spmd.types.request import Output

START = 0  # id of a reply of ranks that could not start
SEPARATOR = ":"  # between the rollout and the name that a request has in it
CHECK_EVERY = 0.25  # seconds between looks at the clock
MAX_LINES = 32  # of a report on ranks
STACKS_GRACE = 1.5  # seconds past a deadline in which the ranks write their stacks and say where they stand
ASKED_GRACE = 2.0  # seconds in which a signal to stop that is for the run reaches a rank of every cell
CAUSE_GRACE = 0.5  # seconds after a first error in which the event that caused it may still arrive


class Listener:
    """Receives what the ranks send.

    ``calls`` are the commands under way, by id, in the order in which they were sent; a rank executes its own in this
    order. ``last`` is the one that was sent last. A reply to a command that nobody waits for any more is ignored.
    ``outputs`` are those of finished requests, by the rollout that submitted them. ``contain`` is asked about every
    error whether the run goes on, after what is left of it was forgotten (:meth:`forget`).
    """

    def __init__(
        self, router: Router, table: RankTable, heartbeat_timeout: float, config_digest: str, log_dir: Path
    ) -> None:
        self._router, self._table = router, table
        self._heartbeat_timeout, self._config_digest, self._log_dir = heartbeat_timeout, config_digest, log_dir
        self.last: PendingCall[Any] = PendingCall(0, None, [], Phase.START, 0, 0.0, 0.0)
        self.calls: dict[int, PendingCall[Any]] = {}
        self.outputs: dict[str, deque[Output]] = {}
        self.stop_asked: Callable[[str], None] = lambda signal: None
        self.stopping: Callable[[], bool] = lambda: False  # whether the run has been asked to stop
        self.contain: Callable[[WorkerError], bool] = lambda error: False
        self.cell_timeout = math.inf
        self._errors: list[WorkerError] = []
        self._receiving = False
        self._interruption: BaseException | None = None
        self._next_check = 0.0  # monotonic

    def expect(self, call: PendingCall) -> None:
        """Take replies to ``call`` from now on."""
        self.calls[call.id] = call
        if call.kind is not None:
            self.last = call

    def add(self, error: WorkerError) -> None:
        """Take an error that something else has noticed, for the next wait."""
        self._errors.append(error)

    def wait(self, done: Callable[[], bool], call: PendingCall | None = None, seconds: float = math.inf) -> bool:
        """Return True once ``done``, and False after so many ``seconds``. Raises a WorkerError: one that ends the run,
        or that of a rank which could not execute ``call``. Failures of other commands are for those who wait for them.
        """
        until = time.monotonic() + seconds
        while not done():
            # The clock is looked at only when nothing is left to read: a reply that has arrived in time and lies in the
            # queue, because this process was busy, must not count as late.
            if not self._receive(0):
                self._check_time()
                if time.monotonic() > until:
                    return False
                self._receive(CHECK_EVERY)
            self._raise(call)
        return True

    def take_arrived(self) -> None:
        """Handle what has arrived; raises a WorkerError that ends the run."""
        while self._receive(0):
            pass
        self._raise(None)

    def forget(self, ranks: Collection[int]) -> None:
        """Expect nothing more of ``ranks``, and drop their errors; their places are free for others."""
        self._errors = [error for error in self._errors if error.rank not in ranks]
        for call in self.calls.values():
            call.lost = call.lost or any(rank in ranks for rank in call.ranks)
            call.ranks = [rank for rank in call.ranks if rank not in ranks]
            for of_ranks in (call.replies, call.failures, call.overdue, call.held or {}):
                for rank in ranks:
                    of_ranks.pop(rank, None)
        for rank in ranks:
            self._table.states[rank] = RankState()

    def _raise(self, call: PendingCall | None) -> None:
        while self._errors or (call and call.failures) or (self._table.cells > 1 and self._has_failed()):
            cause = self.cause()
            assert cause is not None
            if not self.contain(cause):
                raise cause

    def _has_failed(self) -> bool:
        """Return whether a rank could not execute a command: other cells may wait for it in another one."""
        failures = (failure for call in self.calls.values() for failure in call.failures.values())
        return any(not isinstance(failure, EngineFailedError) for failure in failures)

    def cause(self) -> WorkerError | None:
        """The error that explains the others, if there is an error.

        A dead rank makes others fail in their collectives, and its launcher then stops the rest. So a death without
        announcement comes first, then a stop, then failures, whichever arrived first; the grace gives a death time to
        arrive after the failures that it caused.
        """
        end = time.monotonic() + CAUSE_GRACE
        while self._receive(end - time.monotonic()):
            pass
        stopping = {rank for rank, state in enumerate(self._table.states) if state.stopping}
        deaths = [e for e in self._errors if isinstance(e, WorkerLostError) and e.rank not in stopping]
        stops = [e for e in self._errors if isinstance(e, WorkerStoppedError)]
        failures = [failure for call in self.calls.values() for failure in call.failures.values()]
        return next(iter([*deaths, *stops, *failures, *self._errors]), None)

    def interrupt(self, error: BaseException) -> None:
        """Raise ``error``, for the handler of a signal; where an event is being received, as soon as it is handled. An
        event that was read in part must not be lost, and to block signals in the main thread does not prevent that:
        another thread takes them, and Python then calls the handler in the main thread all the same."""
        if not self._receiving:
            raise error
        self._interruption = error

    def stopped(self, reason: str, rank: int | None = None) -> WorkerStoppedError:
        """The error of a run that is stopped from outside, which ``rank`` has announced."""
        ranks = (rank for cell in self._table.members for rank in self._table.ranks_of(cell))
        absent = ", ".join(str(rank) for rank in ranks if not self._table.states[rank].heard)
        suffix = f"; rank {absent} had not connected" if absent else ""
        return WorkerStoppedError(f"{self.last.place}: {reason}{suffix}", rank=rank)

    def _receive(self, timeout: float) -> bool:
        """Handle one event; returns whether there was one."""
        self._receiving = True
        try:
            event = self._router.receive(timeout)
            if event is not None:
                self._handle(*event)
        finally:
            self._receiving = False
        if self._interruption is not None:
            error, self._interruption = self._interruption, None
            raise error
        return event is not None

    def _check_time(self) -> None:
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + CHECK_EVERY
        for rank, state in enumerate(self._table.states):
            if state.heard and now > state.heard + self._silence(rank):
                text = f"{self._table.name(rank)} is silent: {self._doing(rank)}"
                self._errors.append(WorkerSilentError(text, rank=rank))
            if state.asked and self._table.cells > 1 and not self.stopping():
                at, signal = state.asked
                if now > at + ASKED_GRACE:
                    self._errors.append(self.stopped(f"{self._table.name(rank)} was stopped by {signal}", rank))
        for call in self.calls.values():
            late = [rank for rank in call.ranks if call.awaits(rank)]
            reported = all(rank in call.overdue for rank in late)
            if (hung := call.hung) and now > call.hung_since + STACKS_GRACE:  # in which those that wait for them report
                self._errors.append(DeadlineError(self._overdue(call, hung), rank=hung[0]))
            elif late and now > call.end + (0 if reported else STACKS_GRACE):
                self._errors.append(DeadlineError(self._overdue(call, late), rank=late[0]))

    def _silence(self, rank: int) -> float:
        """Seconds that a rank may be silent. One of several cells is given less time as soon as it is built: imports,
        which may hold the GIL for long, are behind it."""
        built = self._table.states[rank].info is not None and START not in self.calls
        return min(self._heartbeat_timeout, self.cell_timeout if built else math.inf)

    # --- events ------------------------------------------------------------------------------------------------------

    def _handle(self, peer: Peer, message: Message | WireError | None) -> None:
        match message:
            case Hello() | Heartbeat() | StopNotice() | Held() | Overdue() | Reply() | Completions():
                # A rank has two connections, its own and its watchdog's. It may speak for itself alone.
                rank = message.info.rank if isinstance(message, Hello) else message.rank
                own = self._router.rank_of[peer]
                if own == rank:
                    self._table.states[rank].heard = time.monotonic()
                    self._handle_message(rank, peer, message)
                else:
                    self._errors.append(ProtocolError(f"{self._table.name(own)} calls itself rank {rank}", rank=own))
            case None:
                self._handle_loss(peer)
            case _:
                rank, what = self._router.rank_of[peer], f"sent a {type(message).__name__}"
                text = f"{self._table.name(rank)}: {message if isinstance(message, WireError) else what}"
                self._errors.append(ProtocolError(text, rank=rank))

    def _handle_message(
        self, rank: int, peer: Peer, message: Hello | Heartbeat | StopNotice | Held | Overdue | Reply | Completions
    ) -> None:
        state = self._table.states[rank]
        match message:
            case Hello():
                self._handle_hello(rank, peer, message)
            case Heartbeat(phase=Phase.STOP):
                state.stopping = True
                self._errors.append(self.stopped(message.detail, rank))
            case Heartbeat():
                state.heartbeat, state.side = message, peer
            case Held():
                for call in self._awaited(rank):
                    if call.held is not None:
                        call.held[rank] = message
            case StopNotice():
                self._handle_request(rank, message.signal)
            case Overdue():
                for call in self._awaited(rank):
                    call.overdue[rank] = message
                    if message.engine_step:
                        call.hung_since = min(call.hung_since, time.monotonic())
            case Completions():
                self._handle_outputs(message.outputs)
            case Reply():
                self._handle_reply(rank, message)

    def _handle_request(self, rank: int, signal: str) -> None:
        """A signal to stop is one for the run where the run was asked to stop anyway, or where ranks of all cells have
        received it, as at the end of a job. One that a single cell has received is its end: see :meth:`_check_time`."""
        table = self._table
        table.states[rank].asked = time.monotonic(), signal
        asked = {table.cell_of(rank) for rank, state in enumerate(table.states) if state.asked}
        if self.stopping() or asked.issuperset(table.members):
            self.stop_asked(signal)

    def _handle_hello(self, rank: int, peer: Peer, hello: Hello) -> None:
        state, start = self._table.states[rank], self._start_of(rank)
        if state.info is not None or start is None:
            text = f"two processes are rank {rank}: {state.info} and {hello.info}"
            self._errors.append(ProtocolError(text, rank=rank))
        elif hello.config_digest != self._config_digest:
            text = f"rank {rank} ({hello.info.host}) was started with another configuration than rank 0"
            self._errors.append(ProtocolError(text, rank=rank))
        else:
            state.info, state.peer = self._table.among_cells(hello.info), peer
            start.replies[rank] = hello

    def _start_of(self, rank: int) -> PendingCall | None:
        """The start that the rank's Hello is a reply to."""
        return next((call for call in self._awaited(rank) if call.kind is None), None)

    def _handle_outputs(self, outputs: Sequence[Output]) -> None:
        """An output of a rollout that was left is nobody's."""
        for output in outputs:
            rollout, _, rid = output.rid.partition(SEPARATOR)
            if (queue := self.outputs.get(rollout)) is not None:
                queue.append(msgspec.structs.replace(output, rid=rid))

    def _handle_reply(self, rank: int, reply: Reply) -> None:
        name, call = self._table.name(rank), self.calls.get(reply.id) if reply.id != START else self._start_of(rank)
        if reply.id > self.last.id:
            text = f"{name} replied to command {reply.id}, which was not sent yet"
            self._errors.append(ProtocolError(text, rank=rank))
        elif call is None or not call.awaits(rank):
            return  # late
        elif isinstance(failure := reply.result, Failure):
            text = f"rank {rank} ({reply.host}), {call.place}: {failure.kind}: {failure.message}"
            kind = EngineFailedError if failure.engine else WorkerFailedError
            call.failures[rank] = kind(text, failure.traceback, rank)
        elif call.kind is None:
            self._errors.append(ProtocolError(f"{name} replied to its start", rank=rank))
        elif not isinstance(reply.result, call.result_types):
            kinds = f"{type(reply.result).__name__} instead of {call.kind.result_type().__name__}"
            self._errors.append(ProtocolError(f"{name} replied to {call.kind.__name__} with {kinds}", rank=rank))
        else:
            call.replies[rank] = reply

    def _handle_loss(self, peer: Peer) -> None:
        """A closed connection is a death, except for a rank that leaves after a Stop command. Different threads of
        libzmq read its two connections, so the end of its watchdog's may be seen before its last reply."""
        rank = self._router.rank_of[peer]
        leaves = rank in self.last.replies or peer != self._table.states[rank].peer
        if self.last.phase is not Phase.STOP or not leaves:
            self._errors.append(WorkerLostError(f"{self._table.name(rank)} died: {self._doing(rank)}", rank=rank))

    def _awaited(self, rank: int) -> list[PendingCall]:
        """The commands that this rank has to reply to, in the order in which they were sent."""
        return [call for call in self.calls.values() if call.awaits(rank)]

    # --- descriptions ------------------------------------------------------------------------------------------------

    def _doing(self, rank: int) -> str:
        """What a rank is to do, and the position that its last heartbeat reported."""
        state, busy = self._table.states[rank], self._awaited(rank)
        doing = busy[0].place if busy else f"idle after {self.last.place}"
        if not state.heard:
            return f"{doing}, never connected"
        detail = f", {state.heartbeat.detail}" if state.heartbeat and state.heartbeat.detail and busy else ""
        return f"{doing}{detail}, last heard {time.monotonic() - state.heard:.1f} s ago"

    def _overdue(self, call: PendingCall, late: Sequence[int]) -> str:
        names, limit = ", ".join(map(str, late)), call.overdue[late[0]].engine_step if call.hung else 0.0
        what = f"the engine of rank {names} did not return from a step within {limit:g} s"
        lines = [f"{call.place}: {what if limit else f'rank {names} did not reply within {call.seconds:g} s'}"]
        lines += [f"  {line}" for line in hang.describe(call.overdue, late, self._doing)]
        lines += [f"  {self._table.name(rank)}: {self._doing(rank)}" for rank in late[:MAX_LINES]]
        return "\n".join([*lines, f"  stacks: {self._log_dir}/rank-*.stacks"])
