"""A process in which functions of a user are called, one call after another, with limits of time and memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from miles_spmd.processes.child import Child, limit_memory

LOAD_TIMEOUT = 120.0  # seconds in which the modules of a user's functions must be imported
_LOOK_EVERY = 1.0  # seconds between looks at whether a silent process is alive
_BEGUN = "begun"  # what a process sends when it has read a call
_ATTEMPTS = 3  # processes that may be found ended before one reads the call


class ProcessEndedError(Exception):
    """A process that has ended, by an exit, a crash or a signal, while it had something to do."""


class NotLoadedError(Exception):
    """A process that has ended while it imported the user's functions, or has not imported them in time."""


class LimitedProcess:
    """The caller's side, used by one thread at a time. A process that has ended is replaced in the next call.

    It dies with the thread that has started it. The module-level function ``main`` gets the pipe and ``arguments``, and
    ends with :func:`serve_calls`. ``environment`` and ``log`` are those of :class:`Child`.
    """

    def __init__(
        self,
        main: Callable[..., None],
        arguments: Sequence[Any],
        environment: Sequence[str] = (),
        log: Path | None = None,
    ) -> None:
        self._begin = partial(Child, main, arguments, environment, log)
        self._killed, self._lock = False, threading.Lock()
        self._start()

    def _start(self) -> None:
        self._child = self._begin()
        self._loaded: tuple[Any] | None = None

    def loaded(self) -> Any:
        """Wait until ``load`` has returned, and return its second result. Raises what it raised, and NotLoadedError."""
        if self._loaded is None:
            try:
                self._loaded = (self._exchange(LOAD_TIMEOUT),)
            except (TimeoutError, ProcessEndedError) as error:
                problem = f"was not imported within {LOAD_TIMEOUT:g} s, or its import ended the process ({error})"
                raise NotLoadedError(f"{problem}; import its module by itself") from error
        return self._loaded[0]

    def call(self, timeout: float, *arguments: Any) -> Any:
        """Call what ``load`` returned, and return what it returns or raise what it raises.

        A process that ends before it has read the call was idle, and the call goes to another one. Raises TimeoutError
        where the call takes longer than ``timeout`` seconds, ProcessEndedError, CancelledError after :meth:`kill`, and
        what :meth:`loaded` raises.
        """
        attempts = 0
        while True:
            attempts += 1
            with self._lock:
                if not self._child.lives and not self._killed:
                    self._start()
            self.loaded()
            try:
                return self._exchange(timeout, arguments)
            except ProcessEndedError:
                if self._begun or attempts == _ATTEMPTS:
                    raise

    def _exchange(self, timeout: float, *messages: Any) -> Any:
        """Send, and return or raise the reply. A process that neither reads nor replies in time is killed."""
        self._begun = False
        end = time.monotonic() + timeout
        timer = threading.Timer(timeout, self._child.kill)
        timer.start()
        try:
            for message in messages:
                self._child.pipe.send(message)
            while (reply := self._receive()) == _BEGUN:
                self._begun = True
        except (EOFError, OSError):
            late, how = time.monotonic() >= end, self._child.how_it_ended()
            if self._killed:
                raise CancelledError from None
            raise TimeoutError(f"after {timeout:g} s") if late else ProcessEndedError(how) from None
        finally:
            timer.cancel()
            if time.monotonic() >= end:  # the timer may be killing it: the next call must not take it for alive
                self._child.kill()
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _receive(self) -> Any:
        while not self._child.pipe.poll(_LOOK_EVERY):
            if not self._child.lives and not self._child.pipe.poll():
                raise EOFError  # and another process holds the pipe open
        return self._child.pipe.recv()

    def kill(self) -> None:
        """End the process for good."""
        with self._lock:
            self._killed = True
        self._child.kill()


def serve_calls(pipe: Connection, load: Callable[[], tuple[Callable[..., Any], Any]], memory_gib: float) -> None:
    """Load the user's functions, and make the calls that come through the pipe. Runs inside the process.

    ``load`` returns what is called with the arguments of each :meth:`LimitedProcess.call`, and what
    :meth:`LimitedProcess.loaded` returns. From then on the address space may grow by ``memory_gib``. What both return,
    and every Exception that they raise, is sent through the pipe.
    """
    try:
        call, loaded = load()
    except Exception as error:
        pipe.send(error)
        return
    limit_memory(memory_gib)
    pipe.send(loaded)
    while True:
        try:
            message = pipe.recv()
            pipe.send(_BEGUN)
            pipe.send(call(*message))
        except EOFError:
            raise
        except Exception as error:
            pipe.send(error)
