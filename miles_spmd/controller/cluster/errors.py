"""What ends a run, a cell or a command: the errors of ranks, whose texts name rank, host, phase, step and cause."""

from __future__ import annotations


class Unfinished(BaseException):
    """Raised in the main thread where the step or the evaluation under way is left because the run has to stop.

    Not an Exception: code that handles errors of a reward or a rank must not catch it.
    """


class WorkerError(RuntimeError):
    """A rank did not execute a command. ``details`` is a remote traceback for the log, or ""."""

    def __init__(self, text: str, details: str = "", rank: int | None = None) -> None:
        super().__init__(text)
        self.details, self.rank = details, rank


class WorkerLostError(WorkerError):
    """The process of ``rank`` died, or the network to it broke."""


class WorkerStoppedError(WorkerError):
    """A rank has received a signal to stop and has announced its end."""


class WorkerFailedError(WorkerError):
    """A command raised an exception on a rank."""


class EngineFailedError(WorkerFailedError):
    """An engine raised an exception while it generated; its process and its trainer are as they were."""


class WorkerSilentError(WorkerError):
    """A rank is connected and has sent no heartbeat for ``heartbeat_timeout``: its process is suspended, or stuck while
    it holds the GIL."""


class DeadlineError(WorkerError):
    """Some ranks did not reply within the deadline of the command."""


class ProtocolError(WorkerError):
    """A member of the run sent something that the protocol does not allow."""
