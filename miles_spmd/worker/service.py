"""What a rank does from its start to its end: it executes the controller's commands in the order in which they arrive,
and steps its engine in between while that has requests.

Requests need no command of their own: they are submitted and aborted between two steps of the engine. So is every other
command executed, also while requests are running; whatever it needs of the engine it does itself.
"""

from __future__ import annotations

import math
import socket
import time
import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum, auto
from typing import TYPE_CHECKING, Protocol

import msgspec
import torch
import torch.distributed as dist

from miles_spmd.generation.engine import Engine
from miles_spmd.platform.device_memory import first_line, is_out_of_memory
from miles_spmd.protocol.commands import AbortRequests, EndGenerate, Generate, Stop, Submit
from miles_spmd.protocol.dealer import Dealer
from miles_spmd.protocol.messages import Call, Completions, Failure, Reply
from miles_spmd.protocol.results import Abandoned, Ok, Result
from miles_spmd.training.passes import AbandonedError
from miles_spmd.types.phase import Phase
from miles_spmd.types.request import Output
from miles_spmd.worker.chores import Chores
from miles_spmd.worker.memory_account import DeviceMemoryError
from miles_spmd.worker.stopwatch import Stopwatch

if TYPE_CHECKING:
    from miles_spmd.worker.worker import Worker

HOST = socket.gethostname()
FOREVER = timedelta(days=365)  # an engine may have nothing to do for as long as a run takes


class Turn(IntEnum):
    """What all ranks of an engine do next."""

    STEP = auto()  # one step of the engine
    COMMAND = auto()  # the next command, which each of them has received itself
    CLOSE = auto()  # close the rollout: its requests are finished


class Lockstep:
    """The ranks of one engine, which must do the same in the same order, because steps and commands have collectives.
    Only the leader receives requests from the controller, so it broadcasts what comes next. Building it is collective
    over all ranks with an engine."""

    def __init__(self, engine_size: int) -> None:
        self.leader = dist.get_rank() % engine_size == 0
        self._group: dist.ProcessGroup | None = None
        if engine_size > 1:
            self._group, _ = dist.new_subgroups(engine_size, backend="gloo", timeout=FOREVER)

    def agree(self, turn: Turn) -> Turn:
        """Return the leader's ``turn`` on every rank of the engine."""
        if self._group is None:
            return turn
        decision = torch.tensor(turn)
        dist.broadcast(decision, group=self._group, group_src=0)
        return Turn(int(decision))


@dataclass
class OpenRollout:
    """From a Generate command to its reply, which comes when :class:`EndGenerate` was received and no request is left.
    ``steps`` of the engine took ``seconds``."""

    call: Call
    due: float  # monotonic
    ended: bool = False
    steps: int = 0
    retries: int = 0
    seconds: float = 0.0


class Watcher(Protocol):
    """Receives where the rank stands: :class:`miles_spmd.worker.watchdog.Watchdog` for one."""

    def enter(self, phase: Phase, step: int, seconds: float = math.inf) -> None: ...

    def progress(self, detail: str) -> None: ...

    def begin_engine_step(self, seconds: float) -> None: ...

    def end_engine_step(self) -> None: ...


