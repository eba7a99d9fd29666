"""The classes of errors of ranks; listener.py writes their texts, which name rank, host, phase, step and cause."""

from __future__ import annotations


class WorkerError(RuntimeError):
    """A rank did not execute a command. ``details`` is a remote traceback for the log, or ""."""

    def __init__(self, text: str, details: str = "") -> None:
        super().__init__(text)
        self.details = details


class WorkerLostError(WorkerError):
    """A rank's process died, or the network to it broke."""

    def __init__(self, text: str, rank: int) -> None:
        super().__init__(text)
        self.rank = rank


class WorkerStoppedError(WorkerError):
    """A rank has received a signal to stop and has announced its end."""


class WorkerFailedError(WorkerError):
    """A command raised an exception on a rank."""


class WorkerSilentError(WorkerError):
    """A rank is connected and has sent no heartbeat for ``heartbeat_timeout``: its process is suspended, or stuck while
    it holds the GIL."""


class DeadlineError(WorkerError):
    """Some ranks did not reply within the deadline of the command."""


class ProtocolError(WorkerError):
    """A member of the run sent something that the protocol does not allow."""
