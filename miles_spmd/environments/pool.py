"""The processes that run an environment, seen from the run."""

from __future__ import annotations

import os
import selectors
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec

from miles_spmd.config.environment import EnvironmentConfig
from miles_spmd.environments.context import ModelSource
from miles_spmd.environments.mark import NOBODY, Mark
from miles_spmd.environments.messages import Ask, Begin, Cancel, Completed, Event, Failed, Order, decode
from miles_spmd.environments.process import serve
from miles_spmd.plugins.environment import EnvironmentSetupError
from miles_spmd.processes.child import Child

IMPORT_TIMEOUT = 120.0  # seconds in which the environment's module must be imported
LOOK_EVERY = 0.5  # seconds between looks at the clock
GRACE = 5.0  # seconds in which an episode has to end that was told to; else its process is killed


class _Worker:
    """A process. ``since`` has its episodes, with the time since when the environment is at work on each: None while
    it waits for the policy. An order that the process does not read must block nobody, so a thread sends them."""

    def __init__(self, setup: Sequence[Any], environment: Sequence[str], log: Path | None) -> None:
        self.mark = Mark()
        descriptor = self.mark.descriptor
        self.child = Child(serve, (*setup, descriptor), environment, log, [descriptor])
        self._seen, self._seen_at = self.mark.read(), time.monotonic()
        self._looked = self._seen_at
        self.ready = False  # whether the environment is imported
        self.started = time.monotonic()
        self.since: dict[int, float | None] = {}
        self.asked = Counter[int]()  # requests of these episodes that the policy has not completed
        self.purposes: dict[int, str] = {}  # of these episodes
        self.told_to_end: dict[int, float] = {}  # episodes that nobody waits for, and when they were told
        self._orders: SimpleQueue[Order | None] = SimpleQueue()
        threading.Thread(target=self._send, name="environment orders", daemon=True).start()

    def tell(self, order: Order | None) -> None:
        self._orders.put(order)

    def _send(self) -> None:
        try:
            while (order := self._orders.get()) is not None:
                self.child.pipe.send(order)
        except OSError:  # the process has ended, which the reader reports
            pass

    def become_ready(self) -> None:
        """Note that the environment is imported, and its time on the episodes that wait begins."""
        self.ready, now = True, time.monotonic()
        self.since = dict.fromkeys(self.since, now)

    def blocked(self, now: float) -> float:
        """Return for how many seconds one episode has kept the process from doing anything else, as far as is known;
        the others are not charged for that time."""
        seen = self.mark.read()
        if seen != self._seen or seen.episode == NOBODY:
            self._seen, self._seen_at, self._looked = seen, now, now
            return 0.0
        for episode, since in self.since.items():
            if since is not None and episode != seen.episode:
                self.since[episode] = since + now - self._looked
        self._looked = now
        return now - self._seen_at

    def overdue(self, now: float, limit: float) -> list[int]:
        """The episodes whose environment has been at work for more than ``limit`` seconds."""
        waits = (number for number in self.since if number not in self.told_to_end)
        return [number for number in waits if (since := self.since[number]) is not None and now > since + limit]

    def suspects(self) -> set[int]:
        """Return the episodes that may have ended the process: the one that ran, where that is known."""
        ran = self.mark.read().episode
        return {ran} if ran in self.since else {episode for episode, since in self.since.items() if since is not None}


