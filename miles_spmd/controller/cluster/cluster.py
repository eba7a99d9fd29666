"""The controller's view of all ranks: a call to every rank and an answer from each, or one error: who, where and why.

Every wait sleeps in poll, has a deadline, and ends early when a rank fails, dies, or falls silent.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from miles_spmd.config.schema import DeadlinesConfig
from miles_spmd.protocol.messages import (
    AbortRequests,
    Body,
    Command,
    Completions,
    EndGenerate,
    Failure,
    Generate,
    Heartbeat,
    Hello,
    Message,
    RankInfo,
    RefitEngine,
    Reply,
    Result,
    Stop,
    Submit,
    TrainerRank,
    WireError,
)
from miles_spmd.protocol.router import Peer, PeerGoneError, Router
from miles_spmd.types.phase import Phase
from miles_spmd.types.request import Output, Request

DEADLINE_OF = {
    Phase.START: "start_timeout",
    Phase.ROLLOUT: "rollout_timeout",
    Phase.LOG_PROBS: "train_timeout",
    Phase.TRAIN: "train_timeout",
    Phase.REFIT: "refit_timeout",
    Phase.CHECKPOINT: "checkpoint_timeout",
    Phase.STOP: "heartbeat_timeout",
}
SIGNALS = (signal.SIGTERM, signal.SIGINT)
CHECK_EVERY = 0.25  # seconds between looks at the clock
MAX_LINES = 32  # of a report on ranks
STACKS_GRACE = 1.0  # seconds past a deadline in which the ranks say where they are
CAUSE_GRACE = 0.5  # seconds after a first error in which the rank that caused it may become known


class WorkerError(RuntimeError):
    """A rank did not do what it was told. The text names rank, host, phase and step."""

    def __init__(self, text: str, details: str = "") -> None:
        super().__init__(text)
        self.details = details  # for the log: a remote traceback


class WorkerLostError(WorkerError):
    """A rank's process died, or the network to it broke."""

    def __init__(self, text: str, rank: int) -> None:
        super().__init__(text)
        self.rank = rank


class WorkerStoppedError(WorkerError):
    """A rank was told by a signal to stop, and said so."""


class WorkerFailedError(WorkerError):
    """A command raised an exception on a rank."""


class WorkerSilentError(WorkerError):
    """A rank is connected but has not beaten for ``heartbeat_timeout``: stopped, or stuck without the GIL."""


class DeadlineError(WorkerError):
    """Some ranks did not answer in time."""


class ProtocolError(WorkerError):
    """A member of the run said something that makes no sense."""


@dataclass
class _Rank:
    info: RankInfo | None = None
    peer: Peer | None = None  # the connection that takes commands
    beat: Heartbeat | None = None
    heard: float = 0.0  # monotonic; 0: never


@dataclass
class _Call:
    """One command on its way: whom it was given to, and who has answered."""

    id: int
    ranks: Sequence[int]
    seconds: float
    end: float  # monotonic
    replies: dict[int, Reply] = field(default_factory=dict)