class Service:
    """Serves the controller behind ``dealer`` with ``worker``. Building it is collective over all ranks with an engine.

    ``chores`` are done beside the commands. ``step_timeout``: seconds that a step of the engine may take.
    """

    def __init__(
        self,
        worker: Worker,
        rank: int,
        dealer: Dealer,
        watcher: Watcher,
        watch: Stopwatch,
        chores: Chores | None = None,
        step_timeout: float = math.inf,
    ) -> None:
        self._worker, self._rank, self._dealer = worker, rank, dealer
        self._watcher, self._watch, self._chores = watcher, watch, chores or Chores()
        self._step_timeout = step_timeout
        self._lockstep = None if worker.engine_rank is None else Lockstep(worker.turns.engine.size)
        self._rollout: OpenRollout | None = None
        self._step = -1

    def run(self) -> Call:
        """Serve until the controller sends Stop; returns its call, to which no reply was sent."""
        while True:
            match self._next():
                case Turn.STEP:
                    self._step_engine()
                case Turn.CLOSE:
                    self._close_rollout()
                case Call(command=Stop()) as call:
                    return call
                case Call() as call:
                    self._execute(call)

    # --- what comes next ---------------------------------------------------------------------------------------------

    def _next(self) -> Turn | Call:
        if self._lockstep is None:
            return self._command()
        with self._watch("wait") if self._rollout else nullcontext():
            turn, call = self._lead() if self._lockstep.leader else (Turn.COMMAND, None)
            turn = self._lockstep.agree(turn)
        return (call or self._command()) if turn is Turn.COMMAND else turn

    def _lead(self) -> tuple[Turn, Call | None]:
        """Take requests until there is something to do for all ranks of the engine; an idle engine waits for it."""
        engine = self._worker.turns.engine
        while True:
            rollout = self._rollout
            turn = None if rollout is None else Turn.STEP if not engine.idle else Turn.CLOSE if rollout.ended else None
            call = self._receive(None if turn is None else 0)
            if call is None:
                assert turn is not None
                return turn, None
            if call.command.has_reply():
                return Turn.COMMAND, call
            if rollout is not None:
                self._feed(engine, rollout, call)

    def _feed(self, engine: Engine, rollout: OpenRollout, call: Call) -> None:
        """Execute a command without a reply: it is part of the rollout."""
        match call.command:
            case Submit(requests):
                try:
                    engine.submit(requests)
                except ValueError as error:  # a request does not fit the engine
                    self._fail_rollout(error)
            case AbortRequests(rids):
                engine.abort(rids)
            case EndGenerate():
                rollout.ended = True

    def _command(self) -> Call:
        """Wait for the next command that has a reply. One without is part of a rollout that has failed on this rank
        while the controller was still sending to it."""
        while True:
            call = self._receive(None)
            if call is not None and call.command.has_reply():
                return call

    def _receive(self, timeout: float | None) -> Call | None:
        message = self._dealer.receive(timeout)
        if not isinstance(message, Call | None):
            raise RuntimeError(f"the controller sent a {type(message).__name__}")
        return message

    # --- commands ----------------------------------------------------------------------------------------------------

    def _execute(self, call: Call) -> None:
        command, due = call.command, time.monotonic() + call.deadline
        self._watcher.enter(command.phase, call.step, call.deadline)
        self._worker.memory.begin(command.phase, call.step)
        if call.step != self._step:
            self._step = call.step
            self._chores.begin_step()
        result: Result | Failure
        try:
            with self._worker.memory.explaining():
                result = self._worker.execute(command)
            self._chores.check()
        except AbandonedError:
            result = Abandoned()
        except BaseException as error:  # not all libraries derive their errors from Exception
            result = failure(error)
        if isinstance(command, Generate) and isinstance(result, Ok):
            self._rollout = OpenRollout(call, due)
        else:
            self._reply(call, result)

    def _reply(self, call: Call, result: Result | Failure) -> None:
        """Send the one reply to ``call``, and go on with the rollout, if one is open."""
        if (rollout := self._rollout) is not None:
            self._watcher.enter(Phase.ROLLOUT, rollout.call.step, rollout.due - time.monotonic())
            self._worker.memory.begin(Phase.ROLLOUT, rollout.call.step)
        else:
            self._watcher.enter(Phase.IDLE, call.step)
        own, memory, health = self._worker.take_own(), self._worker.memory.take(), self._chores.health()
        self._dealer.send(Reply(call.id, self._rank, HOST, result, self._watch.take(), memory, own, health))

    # --- the rollout -------------------------------------------------------------------------------------------------

    def _step_engine(self) -> None:
        rollout, began = self._rollout, time.perf_counter()
        assert rollout is not None
        self._watcher.begin_engine_step(self._step_timeout)
        try:
            with self._watch("engine"), self._worker.memory.explaining():
                outputs = step(self._worker.turns.engine)
        except BaseException as error:
            self._fail_rollout(error, engine=may_be_replaced(error))
            return
        finally:
            self._watcher.end_engine_step()
        rollout.seconds += time.perf_counter() - began
        rollout.steps += 1
        rollout.retries += outputs is None
        if outputs and self._lockstep is not None and self._lockstep.leader:
            self._dealer.send(Completions(self._rank, outputs))
        self._watcher.progress(f"engine step {rollout.steps}")

    def _close_rollout(self) -> None:
        rollout, self._rollout = self._rollout, None
        assert rollout is not None
        result: Result | Failure = Ok()
        try:
            self._worker.close_rollout(rollout.steps, rollout.seconds, rollout.retries)
            self._chores.check()
        except Exception as error:
            result = failure(error)
        self._reply(rollout.call, result)

    def _fail_rollout(self, error: BaseException, *, engine: bool = False) -> None:
        """End the rollout on this rank; the reply to its command is the error. ``engine``: a new engine may do it."""
        rollout, self._rollout = self._rollout, None
        assert rollout is not None
        self._reply(rollout.call, msgspec.structs.replace(failure(error), engine=engine))


def step(engine: Engine) -> list[Output] | None:
    """Return what finished, or None when memory did not suffice and the engine begins again with half as many requests
    at a time. Raises what the step raised, where the engine cannot run fewer."""
    try:
        return engine.step()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors that the step had allocated so far
        limit = engine.retry_smaller()
        if limit is None:
            raise
        print(f"rollout: out of memory; again with at most {limit} requests at a time: {first_line(error)}")
        return None


def may_be_replaced(error: BaseException) -> bool:
    """Return whether a new engine may do what this one could not: not where weights, memory or the device are why."""
    hopeless = (FloatingPointError, DeviceMemoryError, torch.AcceleratorError)
    return isinstance(error, Exception) and not isinstance(error, hopeless)


def failure(error: BaseException) -> Failure:
    """Return the error for the controller, after printing it into the log."""
    traceback.print_exc()
    return Failure(type(error).__name__, str(error), traceback.format_exc())