class EnvironmentPool:
    """Runs the environment of ``config`` in processes. ``wake`` is called, in another thread, when there is an event.

    Make it in the main thread: a process dies with the thread that has started it, this one or the reader. Raises
    EnvironmentSetupError where the environment cannot be imported or called.
    """

    def __init__(
        self, config: EnvironmentConfig, model: ModelSource, log: Path | None, wake: Callable[[], None] = lambda: None
    ) -> None:
        self.events: deque[Event] = deque()
        self._config, self._log, self._wake = config, log, wake
        self._setup = config.environment, config.environment_kwargs, model, config.environment_memory_gib
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()  # of all that the reader changes too
        self._of_episode: dict[int, _Worker] = {}
        self._queues: defaultdict[str, deque[Begin]] = defaultdict(deque)  # episodes that wait for room, by purpose
        self._closed = False
        self._selector = selectors.DefaultSelector()
        self._end_asked = os.eventfd(0, os.EFD_CLOEXEC)
        self._selector.register(self._end_asked, selectors.EVENT_READ)
        self._workers = [self._start() for _ in range(config.environment_workers)]
        try:
            for worker in self._workers:
                self._import(worker)
        except EnvironmentSetupError:
            self._end()
            raise
        self._reader = threading.Thread(target=self._read, name="environments", daemon=True)
        self._reader.start()

    def _start(self) -> _Worker:
        worker = _Worker(self._setup, self._config.environment_variables, self._log)
        self._selector.register(worker.child.pipe, selectors.EVENT_READ, worker)
        return worker

    def _import(self, worker: _Worker) -> None:
        """Wait until a process has imported the environment."""
        where = f"environment.environment = {self._config.environment!r}"
        if not worker.child.pipe.poll(IMPORT_TIMEOUT):
            raise EnvironmentSetupError(f"{where} was not imported within {IMPORT_TIMEOUT:g} s")
        try:
            problem = worker.child.pipe.recv_bytes().decode()
        except (EOFError, OSError):
            problem = f"{where}: its import ended the process ({worker.child.how_it_ended()})"
        if problem:
            raise EnvironmentSetupError(problem)
        worker.become_ready()

    # --- orders ------------------------------------------------------------------------------------------------------

    def send(self, order: Order) -> None:
        """Pass an order on; what comes of it will be in ``events``."""
        with self._lock:
            worker = self._of_episode.get(order.episode)
            match order:
                case Begin():
                    self._queues[order.purpose].append(order)
                case Completed() if worker is not None:
                    worker.asked[order.episode] -= 1
                    if not worker.asked[order.episode]:  # else the environment may wait for another one
                        worker.since[order.episode] = time.monotonic()
                    worker.tell(order)
                case Cancel() if worker is not None:
                    self._cancel(worker, order.episode)
                case Cancel():
                    for purpose, queue in self._queues.items():
                        self._queues[purpose] = deque(begin for begin in queue if begin.episode != order.episode)
            self._dispatch()

    def _dispatch(self) -> None:
        """Give waiting episodes to the processes with most room, and replace those that have ended.

        Room is counted by purpose: episodes of training that wait for the next step would keep an evaluation, which
        that step waits for, from ever beginning.
        """
        for purpose, queue in self._queues.items():
            running = [list(worker.purposes.values()).count(purpose) for worker in self._workers]
            while queue and (least := min(running)) < self._config.environment_concurrency:
                running[number := running.index(least)] += 1
                worker = self._workers[number]
                if not worker.child.lives:
                    worker.tell(None)
                    worker = self._workers[number] = self._start()
                begin = queue.popleft()
                self._of_episode[begin.episode] = worker
                worker.since[begin.episode], worker.purposes[begin.episode] = time.monotonic(), purpose
                worker.tell(begin)

    def _cancel(self, worker: _Worker, episode: int) -> None:
        worker.told_to_end.setdefault(episode, time.monotonic())
        worker.tell(Cancel(episode))

    # --- events, in a thread of their own ----------------------------------------------------------------------------

    def _read(self) -> None:
        next_look = 0.0  # monotonic
        while not self._closed:
            for key, _ in self._selector.select(LOOK_EVERY):
                if key.data is None:
                    os.eventfd_read(self._end_asked)
                else:
                    self._receive(key.data)
            with self._lock:
                if (now := time.monotonic()) >= next_look:
                    next_look = now + LOOK_EVERY
                    for worker in self._workers:
                        self._check_time(worker)
                self._dispatch()
            if self.events:
                self._wake()

    def _receive(self, worker: _Worker) -> None:
        try:
            message = worker.child.pipe.recv_bytes()
            problem = "" if worker.ready else message.decode()
            event = decode(message) if worker.ready else None
        except (EOFError, OSError):
            problem, event = f"its process ended: {worker.child.how_it_ended()}", None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            problem, event = f"its process sent bytes that are not a message: {error}", None
        with self._lock:
            if problem:
                self._lose(worker, problem)
            elif event is None:
                worker.become_ready()
            elif event.episode in worker.since:  # else the environment has made up the number
                self._take(worker, event)
                if isinstance(event, Failed) and event.exhausted:  # what is leaked would be missing in every later one
                    self._lose(worker, "another episode in its process used up its memory", suspects=())

    def _take(self, worker: _Worker, event: Event) -> None:
        expected = event.episode not in worker.told_to_end
        if isinstance(event, Ask):
            worker.since[event.episode] = None
            worker.asked[event.episode] += 1
        else:
            self._forget(worker, event.episode)
        if expected:
            self.events.append(event)

    def _lose(self, worker: _Worker, problem: str, kind: str = "died", suspects: Collection[int] | None = None) -> None:
        """End a process that cannot be used any more: its episodes fail, those that have no part in it to be begun
        anew. ``suspects``: those that have; None: those that the mark tells."""
        worker.child.kill()
        self._selector.unregister(worker.child.pipe)
        worker.child.pipe.close()
        if suspects is None:
            suspects = worker.suspects()
        for episode in list(worker.since):
            if episode not in worker.told_to_end:
                own = episode in suspects
                self.events.append(Failed(episode, kind if own else "interrupted", problem, own=own))
            self._forget(worker, episode)
        worker.mark.close()

    def _check_time(self, worker: _Worker) -> None:
        """Let episodes fail whose environment takes too long, and end a process that one of them blocks."""
        if worker.child.pipe.closed:
            return
        now, limit = time.monotonic(), self._config.environment_timeout
        problem = f"took longer than environment.environment_timeout = {limit:g} s"
        if not worker.ready:
            if now > worker.started + IMPORT_TIMEOUT:
                self._lose(worker, f"was not imported within {IMPORT_TIMEOUT:g} s")
            return
        if blocked := worker.blocked(now):
            if blocked > limit:
                self._lose(worker, f"{problem}, and blocked its process", "timeout")
            return
        for episode in worker.overdue(now, limit):
            self.events.append(Failed(episode, "timeout", problem))
            self._cancel(worker, episode)
        if any(now > told + GRACE for told in worker.told_to_end.values()):
            self._lose(worker, "another episode in its process could not be ended")

    def _forget(self, worker: _Worker, episode: int) -> None:
        worker.since.pop(episode, None)
        worker.asked.pop(episode, None)
        worker.purposes.pop(episode, None)
        worker.told_to_end.pop(episode, None)
        self._of_episode.pop(episode, None)

    def close(self) -> None:
        """End the processes."""
        self._closed = True
        os.eventfd_write(self._end_asked, 1)
        self._reader.join()
        self._end()

    def _end(self) -> None:
        for worker in self._workers:
            worker.tell(None)
            worker.child.kill()
        self._selector.close()
        os.close(self._end_asked)