class Cluster:
    """All ranks of a run behind ``router``.

    ``phase`` and ``step`` are those of the last command; ``seconds`` holds, by rank, where its time went, nothing for a
    rank that it did not concern.
    """

    def __init__(
        self, router: Router, world_size: int, deadlines: DeadlinesConfig, config_digest: str, log_dir: Path
    ) -> None:
        self.phase, self.step, self.purpose = Phase.START, 0, ""
        self.seconds: list[dict[str, float]] = [{} for _ in range(world_size)]
        self._memory: dict[str, float] = {}
        self._router = router
        self._deadlines = deadlines
        self._config_digest = config_digest
        self._log_dir = log_dir
        self._ranks = [_Rank() for _ in range(world_size)]
        self._missing = set(range(world_size))  # have not said hello
        self._rank_of: dict[Peer, int] = {}
        self._ids = itertools.count(1)
        self._call = _Call(0, [], deadlines.start_timeout, time.monotonic() + deadlines.start_timeout)
        self._completed: deque[Output] = deque()
        self._next_check = 0.0  # monotonic
        self._troubles: list[WorkerError] = []
        self._leaving: set[int] = set()  # ranks that said they were told to stop

    # --- what the loop asks ------------------------------------------------------------------------------------------

    def wait_ready(self) -> None:
        """Until every rank has built its parts. ``seconds`` then holds the start-up times."""
        self._wait(lambda: not self._missing)

    @property
    def infos(self) -> list[RankInfo]:
        """Of all ranks, by rank; waits for them the first time."""
        if self._missing:
            self.wait_ready()
        return [rank.info for rank in self._ranks if rank.info is not None]

    @property
    def trainers(self) -> list[TrainerRank]:
        """The ranks that train, by rank."""
        return [info.trainer for info in self.infos if info.trainer is not None]

    def call(
        self, body: Body | Sequence[Body], *, step: int, phase: Phase, timeout: float | None = None
    ) -> list[Result]:
        """Tell ``body`` (a sequence: one per rank) to every rank that it concerns and return their results by rank.

        ``timeout`` in seconds defaults to the phase's deadline. Raises a WorkerError.
        """
        self._begin(body, step, phase, timeout)
        return self._finish()

    @contextmanager
    def rollout(self, step: int, timeout: float | None = None, *, purpose: str = "") -> Iterator[RolloutSession]:
        """Open a rollout on all engines; leaving the block ends it, and stops what is still running. Errors name its
        ``purpose``, where it has one beside training."""
        self._begin(Generate(), step, Phase.ROLLOUT, timeout)
        self.purpose = purpose
        self._completed.clear()
        session = RolloutSession(self, [info.rank for info in self.infos if info.engine and info.engine.leader])
        yield session
        session.end()
        self._finish()

    def take_memory(self) -> dict[str, float]:
        """The metrics ``memory/...`` of the commands since the last call: the most that any rank said."""
        taken, self._memory = self._memory, {}
        return taken

    def _count_memory(self, of_rank: dict[str, float]) -> None:
        for name, most in of_rank.items():
            self._memory[name] = max(self._memory.get(name, 0.0), most)

    def stop(self) -> None:
        """Let every rank leave its command loop."""
        self.call(Stop(), step=self.step, phase=Phase.STOP)

    # --- one command -------------------------------------------------------------------------------------------------

    def _begin(self, body: Body | Sequence[Body], step: int, phase: Phase, timeout: float | None) -> None:
        ranks = self._concerned(body[0] if isinstance(body, Sequence) else body)
        bodies = body if isinstance(body, Sequence) else [body] * len(ranks)
        if len(bodies) != len(ranks):
            raise ValueError(f"{len(bodies)} bodies for {len(ranks)} ranks")
        seconds = getattr(self._deadlines, DEADLINE_OF[phase]) if timeout is None else timeout
        self.phase, self.step, self.purpose = phase, step, ""
        self._call = _Call(next(self._ids), ranks, seconds, time.monotonic() + seconds)
        same: dict[int, tuple[Body, list[int]]] = {}  # ranks that get the same object get the same bytes
        for rank, own in zip(ranks, bodies):
            same.setdefault(id(own), (own, []))[1].append(rank)
        for own, receivers in same.values():
            self.send(own, receivers)

    def _concerned(self, body: Body) -> list[int]:
        """The ranks that have a part in ``body``."""
        match body:
            case RefitEngine() | Stop():
                return [info.rank for info in self.infos]
            case Generate():
                return [info.rank for info in self.infos if info.engine is not None]
            case _:
                return [info.rank for info in self.infos if info.trainer is not None]

    def send(self, body: Body, ranks: Sequence[int]) -> None:
        """As part of the command under way."""
        message = Command(self._call.id, self.step, self.phase, max(0.0, self._call.end - time.monotonic()), body)
        try:
            self._router.send(message, [peer for rank in ranks if (peer := self._ranks[rank].peer)])
        except PeerGoneError as error:
            raise self.cause() or WorkerError(f"{self.place}: {error}") from None

    def _finish(self) -> list[Result]:
        ranks, replies = self._call.ranks, self._call.replies
        self._wait(lambda: len(replies) == len(ranks))
        self.seconds = [replies[rank].seconds if rank in replies else {} for rank in range(len(self._ranks))]
        for reply in replies.values():
            self._count_memory(reply.memory)
        return [replies[rank].result for rank in ranks]

    def next_output(self, interrupt: Callable[[], bool] = lambda: False) -> Output | None:
        """Return the next finished request of the rollout under way; None once ``interrupt`` returns True, which is
        looked at several times a second."""
        self._wait(lambda: bool(self._completed) or interrupt())
        return self._completed.popleft() if self._completed else None

    # --- waiting -----------------------------------------------------------------------------------------------------

    def _wait(self, done: Callable[[], bool]) -> None:
        while not done():
            if not self._hear(0):  # all that was said is heard: what is missing now is late
                self._check_time()
                self._hear(CHECK_EVERY)
            if self._troubles:
                raise self.cause() or self._troubles[0]

    def _hear(self, timeout: float) -> bool:
        """Take one event. Signals wait meanwhile: one that raises must not make us forget what we have just heard."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            event = self._router.receive(timeout)
            if event is not None:
                self._take(*event)
            return event is not None
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _check_time(self) -> None:
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + CHECK_EVERY
        for rank, state in enumerate(self._ranks):
            if state.heard and now > state.heard + self._deadlines.heartbeat_timeout:
                self._troubles.append(WorkerSilentError(f"{self._name(rank)} is silent: {self._doing(rank)}"))
        if now > self._call.end + STACKS_GRACE:
            self._troubles.append(DeadlineError(self._overdue()))

    def cause(self) -> WorkerError | None:
        """The error that explains the others, if there is any.

        A dead rank makes others fail in their collectives, and its launcher then stops the rest, so a death that nobody
        announced comes first, then a stop, then failures.
        """
        end = time.monotonic() + CAUSE_GRACE
        while self._hear(end - time.monotonic()):
            pass
        deaths = [t for t in self._troubles if isinstance(t, WorkerLostError)]
        stops = [t for t in self._troubles if isinstance(t, WorkerStoppedError)]
        unannounced = [death for death in deaths if death.rank not in self._leaving]
        return next(iter([*unannounced, *stops, *self._troubles]), None)

    def explain(self, reason: str) -> str:
        """Why the run ends, when somebody has told the controller to stop for ``reason``."""
        return str(self.cause() or self._stopped(reason))

    def _stopped(self, reason: str) -> str:
        absent = ", ".join(str(rank) for rank, state in enumerate(self._ranks) if not state.heard)
        return f"{self.place}: {reason}" + (f"; rank {absent} had not connected" if absent else "")

    # --- events ------------------------------------------------------------------------------------------------------

    def _take(self, peer: Peer, message: Message | WireError | None) -> None:
        match message:
            case Hello() | Heartbeat() | Reply() | Completions():
                rank = message.info.rank if isinstance(message, Hello) else message.rank
                if not 0 <= rank < len(self._ranks) or self._rank_of.setdefault(peer, rank) != rank:
                    self._troubles.append(ProtocolError(f"a member of the run calls itself rank {rank}"))
                    return
                self._ranks[rank].heard = time.monotonic()
                self._take_from(rank, peer, message)
            case None:
                self._take_loss(peer)
            case _:
                who = self._name(self._rank_of[peer]) if peer in self._rank_of else "a member of the run"
                what = message if isinstance(message, WireError) else f"sent a {type(message).__name__}"
                self._troubles.append(ProtocolError(f"{who}: {what}"))

    def _take_from(self, rank: int, peer: Peer, message: Hello | Heartbeat | Reply | Completions) -> None:
        match message:
            case Hello():
                self._take_hello(rank, peer, message)
            case Heartbeat(phase=Phase.STOP):
                self._leaving.add(rank)
                self._troubles.append(WorkerStoppedError(self._stopped(message.detail)))
            case Heartbeat():
                self._ranks[rank].beat = message
            case Completions():
                self._completed.extend(message.outputs)
            case Reply(result=Failure() as failure):
                text = f"rank {rank} ({message.host}), {self.place}: {failure.kind}: {failure.message}"
                self._troubles.append(WorkerFailedError(text, failure.traceback))
            case Reply() if message.id == self._call.id:
                self._call.replies[rank] = message
            case Reply():
                self._troubles.append(ProtocolError(f"{self._name(rank)} answered an old command ({message.id})"))

    def _take_hello(self, rank: int, peer: Peer, hello: Hello) -> None:
        state = self._ranks[rank]
        if state.info is not None:
            self._troubles.append(ProtocolError(f"two processes are rank {rank}: {state.info} and {hello.info}"))
        elif hello.config_digest != self._config_digest:
            name = f"rank {rank} ({hello.info.host})"
            self._troubles.append(ProtocolError(f"{name} was started with another configuration than rank 0"))
        else:
            state.info, state.peer = hello.info, peer
            self._missing.remove(rank)
            self.seconds[rank] = hello.seconds
            self._count_memory(hello.memory)

    def _take_loss(self, peer: Peer) -> None:
        """A closed connection is a death, but for a rank that leaves as told. Its two connections are read by different
        threads, so that of its watchdog may be seen to close before the reply on the other is heard."""
        rank = self._rank_of.get(peer)
        if rank is None:
            return
        leaves = rank in self._call.replies or peer != self._ranks[rank].peer
        if self.phase is not Phase.STOP or not leaves:
            self._troubles.append(WorkerLostError(f"{self._name(rank)} died: {self._doing(rank)}", rank))

    # --- words -------------------------------------------------------------------------------------------------------

    @property
    def place(self) -> str:
        """What the run is doing, in words."""
        if self.phase is Phase.START:
            return str(self.phase)
        return f"{self.phase}, step {self.step}" + (f", {self.purpose}" if self.purpose else "")

    def _name(self, rank: int) -> str:
        info = self._ranks[rank].info
        return f"rank {rank} ({info.host}, pid {info.pid})" if info else f"rank {rank}"

    def _doing(self, rank: int) -> str:
        """What it was told, and where it last said it was."""
        state = self._ranks[rank]
        busy = self._owes(rank)
        doing = self.place if busy else f"idle after {self.place}"
        if not state.heard:
            return f"{doing}, never connected"
        detail = f", {state.beat.detail}" if state.beat and state.beat.detail and busy else ""
        return f"{doing}{detail}, last heard {time.monotonic() - state.heard:.1f} s ago"

    def _overdue(self) -> str:
        late = [rank for rank in range(len(self._ranks)) if self._owes(rank)]
        first = f"{self.place}: rank {', '.join(map(str, late))} did not answer within {self._call.seconds:g} s"
        lines = [f"  {self._name(rank)}: {self._doing(rank)}" for rank in late[:MAX_LINES]]
        return "\n".join([first, *lines, f"  stacks: {self._log_dir}/rank-*.stacks"])

    def _owes(self, rank: int) -> bool:
        """An answer to what was asked last; at the start, a hello."""
        call = self._call
        return rank in call.ranks and rank not in call.replies if call.id else rank in self._missing


class RolloutSession:
    """The engines while a rollout is open.

    Engines take turns prompt by prompt: requests of one prompt, submitted one after another, go to one engine, which
    reads the prompt once for all. Where a request runs depends on nothing but the order of submission.
    """

    def __init__(self, workers: Cluster, leaders: Sequence[int]) -> None:
        self._workers = workers
        self._leaders = leaders
        self._turns = itertools.cycle(leaders)
        self._prompt: list[int] | None = None  # of the last request
        self._turn = leaders[0]
        self._rank_of: dict[str, int] = {}  # unfinished requests

    def submit(self, requests: Sequence[Request]) -> None:
        batches: dict[int, list[Request]] = {}
        for request in requests:
            if request.rid in self._rank_of:
                raise ValueError(f"request {request.rid!r} is already running")
            if request.input_ids != self._prompt:
                self._prompt, self._turn = request.input_ids, next(self._turns)
            self._rank_of[request.rid] = self._turn
            batches.setdefault(self._turn, []).append(request)
        for rank, batch in batches.items():
            self._workers.send(Submit(batch), [rank])

    def abort(self, rids: Sequence[str] | None = None) -> None:
        """Stop these requests, None: all. They still come out of :meth:`completions`, with what they have."""
        running = [rid for rid in (self._rank_of if rids is None else rids) if rid in self._rank_of]
        for rank in sorted({self._rank_of[rid] for rid in running}):
            self._workers.send(AbortRequests([rid for rid in running if self._rank_of[rid] == rank]), [rank])

    def completions(self) -> Iterator[Output]:
        """Outputs as they finish, until nothing that was submitted is unfinished."""
        while (output := self.next()) is not None:
            yield output

    def next(self, interrupt: Callable[[], bool] = lambda: False) -> Output | None:
        """Return the next finished output; None when nothing is running, or once ``interrupt`` returns True."""
        output = self._workers.next_output(interrupt) if self._rank_of else None
        if output is not None:
            del self._rank_of[output.rid]
        return output

    def end(self) -> None:
        """Stop what is still running and tell the engines that nothing more will come."""
        self.abort()
        self._workers.send(EndGenerate(), self._leaders)
