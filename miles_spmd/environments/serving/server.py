"""The process that serves HTTP, seen from the run."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import msgspec

from miles_spmd.environments.serving.messages import Ending, FromServer, Listening, Problem, ToServer
from miles_spmd.environments.serving.process import END_SECONDS, Served, serve
from miles_spmd.processes.child import Child

START_TIMEOUT = 120.0  # seconds in which it has to listen
_decoder = msgspec.msgpack.Decoder(FromServer)


class ServerError(RuntimeError):
    """The process cannot serve, or has ended. The message says why."""


class Server:
    """Starts the process, which serves once it is told to :meth:`listen`; from then on ``wake`` is called, in another
    thread, when there is a message. Make it in the main thread, with which the process ends."""

    def __init__(self, log: Path, wake: Callable[[], None]) -> None:
        self._messages: deque[FromServer] = deque()
        self._wake, self._log = wake, log
        self._orders: SimpleQueue[ToServer] = SimpleQueue()
        self._child = Child(serve, (), log=log)
        self._threads: list[threading.Thread] = []

    def listen(self, served: Served) -> str:
        """Let the process serve, and return the URL. Raises ServerError."""
        with contextlib.suppress(OSError):  # it has ended
            self._child.pipe.send(served)
        if not self._child.pipe.poll(START_TIMEOUT):
            raise ServerError(f"the server of HTTP did not start within {START_TIMEOUT:g} s; see {self._log}")
        message = self._receive()
        if not isinstance(message, Listening):
            raise ServerError(message.text if isinstance(message, Problem) else f"sent {message}")
        self._threads = [
            threading.Thread(target=target, name="server of HTTP", daemon=True) for target in (self._read, self._write)
        ]
        for thread in self._threads:
            thread.start()
        return message.url

    @property
    def has_news(self) -> bool:
        return bool(self._messages)

    def take(self) -> Iterator[FromServer]:
        """Yield the messages that have arrived. Raises ServerError where the process has ended."""
        while self._messages:
            if isinstance(message := self._messages.popleft(), Problem):
                raise ServerError(message.text)
            yield message

    def send(self, message: ToServer) -> None:
        """Send a message, without waiting for the process to read it."""
        self._orders.put(message)

    def close(self) -> None:
        """Let the process tell its clients that it ends, and end it."""
        if self._threads:
            self._orders.put(Ending())
            self._threads[0].join(2 * END_SECONDS)  # it closes its pipe
        self._child.kill()
        for thread in self._threads:  # on a slow machine it had no time to: nobody is woken once this has returned
            thread.join(END_SECONDS)

    def _receive(self) -> FromServer:
        try:
            return _decoder.decode(self._child.pipe.recv_bytes())
        except (EOFError, OSError):
            return Problem(f"the server of HTTP has ended: {self._child.how_it_ended()}; see {self._log}")

    def _read(self) -> None:
        while True:
            message = self._receive()
            self._messages.append(message)
            self._wake()
            if isinstance(message, Problem):
                return

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # it has ended, which the other thread reports
            message: ToServer | None = None
            while not isinstance(message, Ending):
                message = self._orders.get()
                self._child.pipe.send_bytes(msgspec.msgpack.encode(message))
